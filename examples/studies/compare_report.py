"""What `compare_methods.py` writes of its runs: numbers, tables, and a figure."""

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


# Forward passes that a trained step is worth: one forward, and a backward through frozen weights that costs as much.
TRAINING_PASSES = 2
# Paul Tol's bright scheme, safe for the colour-blind; markers and line styles tell the lines apart without it.
COLOURS = ("#000000", "#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44")
MARKERS, LINES = "osD^vPX", ("-", "--", "-", "-.", ":", "--", "-.")

EXPLANATION = """\
{seeds}, {iterations} iterations of {prompts} prompts x {num_generations} images, LoRA of rank {lora_rank}, {machine}.
Rewards are means over {num_eval_prompts} held-out prompts, drawn by the plain ODE sampler with fixed noise. ± is the
standard error over seeds; over the prompts of one evaluation it is {reward_se:.3f}. With the same seed all train on
the same prompts from the same noise. *NFE* counts the steps of one picture's rollout, *computed* the transformer
passes that were run for it, a group sharing its prefix. Seconds are the median over all iterations, evaluations left
out. *Same time* is the reward after {same_time:.0f} s of training, when the quickest ends. Beside the presets:"""


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs of one method cost and gained; lists have an entry per run, that is per seed."""
    entries = [entry for run in runs for entry in run["iterations"]]
    summary: dict[str, Any] = {"settings": runs[0]["settings"]}
    summary |= {name: float(np.mean([e[name] for e in entries])) for name in ("nfe", "nfe_computed", "steps_trained")}
    times = ["seconds", "cpu_seconds", *(name for name in entries[0] if name.startswith("time/"))]
    summary |= {name: float(np.median([e[name] for e in entries])) for name in times}
    for name in ("reward", "wholly_right", "extra_objects"):
        summary |= {f"{name}_before": [run["evaluations"][0][name] for run in runs]}
        summary |= {f"{name}_after": [run["evaluations"][-1][name] for run in runs]}
    summary["gain"] = [b - a for a, b in zip(summary["reward_before"], summary["reward_after"], strict=True)]
    summary["reward_se"] = float(np.mean([run["evaluations"][-1]["reward_se"] for run in runs]))
    names = ("iteration", "seconds", "passes", "reward")
    curve = {name: [[point[name] for point in run["evaluations"]] for run in runs] for name in names}
    return summary | {"curve": curve}


def set_against(summaries: dict[str, dict], reference: str) -> None:
    """Add to each summary how it compares with the reference, if that is there, and with all in the same time."""
    base = summaries.get(reference)
    seconds = {name: np.mean(summary["curve"]["seconds"], axis=0) for name, summary in summaries.items()}
    shortest = min(float(times[-1]) for times in seconds.values())
    for name, summary in summaries.items():
        summary["same_time"] = shortest
        summary["reward_same_time"] = [np.interp(shortest, seconds[name], run) for run in summary["curve"]["reward"]]
        summary["ratio"] = summary["cpu_ratio"] = summary["difference"] = None
        if base is not None:
            summary["ratio"] = summary["seconds"] / base["seconds"]
            summary["cpu_ratio"] = summary["cpu_seconds"] / base["cpu_seconds"]
            pairs = zip(summary["reward_after"], base["reward_after"], strict=True)
            summary["difference"] = [own - other for own, other in pairs]


def in_markdown(results: dict[str, Any]) -> str:
    """`results.md`: what was run, the comparison, where the time goes, and the tuning."""
    summaries, shared, reference = results["summaries"], results["shared"], results["reference"]
    some = next(iter(summaries.values()))
    images = shared["per_device_train_batch_size"] * shared["steps_per_generation"]
    facts = shared | some | {"machine": results["machine"], "prompts": images // shared["num_generations"]}
    facts["seeds"] = f"{len(some['gain'])} seed" + ("s" if len(some["gain"]) > 1 else "")
    header = ["", "NFE", "computed", "steps trained", "s / iteration", f"ratio to {reference}", "reward before"]
    header += ["after", "same time", "gain by seed", f"after, less {reference}", "wholly right", "objects too many"]
    parts = [
        f"```bash\npython examples/compare_methods.py {results['command']}".rstrip() + "\n```",
        EXPLANATION.format(**facts),
        "\n".join(f"- {name}: {changes(summary['settings'], shared)}" for name, summary in summaries.items()),
        table(header, [[name, *cells(summary)] for name, summary in summaries.items()]),
        "![Held-out reward against training time and against transformer passes](results.png)",
        "Where the time of an iteration goes, in seconds (median). On a busy machine CPU time is the fairer one:",
    ]
    phases = [name for name in some if name.startswith("time/")]
    columns = {name: name.removeprefix("time/") for name in phases} | {"cpu_seconds": "CPU time of all"}
    if reference in summaries:
        columns["cpu_ratio"] = f"its ratio to {reference}"
    rows = [[n, *(f"{s[name]:.2f}" for name in columns)] for n, s in summaries.items()]
    parts.append(table(["", *columns.values()], rows))
    if any(results["tuning"].values()):
        parts += [
            f"How the learning rates were chosen: reward on {shared['num_validation_prompts']} validation prompts, on "
            "which nothing is trained, after short runs with a seed of their own. The one in bold was taken; at an "
            "edge of the table a better one may lie beyond.",
            tuning_table(results["tuning"]),
        ]
    return "\n\n".join(parts) + "\n"


def cells(summary: dict[str, Any]) -> list[str]:
    """A row of the comparison."""
    right = [100 * np.array(summary[f"wholly_right_{when}"]) for when in ("before", "after")]
    extra = [np.mean(summary[f"extra_objects_{when}"]) for when in ("before", "after")]
    return [
        *(f"{summary[name]:.4g}" for name in ("nfe", "nfe_computed", "steps_trained")),
        f"{summary['seconds']:.2f}",
        "" if summary["ratio"] is None else f"{summary['ratio']:.2f}",
        *(plus_minus(summary[f"reward_{when}"]) for when in ("before", "after", "same_time")),
        " ".join(f"{gain:+.3f}" for gain in summary["gain"]),
        "" if summary["difference"] is None else plus_minus(summary["difference"], "+.3f"),
        f"{right[0].mean():.1f}% to {plus_minus(right[1], '.1f')}%",
        f"{extra[0]:+.2f} to {extra[1]:+.2f}",
    ]


def draw(summaries: dict[str, dict], file: Path) -> None:
    """Held-out reward against the time and against the passes of training: mean and standard error over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for axis, over, unit in zip(axes, ("seconds", "passes"), (1, 1000), strict=True):
        for index, (name, summary) in enumerate(summaries.items()):
            x = np.mean(summary["curve"][over], axis=0) / unit
            rewards = np.array(summary["curve"]["reward"])
            y, error = rewards.mean(axis=0), standard_error(rewards)
            index %= len(COLOURS)
            style = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": LINES[index], "markersize": 4}
            axis.plot(x, y, label=name, **style)
            axis.fill_between(x, y - error, y + error, color=COLOURS[index], alpha=0.15, linewidth=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out reward")
    axes[0].set_xlabel("training time in s, without evaluations")
    axes[1].set_xlabel(f"thousand passes of an image: rollout, and {TRAINING_PASSES} per trained step")
    columns = 5 if max(map(len, summaries)) < 20 else 3
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


# ---- Small things ----


def changes(settings: dict[str, Any], shared: dict[str, Any]) -> str:
    """What a run has beside its preset and what all share, in words."""
    own = {k: v for k, v in settings.items() if k == "learning_rate" or shared.get(k) != v}
    own = {k: v for k, v in own.items() if k not in ("preset", "seed")}
    return ", ".join(f"`{k}={v:g}`" if isinstance(v, float) else f"`{k}={v}`" for k, v in own.items())


def plus_minus(values: Any, form: str = ".3f") -> str:
    """Mean, and if there are several, their standard error."""
    error = f" ± {standard_error(values):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{error}"


def standard_error(values: Any) -> Any:
    """Along the first axis; 0 for a single value."""
    return np.std(values, axis=0, ddof=min(1, len(values) - 1)) / len(values) ** 0.5


def best_of(scores: dict[float, float]) -> float:
    """The learning rate with the best score; of equal ones the first that was given."""
    return max(scores, key=scores.__getitem__)


def tuning_table(tuning: dict[str, dict[float, float]]) -> str:
    rows = []
    for name, scores in tuning.items():
        best = best_of(scores)
        rows.append(
            [name, *(f"**{score:.3f}**" if rate == best else f"{score:.3f}" for rate, score in scores.items())]
        )
    return table(["", *(f"{rate:g}" for rate in next(iter(tuning.values())))], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
