"""
Line charts as inline SVG that stretches with the page.

The SVG holds the lines only, in a square of 1000 units that takes any shape; labels are text of the page, placed in
percent, so they keep their size on a phone. Strokes do not scale.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


Points = Sequence[tuple[float, float]]

MAX_POINTS = 240
"""More points of a series are averaged in this many groups or fewer."""
MANY_POINTS = 39
"""Noisy series of more points have a moving average over them."""


@dataclass(frozen=True)
class Series:
    """
    A line of a chart.

    Args:
        label (`str`): Its name in the legend.
        points (sequence of `(x, y)`): The values, by growing `x`.
        color (`int`): A place in the palette of the page.
        errors (`Sequence[float | None]`, *optional*): The standard error of each point; drawn as bars.
        kind (`str`): `"line"`, `"noisy"` (with a moving average where there are many points), `"dots"` (connected), or
            `"steps"`.
        is_dashed (`bool`): Whether the line is dashed.
    """

    label: str
    points: Points
    color: int = 0
    errors: Sequence[float | None] | None = None
    kind: str = "line"
    is_dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """What the template needs to draw a chart: see `charts.jinja`."""

    title: str
    x_label: str
    paths: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    legend: list[dict[str, Any]]
    data: str
    summary: str
    table: list[list[str]]
    note: str = ""
    badge: str = ""
    axis: str = ""
    has_average: bool = False


def draw(
    title: str,
    series: Sequence[Series],
    x_label: str = "optimizer step",
    note: str = "",
    badge: str = "",
    is_log: bool = False,
    from_zero: bool = False,
    whole_numbers: bool = False,
) -> Chart | None:
    """
    A chart of the series that have points.

    Args:
        title (`str`): What is drawn.
        series (sequence of [`Series`]): The lines.
        x_label (`str`): What the horizontal axis is.
        note (`str`): A sentence under the title.
        badge (`str`): A few words beside the title.
        is_log (`bool`): A logarithmic vertical axis, where all values are above 0.
        from_zero (`bool`): Whether the vertical axis begins at 0 even where no value does.
        whole_numbers (`bool`): Whether only whole numbers are marked on the vertical axis.

    Returns:
        [`Chart`], or `None` if no series has a point.
    """
    lines = [_thinned(line) for line in series if line.points]
    if not lines:
        return None
    extents = [bound for line in lines for bound in _extents(line)]
    is_log = is_log and min(extents) > 0
    x_scale = _Scale([x for line in lines for x, _ in line.points], whole_numbers=True, has_margin=False)
    y_scale = _Scale(extents + ([0.0] if from_zero and not is_log else []), is_log, whole_numbers, ticks=7)
    notes = [note]
    if any(len(line.points) > MAX_POINTS for line in series):
        notes.append(f"Each point is a mean over several log entries, at most {MAX_POINTS} per line.")
    return Chart(
        title=title,
        x_label=x_label,
        paths=[path for line in lines for path in _paths(line, x_scale, y_scale)],
        x_ticks=[(x_scale.percent(value), short(value)) for value in x_scale.ticks],
        y_ticks=[(100 - y_scale.percent(value), short(value)) for value in y_scale.ticks],
        legend=[{"label": line.label, "color": line.color, "dashed": line.is_dashed} for line in lines],
        data=_data(lines, x_scale, y_scale),
        summary=_summary(title, lines),
        table=_table(lines, x_label),
        note=" ".join(part for part in notes if part),
        badge=badge,
        axis="logarithmic" if is_log else "",
        has_average=any(line.kind == "noisy" and len(line.points) > MANY_POINTS for line in lines),
    )


def short(value: float) -> str:
    """A number with at most four digits, without trailing zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 1000 or float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


# ---- Scales ----


