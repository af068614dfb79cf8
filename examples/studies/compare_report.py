"""The report of `compare_methods.py`: numbers, tables and a figure. Import it with examples/ on `sys.path`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_mixgrpo.commands.figures import plt
from diffusers_mixgrpo.presets import METHOD_NAMES


# Forward passes that a trained step costs: one forward, and a backward through frozen weights that costs as much.
TRAINING_PASSES = 2
# Paul Tol's bright scheme, safe for color-blind readers; markers and line styles distinguish the lines without it.
COLORS = ("#000000", "#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44")
MARKERS = "osD^vPX"
LINE_STYLES = ("-", "--", "-", "-.", ":", "--", "-.")

SETUP = """\
Setup: {seeds}, {iterations} iterations of {prompts} x {num_generations} images, {trained}, \
{machine}. With the same seed, all methods train on the same prompts from the same noise."""

REWARD_NOTE = """\
Rewards are means over {num_eval_prompts} held-out prompts, sampled by the plain ODE sampler with fixed noise. ± is the
standard error over seeds. The standard error over the prompts of one evaluation is {reward_se:.3f}. The fastest method
finishes after {same_time:.0f} s of training; the column for that time compares at equal training time. Fully correct
images match the prompt exactly. Before training, {right_before:.1f}% of the images are fully correct, with
{extra_before:+.2f} extra objects per image. Bold marks the best mean."""

COST_NOTE = """\
*NFE* is the number of steps in the rollout of one image. *Forward passes computed* is the number of transformer
forward passes that were run per image, given that a group shares its prefix. Times are medians over all iterations and
exclude evaluations."""

PHASES_NOTE = """\
Median time per part of an iteration, in seconds. On a busy machine, the CPU time is a fairer measure than the elapsed
time:"""

TUNING_NOTE = """\
Reward on {num_validation_prompts} validation prompts after short runs with a separate seed. No run trains on these
prompts. Bold marks the chosen learning rate. If it is at an edge of the table, a better value may lie outside it."""


# ---- Numbers ----


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The cost and the gain of the runs of one method. Lists have one entry per run, that is, per seed."""
    entries = [entry for run in runs for entry in run["iterations"]]
    summary: dict[str, Any] = {"settings": runs[0]["settings"]}
    for name in ("nfe", "nfe_computed", "steps_trained"):
        summary[name] = float(np.mean([entry[name] for entry in entries]))
    phases = [name for name in entries[0] if name.startswith("time/")]
    for name in ("seconds", "cpu_seconds", *phases):
        summary[name] = float(np.median([entry[name] for entry in entries]))
    for name in ("reward", "toy_reward", "wholly_right", "extra_objects"):
        summary[f"{name}_before"] = [run["evaluations"][0][name] for run in runs]
        summary[f"{name}_after"] = [run["evaluations"][-1][name] for run in runs]
    rewards = zip(summary["reward_before"], summary["reward_after"], strict=True)
    summary["gain"] = [after - before for before, after in rewards]
    summary["reward_se"] = float(np.mean([run["evaluations"][-1]["reward_se"] for run in runs]))
    summary["curve"] = {}
    for name in ("iteration", "seconds", "passes", "reward"):
        summary["curve"][name] = [[point[name] for point in run["evaluations"]] for run in runs]
    return summary


def set_against(summaries: dict[str, dict[str, Any]], reference: str) -> None:
    """Add to each summary the comparison with the reference, if there is one, and with all at equal time."""
    base = summaries.get(reference)
    seconds = {name: np.mean(summary["curve"]["seconds"], axis=0) for name, summary in summaries.items()}
    shortest = min(float(times[-1]) for times in seconds.values())
    for name, summary in summaries.items():
        summary["same_time"] = shortest
        summary["reward_same_time"] = [np.interp(shortest, seconds[name], run) for run in summary["curve"]["reward"]]
        summary["ratio"] = None
        summary["cpu_ratio"] = None
        summary["difference"] = None
        if base is not None:
            summary["ratio"] = summary["seconds"] / base["seconds"]
            summary["cpu_ratio"] = summary["cpu_seconds"] / base["cpu_seconds"]
            pairs = zip(summary["reward_after"], base["reward_after"], strict=True)
            summary["difference"] = [own - other for own, other in pairs]


def time_to_best_of(summaries: dict[str, dict[str, Any]], reference: str) -> dict[str, float | None]:
    """
    The training time in which each method's mean reward reaches the best one of the reference, relative to the
    reference's own. `None` if it never does. Between two evaluations, rewards are interpolated.
    """
    curves = {name: np.mean(summary["curve"]["reward"], axis=0) for name, summary in summaries.items()}
    times = {name: np.mean(summary["curve"]["seconds"], axis=0) for name, summary in summaries.items()}
    goal = curves[reference].max()
    own = times[reference][curves[reference].argmax()]
    found: dict[str, float | None] = {}
    for name, curve in curves.items():
        later = np.flatnonzero(curve >= goal)
        found[name] = None
        if len(later) and later[0] > 0:
            span = slice(later[0] - 1, later[0] + 1)
            found[name] = float(np.interp(goal, curve[span], times[name][span]) / own)
    return found


