"""[`warnings`]: what to look into in a run, in words."""

import re
from collections.abc import Sequence

from .line_charts import short
from .logged_run import LoggedRun, as_number
from .run_findings import (
    Change,
    evaluation_label,
    evaluation_names,
    evaluations,
    is_finished,
    reward_weights,
    total_steps,
)


HIGH_CLIP_SHARE = 0.5
HIGH_SHARE_WITHOUT_SIGNAL = 0.8
HIGH_SHARE_OF_LOGS = 0.25
"""What is too high in more than this share of the log entries is worth a warning."""
MAX_WARNINGS = 12


def warnings(run: LoggedRun) -> list[str]:
    """What to look into, each in words; the gravest first."""
    found = [
        *_state_warnings(run),
        *_alarm_warnings(run),
        *_reward_warnings(run),
        *_number_warnings(run),
        *_signal_warnings(run),
    ]
    rest = len(found) - MAX_WARNINGS
    return found if rest <= 0 else [*found[:MAX_WARNINGS], f"{rest} more warnings are not shown."]


def _state_warnings(run: LoggedRun) -> list[str]:
    total = total_steps(run)
    of_total = "" if total is None else f" of {total}"
    if not is_finished(run):
        return [f"The run is unfinished: its logs end at step {run.last_step}{of_total}."]
    done = as_number(run.summary.get("optimizer_steps"))
    if done is not None and run.history and run.last_step != int(done):
        return [
            f"The logs end at step {run.last_step}, but the summary is that of a run of {int(done)} steps: the files "
            "of the folder may come from several runs."
        ]
    if total is not None and run.history and run.last_step < total:
        return [f"The training stopped early, at step {run.last_step}{of_total}."]
    return []


def _alarm_warnings(run: LoggedRun) -> list[str]:
    """An alarm of the guard against reward hacking, with what the evaluations said then."""
    found = []
    for name in run.names(r"eval(_.+)?_alarms"):
        alarms = [(step, value) for step, value in run.series(name) if value > 0]
        if not alarms:
            continue
        prefix = name.removesuffix("_alarms")
        steps = ", ".join(str(int(step)) for step, _ in alarms[:8]) + (", ..." if len(alarms) > 8 else "")
        last = int(alarms[-1][0])
        found.append(
            f"The reward may have been exploited: the hacking guard raised alarms in {_count(alarms, 'evaluation')}, "
            f"after {'step' if len(alarms) == 1 else 'steps'} {steps}. From the first evaluation to step {last}: "
            f"{_changes_at(run, prefix, last)}. Look at the images."
        )
    return found


def _changes_at(run: LoggedRun, prefix: str, step: float) -> str:
    """How what the guard compares moved from the first evaluation to another one."""
    untrained = [name for name, weight in reward_weights(run).items() if weight == 0]
    names = {f"{prefix}_reward": "held-out reward"}
    names |= {f"{prefix}_rewards/{name}/mean": f"{name} (never trained on)" for name in untrained}
    names |= {name: name.split("_images/")[1] for name in run.names(rf"{re.escape(prefix)}_images/.+")}
    parts = []
    for name, label in names.items():
        values = dict(run.series(name))
        if step not in values:
            continue
        before, after = short(next(iter(values.values()))), short(values[step])
        if before != after:
            parts.append(f"{label} {before} → {after}")
    return "; ".join(parts) or "the numbers are not in the logs"


def _reward_warnings(run: LoggedRun) -> list[str]:
    found = []
    for prefix in evaluation_names(run):
        series = evaluations(run, prefix)
        if len(series) < 2:
            continue
        label = evaluation_label(prefix)
        best = max(series, key=lambda evaluation: evaluation.mean)
        from_first, from_best = Change(series[0], series[-1]), Change(best, series[-1])
        if from_first.verdict == "loss":
            found.append(f"The reward on {label} fell below its start: {series[0]} → {series[-1]}.")
        elif from_best.verdict == "loss":
            found.append(
                f"The reward on {label} fell after step {best.step}, from {best} to {series[-1]}. A checkpoint from "
                "then may be better."
            )
    return found


def _number_warnings(run: LoggedRun) -> list[str]:
    found = []
    steps = [step for step, share in run.series("nonfinite/steps") if share > 0]
    if steps:
        found.append(
            f"Gradients were infinite or NaN in {_count(steps)}, first at step {int(steps[0])}; these "
            "optimizer steps were dropped. Lower the learning rate, or use bf16 instead of fp16."
        )
    images = [step for step, count in run.series("nonfinite/images") if count > 0]
    if images:
        found.append(f"Images were infinite or NaN in {_count(images)}, first at step {int(images[0])}.")
    for name in run.names(r"(eval(_.+?)?_)?rewards/.+/failed"):
        failures = [(step, count) for step, count in run.series(name) if count > 0]
        if failures:
            where = _count(failures, "evaluation" if name.startswith("eval") else "log entry")
            reward = name.split("rewards/", 1)[1].removesuffix("/failed")
            step, worst = max(failures, key=lambda failure: failure[1])
            found.append(
                f"{reward} could not score all images in {where}: up to {short(worst)} images at "
                f"step {int(step)}. They were left out."
            )
    return found


def _signal_warnings(run: LoggedRun) -> list[str]:
    found = []
    clipped = _share_above(run.series("clip_ratio/region_mean"), HIGH_CLIP_SHARE)
    if clipped > HIGH_SHARE_OF_LOGS:
        found.append(
            f"More than {HIGH_CLIP_SHARE:.0%} of the transitions were clipped in {clipped:.0%} of the log entries. "
            "`epsilon` may be too small for the image size, or the learning rate too high."
        )
    places = [place for place, share in run.by_window("clip_ratio") if share > HIGH_CLIP_SHARE]
    if places and not found:
        shown = ", ".join(str(int(place)) for place in places)
        found.append(
            f"More than {HIGH_CLIP_SHARE:.0%} of the transitions are clipped where the window starts at step {shown}."
        )
    flat = _share_above(run.series("frac_reward_zero_std"), HIGH_SHARE_WITHOUT_SIGNAL)
    if flat > HIGH_SHARE_OF_LOGS:
        found.append(
            f"In more than {HIGH_SHARE_WITHOUT_SIGNAL:.0%} of the groups all images had the same reward, in "
            f"{flat:.0%} of the log entries: such groups teach nothing. Use harder prompts or a finer reward."
        )
    epsilon = as_number(run.settings.get("epsilon"))
    deviation = max((value for _, value in run.series("ratio/on_policy_max_deviation")), default=0.0)
    if epsilon is not None and run.settings.get("loss_type") == "grpo" and deviation > epsilon:
        found.append(
            f"Before the first update of an iteration the ratio deviated from 1 by up to {short(deviation)}, more "
            f"than the clip range `epsilon={short(epsilon)}`: rounding alone clips."
        )
    return found


def _count(items: Sequence[object], noun: str = "log entry") -> str:
    """The number of items, with the noun in its right form."""
    if len(items) == 1:
        return f"1 {noun}"
    return f"{len(items)} {noun.removesuffix('y')}ies" if noun.endswith("y") else f"{len(items)} {noun}s"


def _share_above(series: Sequence[tuple[float, float]], limit: float) -> float:
    """The share of the values of a series that are above a limit."""
    return sum(value > limit for _, value in series) / len(series) if series else 0.0