class _Scale:
    """Maps values to the range from 0 to 1, and chooses the values to mark."""

    def __init__(
        self,
        values: Sequence[float],
        is_log: bool = False,
        whole_numbers: bool = False,
        ticks: int = 6,
        has_margin: bool = True,
    ) -> None:
        self.is_log = is_log
        low, high = self._place(min(values)), self._place(max(values))
        if low == high:
            margin = 0.5 if is_log or whole_numbers else abs(low) * 0.1
            low, high = (low - margin, high + margin) if margin else (0.0, 1.0)
        elif has_margin:
            is_at_zero = low == 0 and not is_log
            margin = 0.05 * (high - low)
            low, high = (low if is_at_zero else low - margin), high + margin
        self.low = low
        self.high = high
        self.ticks = self._log_ticks() if is_log else _round_values(low, high, ticks, whole_numbers)

    def _place(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def fraction(self, value: float) -> float:
        return min(1.0, max(0.0, (self._place(value) - self.low) / (self.high - self.low)))

    def percent(self, value: float) -> float:
        return round(100 * self.fraction(value), 2)

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        factors = (1,) if self.high - self.low > 2 else (1, 2, 5)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
        if len(ticks) < 3:  # less than a decade
            return _round_values(10**self.low, 10**self.high, 4, whole_numbers=False)
        return ticks[:: -(-len(ticks) // 6)]


def _round_values(low: float, high: float, count: int, whole_numbers: bool) -> list[float]:
    """About `count` round values between two others."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole_numbers:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


# ---- Lines ----


def _extents(line: Series) -> list[float]:
    """The values that the vertical axis must hold."""
    errors = [error or 0.0 for error in line.errors] if line.errors else [0.0] * len(line.points)
    return [y + sign * error for (_, y), error in zip(line.points, errors, strict=True) for sign in (-1, 1)]


def _thinned(line: Series) -> Series:
    """At most `MAX_POINTS` points: means of neighbors, or of steps and of values with errors some of them."""
    count = len(line.points)
    if count <= MAX_POINTS:
        return line
    every = -(-count // MAX_POINTS)
    if line.kind in ("line", "noisy") and line.errors is None:
        groups = [line.points[start : start + every] for start in range(0, count, every)]
        means = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
        return Series(line.label, means, line.color, None, line.kind, line.is_dashed)
    chosen = sorted({*range(every - 1, count, every), count - 1})
    errors = None if line.errors is None else [line.errors[index] for index in chosen]
    points = [line.points[index] for index in chosen]
    return Series(line.label, points, line.color, errors, line.kind, line.is_dashed)


def _moving_average(points: Points) -> list[tuple[float, float]]:
    """The mean over a centered window of a fifteenth of the points, which is narrower at both ends."""
    half = len(points) // 30
    averages = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = [y for _, y in points[index - reach : index + reach + 1]]
        averages.append((x, sum(near) / len(near)))
    return averages


def _paths(line: Series, x_scale: _Scale, y_scale: _Scale) -> list[dict[str, Any]]:
    """The SVG paths of a series, each with its classes."""

    def place(point: tuple[float, float]) -> str:
        return f"{1000 * x_scale.fraction(point[0]):.1f} {1000 - 1000 * y_scale.fraction(point[1]):.1f}"

    def joined(points: Points) -> str:
        return "M" + "L".join(map(place, points))

    paths = []
    base = f"c{line.color}" + (" dashed" if line.is_dashed else "")
    if line.kind == "steps":
        turns = [(x, y) for (x, _), (_, y) in zip(line.points[1:], line.points, strict=False)]
        corners = [point for pair in zip(line.points, turns, strict=False) for point in pair]
        paths.append({"classes": f"line {base}", "d": joined([*corners, line.points[-1]])})
    elif line.kind == "noisy" and len(line.points) > MANY_POINTS:
        paths.append({"classes": f"line faint {base}", "d": joined(line.points)})
        paths.append({"classes": f"line bold {base}", "d": joined(_moving_average(line.points))})
    else:
        paths.append({"classes": f"line {base}", "d": joined(line.points)})
    for (x, y), error in zip(line.points, line.errors or [], strict=False):
        if error:
            ends = place((x, y - error)), place((x, y + error))
            paths.append({"classes": f"error {base}", "d": f"M{ends[0]}L{ends[1]}"})
    if line.kind == "dots" or len(line.points) == 1:
        # A line of length 0 with a round end is a dot that does not stretch with the chart.
        paths.append({"classes": f"dots {base}", "d": "".join(f"M{place(point)}h0" for point in line.points)})
    return paths


# ---- Values in words ----


def _data(lines: Sequence[Series], x_scale: _Scale, y_scale: _Scale) -> str:
    """The values for the script that shows them under the pointer, as JSON with places from 0 to 1."""
    data = []
    for line in lines:
        errors = line.errors or [None] * len(line.points)
        points = [
            [x, round(x_scale.fraction(x), 4), round(y_scale.fraction(y), 4), _with_error(y, error)]
            for (x, y), error in zip(line.points, errors, strict=True)
        ]
        data.append({"label": line.label, "color": line.color, "points": points})
    return json.dumps(data, separators=(",", ":"))


def _with_error(value: float, error: float | None) -> str:
    return short(value) if error is None else f"{short(value)} ± {short(error)}"


def _summary(title: str, lines: Sequence[Series]) -> str:
    """The chart for those who do not see it."""
    parts = []
    for line in lines:
        values = [y for _, y in line.points]
        parts.append(
            f"{line.label}: {len(values)} values from {short(values[0])} to {short(values[-1])}, lowest "
            f"{short(min(values))}, highest {short(max(values))}."
        )
    return f"{title}. {' '.join(parts)}"


def _table(lines: Sequence[Series], x_label: str) -> list[list[str]]:
    """A header and a row for each x, with a column for each series."""
    columns = []
    for line in lines:
        errors = line.errors or [None] * len(line.points)
        columns.append({x: _with_error(y, error) for (x, y), error in zip(line.points, errors, strict=True)})
    rows = [[short(x), *(column.get(x, "") for column in columns)] for x in sorted({x for c in columns for x in c})]
    return [[x_label, *(line.label for line in lines)], *rows]
