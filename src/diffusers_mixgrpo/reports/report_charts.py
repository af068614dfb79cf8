"""The charts of a report, of one run or of two over each other."""

from collections.abc import Sequence
from typing import Any

from .line_charts import Chart, Series, draw, short
from .logged_run import LoggedRun
from .run_findings import Evaluation, evaluation_label, evaluation_names, evaluations, reward_weights


MAX_REWARDS = 12
PHASES = 6
"""Colors for the phases of an iteration."""


def labeled(run_index: int, label: str, runs: Sequence[LoggedRun]) -> str:
    """A label of a line, with the letter of its run where there are two."""
    return label if len(runs) == 1 else f"{'AB'[run_index]}, {label}"


def reward_charts(runs: Sequence[LoggedRun]) -> list[Chart]:
    """The weighted reward in training and on held-out prompts."""
    lines = []
    for index, run in enumerate(runs):
        label = labeled(index, "training prompts", runs)
        lines.append(Series(label, run.series("reward"), color=2 * index, kind="noisy"))
        for number, prefix in enumerate(evaluation_names(run)):
            color = (1 + number if len(runs) == 1 else 2 * index + 1) % 6
            label = labeled(index, evaluation_label(prefix), runs)
            lines.append(_evaluation_series(label, evaluations(run, prefix), color, is_dashed=number > 0))
    note = "Training: the mixed ODE-SDE sampler. Held-out: the deterministic sampler, fixed seeds, ± standard error."
    return _present([draw("Reward", lines, note=note)])


def charts_by_reward(runs: Sequence[LoggedRun]) -> list[Chart]:
    """A small chart for each reward, which says whether it is trained on."""
    names = list(dict.fromkeys(name for run in runs for name in reward_weights(run)))
    charts = []
    for name in names[:MAX_REWARDS]:
        lines = []
        for index, run in enumerate(runs):
            label = labeled(index, "training prompts", runs)
            lines.append(Series(label, run.series(f"rewards/{name}/mean"), color=2 * index, kind="noisy"))
            for number, prefix in enumerate(evaluation_names(run)):
                values = run.series(f"{prefix}_rewards/{name}/mean")
                color = (1 + number if len(runs) == 1 else 2 * index + 1) % 6
                label = labeled(index, evaluation_label(prefix), runs)
                lines.append(Series(label, values, color=color, kind="dots", is_dashed=number > 0))
        charts.append(draw(name, lines, badge=_reward_badge(name, runs)))
    return _present(charts)


def _reward_badge(name: str, runs: Sequence[LoggedRun]) -> str:
    texts = [_weight_in_words(reward_weights(run).get(name, 0.0)) for run in runs]
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(labeled(index, text, runs) for index, text in enumerate(texts))


def _weight_in_words(weight: float | None) -> str:
    if weight is None:
        return "weight not recorded"
    return f"trained, weight {short(round(weight, 3))}" if weight else "never trained on"


def _evaluation_series(label: str, found: Sequence[Evaluation], color: int, is_dashed: bool) -> Series:
    points = [(float(evaluation.step), evaluation.mean) for evaluation in found]
    errors = [evaluation.error for evaluation in found]
    return Series(label, points, color, errors, kind="dots", is_dashed=is_dashed)


def window_charts(runs: Sequence[LoggedRun]) -> list[Chart]:
    """The first and the last step of the window over the run."""
    lines = []
    for index, run in enumerate(runs):
        sizes = dict(run.series("window/size"))
        starts = run.series("window/start")
        ends = [(step, start + sizes[step] - 1) for step, start in starts if step in sizes]
        first, last = labeled(index, "first step", runs), labeled(index, "last step", runs)
        lines.append(Series(first, starts, color=2 * index, kind="steps"))
        lines.append(Series(last, ends, color=2 * index + 1, kind="steps", is_dashed=True))
    note = "The denoising steps that are stochastic and trained lie between the two lines."
    return _present([draw("Place of the window", lines, note=note, from_zero=True, whole_numbers=True)])


def optimization_charts(runs: Sequence[LoggedRun]) -> list[Chart]:
    """Gradient norm, clipping, and the spread of the rewards, over the run."""
    return _present(
        [
            _metric_chart(runs, "grad_norm", "Gradient norm", "Before clipping.", is_log=True),
            _metric_chart(runs, "clip_ratio/region_mean", "Share of clipped transitions", from_zero=True),
            _metric_chart(runs, "reward_std", "Reward spread", "Standard deviation within groups.", from_zero=True),
            _metric_chart(
                runs, "frac_reward_zero_std", "Groups without a signal", "All images have one reward.", from_zero=True
            ),
            _metric_chart(runs, "kl", "KL divergence from the reference", from_zero=True),
            _metric_chart(runs, "learning_rate", "Learning rate", kind="line", from_zero=True),
        ]
    )


def charts_by_window(runs: Sequence[LoggedRun]) -> list[Chart]:
    """Gradient norm, clipping and reward spread by the place of the window, if it moved."""
    metrics = {
        "grad_norm": "Gradient norm",
        "clip_ratio": "Share of clipped transitions",
        "reward_std": "Reward spread",
    }
    charts = []
    for metric, title in metrics.items():
        found = [run.by_window(metric) for run in runs]
        if max(map(len, found)) < 2:
            continue
        lines = []
        for index, points in enumerate(found):
            label, color = ("mean over the run", 0) if len(runs) == 1 else ("AB"[index], 2 * index + 1)
            lines.append(Series(label, points, color=color, kind="dots"))
        is_log = metric == "grad_norm"
        chart = draw(title, lines, "first step of the window", is_log=is_log, from_zero=not is_log)
        charts.append(chart)
    return _present(charts)


def nfe_charts(runs: Sequence[LoggedRun]) -> list[Chart]:
    """Steps of a rollout, and the forward passes that were computed for an image."""
    lines = []
    for index, run in enumerate(runs):
        lines.append(Series(labeled(index, "steps of a rollout", runs), run.series("nfe"), 2 * index, kind="steps"))
        computed = labeled(index, "forward passes computed", runs)
        lines.append(Series(computed, run.series("nfe_amortized"), 2 * index + 1, kind="steps", is_dashed=True))
    note = "Steps before the window are computed once per group where its images share their noise."
    return _present([draw("Forward passes per image", lines, note=note, from_zero=True)])


def phases(run: LoggedRun) -> list[dict[str, Any]]:
    """The mean seconds per iteration of each phase, the longest first, with their share of all."""
    seconds = {}
    for name in run.names(r"time/.+"):
        values = [value for _, value in run.series(name)]
        seconds[name.removeprefix("time/")] = sum(values) / len(values)
    total = sum(seconds.values())
    if total <= 0:
        return []
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [
        {"name": name, "seconds": value, "share": value / total, "color": number % PHASES}
        for number, (name, value) in enumerate(ordered)
    ]


def _metric_chart(
    runs: Sequence[LoggedRun], metric: str, title: str, note: str = "", kind: str = "noisy", **options: bool
) -> Chart | None:
    lines = []
    for index, run in enumerate(runs):
        label, color = (title.lower(), 0) if len(runs) == 1 else ("AB"[index], 2 * index + 1)
        lines.append(Series(label, run.series(metric), color=color, kind=kind))
    return draw(title, lines, note=note, **options)  # type: ignore[arg-type]  # flags of `draw`


def _present(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]