def standard_error(values: Any) -> Any:
    """Along the first axis; 0 for a single value."""
    return np.std(values, axis=0, ddof=min(1, len(values) - 1)) / len(values) ** 0.5


def best_of(scores: dict[float, float]) -> float:
    """The learning rate with the best score; the first one of equals."""
    return max(scores, key=scores.__getitem__)


# ---- Tables ----


def in_markdown(results: dict[str, Any]) -> str:
    """`results.md`: the setup, rewards, cost, settings, and the choice of the learning rate."""
    summaries = results["summaries"]
    shared = results["shared"]
    some = next(iter(summaries.values()))
    images = shared["per_device_train_batch_size"] * shared["steps_per_generation"]
    facts = shared | some
    facts["machine"] = results["machine"]
    facts["prompts"] = _count(images // shared["num_generations"], "prompt")
    facts["trained"] = f"LoRA of rank {facts['lora_rank']}" if facts["lora_rank"] else "all weights trained"
    facts["seeds"] = _count(len(some["gain"]), "seed")
    facts["right_before"] = 100 * np.mean(some["wholly_right_before"])
    facts["extra_before"] = np.mean(some["extra_objects_before"])
    has_reference = results["reference"] in summaries
    reference = title(results["reference"]) if has_reference else None
    parts = [
        f"```bash\npython examples/studies/compare_methods.py {results['command']}".rstrip() + "\n```",
        SETUP.format(**facts),
        "## Held-out reward",
        REWARD_NOTE.format(**facts),
        reward_table(summaries, reference),
        *_along_the_run(summaries, results["reference"]),
        "![Held-out reward against training time and against forward passes](results.png)",
        "## Cost",
        COST_NOTE,
        cost_table(summaries, reference),
        PHASES_NOTE,
        phases_table(summaries, reference),
        "## Settings",
        "These settings differ from the presets and from the shared configuration.",
        settings_table(summaries, shared),
    ]
    if any(results["tuning"].values()):
        parts += [
            "## Choice of the learning rate",
            TUNING_NOTE.format(**facts),
            tuning_table(results["tuning"]),
        ]
    return "\n\n".join(parts) + "\n"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def reward_table(summaries: dict[str, dict[str, Any]], reference: str | None) -> str:
    some = next(iter(summaries.values()))
    columns = {
        "Reward before": [plus_minus(summary["reward_before"]) for summary in summaries.values()],
        "Reward after": _means(summaries, "reward_after"),
        f"Reward after {some['same_time']:.0f} s": _means(summaries, "reward_same_time"),
    }
    if reference is not None:
        columns[f"Change vs. {reference}"] = _means(summaries, "difference", "+.3f")
    if any(summary["toy_reward_after"] != summary["reward_after"] for summary in summaries.values()):
        columns["True reward"] = _means(summaries, "toy_reward_after")
    columns["Fully correct images (%)"] = _means(summaries, "wholly_right_after", ".1f", scale=100)
    columns["Extra objects per image"] = [f"{np.mean(s['extra_objects_after']):+.2f}" for s in summaries.values()]
    return table(summaries, columns)


def _along_the_run(summaries: dict[str, dict[str, Any]], reference: str) -> list[str]:
    """The rewards of all evaluations, if they are few, and when each method reaches the best one of the reference."""
    some = next(iter(summaries.values()))["curve"]["iteration"][0]
    if not 3 <= len(some) <= 8:
        return []
    columns = {}
    for index, iteration in enumerate(some[1:], 1):
        values = [np.array([run[index] for run in summary["curve"]["reward"]]) for summary in summaries.values()]
        means = [f"{value.mean():.3f}" for value in values]
        columns[f"After {iteration:g}"] = _with_bold([plus_minus(value) for value in values], means, max)
    if reference in summaries:
        times = time_to_best_of(summaries, reference).values()
        columns[f"Time to the best reward of {title(reference)}"] = [
            "never" if time is None else f"{time:.2f}" for time in times
        ]
    return ["### Along the run", "Held-out reward by iterations.", table(summaries, columns)]


def cost_table(summaries: dict[str, dict[str, Any]], reference: str | None) -> str:
    columns = {
        "NFE": _numbers(summaries, "nfe", ".4g"),
        "Forward passes computed": _numbers(summaries, "nfe_computed", ".4g"),
        "Steps trained": _numbers(summaries, "steps_trained", ".4g"),
        "Time (s/iteration)": _numbers(summaries, "seconds", ".2f"),
    }
    if reference is not None:
        columns[f"Time relative to {reference}"] = _numbers(summaries, "ratio", ".2f")
    return table(summaries, columns)


def phases_table(summaries: dict[str, dict[str, Any]], reference: str | None) -> str:
    some = next(iter(summaries.values()))
    columns = {}
    for name in some:
        if name.startswith("time/"):
            phase = name.removeprefix("time/").capitalize()
            columns[f"{phase} (s)"] = _numbers(summaries, name, ".2f")
    columns["Total CPU time (s)"] = _numbers(summaries, "cpu_seconds", ".2f")
    if reference is not None:
        columns[f"CPU time relative to {reference}"] = _numbers(summaries, "cpu_ratio", ".2f")
    return table(summaries, columns)


def settings_table(summaries: dict[str, dict[str, Any]], shared: dict[str, Any]) -> str:
    columns = {
        "Settings": [changes(summary["settings"], shared) for summary in summaries.values()],
        "Gain by seed": [" ".join(f"{gain:+.3f}" for gain in summary["gain"]) for summary in summaries.values()],
    }
    return table(summaries, columns)


def tuning_table(tuning: dict[str, dict[float, float]]) -> str:
    """One column per learning rate; the chosen one of each method is bold."""
    columns: dict[str, list[str]] = {}
    for scores in tuning.values():
        best = best_of(scores)
        for rate, score in scores.items():
            cell = f"**{score:.3f}**" if rate == best else f"{score:.3f}"
            columns.setdefault(f"{rate:g}", []).append(cell)
    return table(tuning, columns)


def table(names: Sequence[str] | dict[str, Any], columns: dict[str, list[str]]) -> str:
    """A Markdown table with one row per name."""
    rows = [["Method", *columns], ["---"] * (1 + len(columns))]
    for row, name in enumerate(names):
        rows.append([title(name), *(cells[row] for cells in columns.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def title(name: str) -> str:
    """The name of a variant for readers: `mixgrpo-flash, exact` is MixGRPO-Flash, exact."""
    preset, *option = name.split(", ", 1)
    return ", ".join([METHOD_NAMES.get(preset, preset), *option])


def changes(settings: dict[str, Any], shared: dict[str, Any]) -> str:
    """The settings of a run that differ from its preset and from the shared ones."""
    texts = []
    for name, value in settings.items():
        is_own = name == "learning_rate" or shared.get(name) != value
        if is_own and name not in ("preset", "seed"):
            texts.append(f"`{name}={value:g}`" if isinstance(value, float) else f"`{name}={value}`")
    return ", ".join(texts)


def plus_minus(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and, of several values, their standard error."""
    mean = f"{np.mean(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {standard_error(values):{form.removeprefix('+')}}"


def _means(summaries: dict[str, dict[str, Any]], key: str, form: str = ".3f", scale: float = 1) -> list[str]:
    """The mean over seeds of each method, the highest ones in bold."""
    values = [scale * np.array(summary[key]) for summary in summaries.values()]
    return _with_bold([plus_minus(v, form) for v in values], [f"{v.mean():{form}}" for v in values], max)


def _numbers(summaries: dict[str, dict[str, Any]], key: str, form: str) -> list[str]:
    """A cost of each method, the lowest ones in bold."""
    cells = [f"{summary[key]:{form}}" for summary in summaries.values()]
    return _with_bold(cells, cells, min)


def _with_bold(cells: list[str], numbers: list[str], best_of_numbers: Any) -> list[str]:
    """The cells with the best of the rounded numbers in bold, unless all are equal."""
    if len(set(numbers)) < 2:
        return cells
    best = best_of_numbers(float(number) for number in numbers)
    return [f"**{cell}**" if float(number) == best else cell for cell, number in zip(cells, numbers, strict=True)]


# ---- Figure ----


def draw(summaries: dict[str, dict[str, Any]], file: Path) -> None:
    """Held-out reward against the time and against the forward passes of training: mean and standard error."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), sharey=True, layout="constrained")
    for axis, quantity, unit in zip(axes, ("seconds", "passes"), (1, 1000), strict=True):
        for index, (name, summary) in enumerate(summaries.items()):
            x = np.mean(summary["curve"][quantity], axis=0) / unit
            rewards = np.array(summary["curve"]["reward"])
            mean = rewards.mean(axis=0)
            error = standard_error(rewards)
            style = index % len(COLORS)
            axis.plot(
                x,
                mean,
                label=title(name),
                color=COLORS[style],
                marker=MARKERS[style],
                linestyle=LINE_STYLES[style],
                markersize=4,
            )
            axis.fill_between(x, mean - error, mean + error, color=COLORS[style], alpha=0.15, linewidth=0)
        axis.grid(alpha=0.3)
    axes[0].set_title("Reward by training time")
    axes[0].set_ylabel("held-out reward")
    axes[0].set_xlabel("training time (s)")
    axes[1].set_title("Reward by forward passes")
    axes[1].set_xlabel("forward passes (thousands): rollout, and those that training costs")
    columns = 5 if max(map(len, summaries)) < 20 else 3
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
