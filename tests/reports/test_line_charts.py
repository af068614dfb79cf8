import json
import math

import pytest

from diffusers_mixgrpo.reports.line_charts import MAX_POINTS, Series, draw, short


def points(*values: float) -> list[tuple[float, float]]:
    return [(float(index), value) for index, value in enumerate(values, start=1)]


def heights(chart, line: int = 0) -> list[float]:
    return [point[2] for point in json.loads(chart.data)[line]["points"]]


@pytest.mark.parametrize(
    "values",
    [
        (1, 2, 3),
        (5,),
        (0, 0),
        (-3, -3, -3),
        (1e-12, 3e-12),
        (1e9, 1e9 + 1),
        (-1e6, 1e6),
        (0.1, 0.1 + 1e-9),
        (1e300, -1e300),
    ],
)
@pytest.mark.parametrize("options", [{}, {"is_log": True}, {"from_zero": True}, {"whole_numbers": True}])
def test_any_values_fit_the_chart(values, options):
    chart = draw("x", [Series("a", points(*values))], **options)
    assert all(0 <= height <= 1 for height in heights(chart))
    order = sorted(range(len(values)), key=lambda index: values[index])
    assert [heights(chart)[index] for index in order] == sorted(heights(chart))
    assert all(0 <= place <= 100 for place, _ in [*chart.x_ticks, *chart.y_ticks])
    assert len(chart.y_ticks) <= 12
    assert not any(word in path["d"] for path in chart.paths for word in ("nan", "inf"))


def test_the_scale_is_linear_or_logarithmic():
    linear = heights(draw("x", [Series("a", points(1, 10, 100))]))
    assert (linear[1] - linear[0]) / (linear[2] - linear[0]) == pytest.approx(9 / 99, abs=1e-3)
    logarithmic = heights(draw("x", [Series("a", points(1, 10, 100))], is_log=True))
    assert logarithmic[1] - logarithmic[0] == pytest.approx(logarithmic[2] - logarithmic[1], abs=1e-3)
    with_zero = draw("x", [Series("a", points(0, 10))], is_log=True)  # has no logarithm
    assert with_zero.axis == "" and heights(with_zero)[0] == 0


def test_ticks_lie_at_their_values():
    chart = draw("x", [Series("a", points(0.2, 0.9))])
    low, high = heights(chart)
    for place, text in chart.y_ticks:
        value = 0.2 + 0.7 * ((100 - place) / 100 - low) / (high - low)
        assert value == pytest.approx(float(text), abs=1e-3)


def test_error_bars_are_inside():
    chart = draw("x", [Series("a", points(0.5, 0.6), errors=[0.3, None], kind="dots")])
    bars = [path["d"] for path in chart.paths if path["classes"].startswith("error")]
    assert len(bars) == 1
    ends = [float(end.split()[1]) for end in bars[0].removeprefix("M").split("L")]
    assert 0 < ends[1] < ends[0] < 1000
    assert chart.table[1:] == [["1", "0.5 ± 0.3"], ["2", "0.6"]]


def test_many_points_are_means_of_neighbors():
    values = [math.sin(index) for index in range(1000)]
    chart = draw("x", [Series("a", points(*values), kind="noisy")])
    series = json.loads(chart.data)[0]["points"]
    assert len(series) == 200 <= MAX_POINTS  # groups of 5
    assert [point[3] for point in series] == [short(sum(values[i : i + 5]) / 5) for i in range(0, 1000, 5)]
    assert "mean over several log entries" in chart.note


def test_steps_turn_where_the_next_value_begins():
    chart = draw("x", [Series("a", points(0, 1), kind="steps")], whole_numbers=True)
    corners = [corner.split() for corner in chart.paths[0]["d"].removeprefix("M").split("L")]
    assert [x for x, _ in corners] == ["0.0", "1000.0", "1000.0"]
    assert corners[0][1] == corners[1][1] != corners[2][1]


def test_series_without_points_are_left_out():
    assert draw("x", [Series("a", [])]) is None
    assert [line["label"] for line in draw("x", [Series("a", []), Series("b", points(1))]).legend] == ["b"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1"), (-0.5, "-0.5"), (0.123456, "0.1235"), (1234.5, "1,234"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5")]
    + [(1e12, "1e+12"), (123456, "123,456"), (-0.00001, "-1e-5")],
)
def test_numbers_in_words(value, text):
    assert short(value) == text
