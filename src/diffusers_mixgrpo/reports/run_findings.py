"""What a run's logs say, in words: whether the reward rose on held-out prompts, and what to look into."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .line_charts import short
from .run_folder import RunFolder, as_list, as_number, as_object


NOISE = 2
"""A change of less than this many standard errors of the difference is called noise."""
HIGH_CLIP_SHARE = 0.5
HIGH_SHARE_WITHOUT_SIGNAL = 0.8
MAX_WARNINGS = 12


# ---- Evaluations ----


@dataclass(frozen=True)
class Evaluation:
    """A held-out reward: its mean and, where known, its standard error and the number of prompts."""

    step: int
    mean: float
    error: float | None
    count: int | None

    def __str__(self) -> str:
        return short(self.mean) if self.error is None else f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Change:
    """The difference of two evaluations."""

    before: Evaluation
    after: Evaluation

    @property
    def difference(self) -> float:
        return self.after.mean - self.before.mean

    @property
    def errors(self) -> float | None:
        """
        The difference in its standard errors; `None` if these are not known or 0.

        The errors add up as those of independent samples. Prompts and seeds are the same, so they are too large rather
        than too small.
        """
        if self.before.error is None or self.after.error is None:
            return None
        error = math.hypot(self.before.error, self.after.error)
        return self.difference / error if error > 0 else None

    @property
    def verdict(self) -> str:
        """`"gain"`, `"loss"`, `"noise"`, or `"unknown"` without standard errors."""
        if self.errors is None:
            return "unknown"
        if abs(self.errors) < NOISE:
            return "noise"
        return "gain" if self.errors > 0 else "loss"


def evaluation_names(run: RunFolder) -> list[str]:
    """
    The first parts of the names of the evaluations' metrics: `"eval"` alone, or one for each dataset, and those of the
    moving average of the weights.
    """
    names = [name.removesuffix("_reward") for name in run.names(r"eval(_.+)?_reward")]
    if not names and as_number(run.summary.get("reward_before")) is not None:
        names = ["eval"]
    return names


def is_average(prefix: str) -> bool:
    """Whether an evaluation is that of the moving average of the weights."""
    return prefix.endswith("_ema")


def evaluation_label(prefix: str) -> str:
    """The name of an evaluation for people."""
    dataset = prefix.removeprefix("eval").removesuffix("_ema").strip("_")
    label = f"held-out prompts ({dataset})" if dataset else "held-out prompts"
    return f"{label}, moving average of the weights" if is_average(prefix) else label


def evaluations(run: RunFolder, prefix: str = "eval") -> list[Evaluation]:
    """
    The evaluations of a run by step.

    Those before and after training that only the summary has are added to those of the logs.
    """
    count = _prompt_count(run, prefix)
    found = {}
    for entry in run.history:
        mean = entry.get(f"{prefix}_reward")
        if mean is not None:
            error = entry.get(f"{prefix}_reward_se")
            found[int(entry["step"])] = Evaluation(int(entry["step"]), mean, error, count)
    if prefix == "eval":
        last = as_number(run.summary.get("optimizer_steps"))
        for when, step in (("before", 0), ("after", run.last_step if last is None else int(last))):
            mean = as_number(run.summary.get(f"reward_{when}"))
            if mean is not None and step not in found:
                error = as_number(run.summary.get(f"reward_{when}_se"))
                found[step] = Evaluation(step, mean, error, count)
    return [found[step] for step in sorted(found)]


def _prompt_count(run: RunFolder, prefix: str) -> int | None:
    """The number of held-out prompts, if something tells it."""
    own = prefix.removesuffix("_ema")
    count = as_number(run.summary.get("eval_prompts")) if own == "eval" else None
    if count:
        return int(count)
    guard = as_object(as_object(run.state.get("stateful_callbacks")).get("HackingGuard"))
    baselines = as_object(as_object(guard.get("attributes")).get("baselines"))
    baseline = as_list(as_object(baselines.get(own)).get("reward"))
    if len(baseline) == 3 and (count := as_number(baseline[2])):
        return int(count)
    return _count_from_errors(run, prefix)


def _count_from_errors(run: RunFolder, prefix: str) -> int | None:
    """With one trained reward the standard error is its standard deviation over the square root of the number."""
    weighted = [name for name, weight in reward_weights(run).items() if weight]
    if len(weighted) != 1:
        return None
    for entry in run.history:
        std = entry.get(f"{prefix}_rewards/{weighted[0]}/std")
        error = entry.get(f"{prefix}_reward_se")
        if std and error:
            return round((std / error) ** 2)
    return None


# ---- Rewards ----


def reward_weights(run: RunFolder) -> dict[str, float]:
    """The weight of each reward, which sum to 1. Rewards that are only evaluated have the weight 0."""
    names = as_list(run.info.get("reward_names"))
    if names and isinstance(names[0], list):  # all names, and those of the trained rewards
        names = names[0]
    names = [name for name in names if isinstance(name, str)]
    if not names:
        names = [name.split("/", 1)[1].removesuffix("/mean") for name in run.names(r"rewards/.+/mean")]
    given = as_list(run.info.get("reward_weights")) or as_list(run.settings.get("reward_weights"))
    weights = [as_number(weight) or 0.0 for weight in given]
    if len(weights) != len(names) or sum(weights) <= 0:
        weights = [1.0] * len(names)
    total = sum(weights)
    trained = {name: weight / total for name, weight in zip(names, weights, strict=True)}
    evaluated = [name for name in as_list(run.info.get("eval_reward_names")) if isinstance(name, str)]
    logged = [re.sub(r"^eval.*?_rewards/|/mean$", "", name) for name in run.names(r"eval(_.+?)?_rewards/.+/mean")]
    return trained | {name: 0.0 for name in [*evaluated, *logged] if name not in trained}


# ---- Headline ----


@dataclass(frozen=True)
class Headline:
    """What came of a run: a sentence, and a word for its color (see [`Change.verdict`])."""

    sentence: str
    verdict: str
    change: Change | None = None


def headline(run: RunFolder) -> Headline:
    """Whether the reward rose on held-out prompts, as far as the evaluations can tell."""
    names = evaluation_names(run)
    prefix = next((name for name in names if not is_average(name)), None)
    found = evaluations(run, prefix) if prefix else []
    if prefix is None or not found:
        return Headline(f"There was no evaluation on held-out prompts. {_training_change(run)}", "unknown")
    if len(found) == 1:
        only = found[0]
        return Headline(
            f"There is one evaluation, after step {only.step}: a reward of {only}{_over(only)}. A second one is needed "
            f"to compare with. {_training_change(run)}",
            "unknown",
        )
    change = Change(found[0], found[-1])
    several = len([name for name in names if not is_average(name)]) > 1
    what = f"The reward on {evaluation_label(prefix)}" if several else "The held-out reward"
    sentence = f"{what} {_change_in_words(change)}"
    if change.before.step > 0:
        sentence += f" The first evaluation is after step {change.before.step}, not of the untrained model."
    if change.after.step < run.last_step:
        sentence += f" It is that after step {change.after.step}; the logs go on to step {run.last_step}."
    return Headline(sentence, change.verdict, change)


def _over(evaluation: Evaluation) -> str:
    parts = [] if evaluation.error is None else ["mean ± standard error"]
    count = evaluation.count
    parts.append("the number of prompts is not recorded" if count is None else f"{count} prompts not trained on")
    return f" ({', '.join(parts)})"


def _change_in_words(change: Change) -> str:
    numbers = f"from {change.before} to {change.after}{_over(change.after)}"
    difference = f"{change.difference:+.3f}"
    if change.errors is None:
        verb = "rose" if change.difference > 0 else "fell" if change.difference < 0 else "stayed"
        return f"{verb} {numbers}, by {difference}. Without a standard error this may be noise."
    errors = f"{abs(change.errors):.1f} standard errors of the difference"
    if change.verdict == "noise":
        return (
            f"went {numbers}. The difference of {difference} is {errors}: within the noise of this evaluation, so it "
            "shows neither a gain nor a loss."
        )
    verb = "rose" if change.verdict == "gain" else "fell"
    return f"{verb} {numbers}, by {difference} or {errors}."


def _training_change(run: RunFolder) -> str:
    values = [value for _, value in run.series("reward")]
    if len(values) < 2:
        return ""
    share = max(1, len(values) // 10)
    first, last = sum(values[:share]) / share, sum(values[-share:]) / share
    span = "log entry" if share == 1 else f"{share} log entries"
    return (
        f"On the prompts of the training the mean reward was {first:.3f} in the first {span} and {last:.3f} in the "
        "last, which says little about other prompts, and the window moved meanwhile."
    )


def comparison(first: RunFolder, second: RunFolder) -> Headline:
    """Which of two runs ends with the higher held-out reward, as far as the evaluations can tell."""
    ends = [evaluations(run)[-1:] for run in (first, second)]
    if not (ends[0] and ends[1]):
        return Headline("One of the runs has no evaluation: the held-out rewards cannot be compared.", "unknown")
    change = Change(ends[0][0], ends[1][0])
    sentence = f"At their last evaluations, A has a held-out reward of {change.before} and B of {change.after}. "
    if change.errors is None:
        sentence += f"The difference is {change.difference:+.3f}; without a standard error it may be noise."
    elif change.verdict == "noise":
        sentence += (
            f"The difference of {change.difference:+.3f} is {abs(change.errors):.1f} standard errors: within the noise "
            "of the evaluation."
        )
    else:
        better = "B" if change.verdict == "gain" else "A"
        sentence += f"{better} is ahead by {abs(change.difference):.3f}, {abs(change.errors):.1f} standard errors."
    sentence += " This error is that of the prompts; another training seed changes the result too."
    if change.before.count != change.after.count:
        sentence += " The numbers of held-out prompts differ or are not known."
    weights = [{name: weight for name, weight in reward_weights(run).items() if weight} for run in (first, second)]
    if weights[0] != weights[1]:
        sentence += " The trained rewards differ: compare each reward by itself."
    return Headline(sentence, "unknown" if change.verdict == "unknown" else "noise", change)


# ---- State and warnings ----


def total_steps(run: RunFolder) -> int | None:
    """Optimizer steps that the run was to take, if something tells it."""
    for value in (run.settings.get("max_steps"), run.state.get("max_steps")):
        number = as_number(value)
        if number is not None and number > 0:
            return int(number)
    return None


def is_finished(run: RunFolder) -> bool:
    """Whether the training came to its end, which logs its run time, or has written its summary."""
    steps = [entry for entry in run.history if "reward" in entry or "train_runtime" in entry]
    return bool(run.summary) or bool(steps) and "train_runtime" in steps[-1]


def warnings(run: RunFolder) -> list[str]:
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


def _state_warnings(run: RunFolder) -> list[str]:
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


def _alarm_warnings(run: RunFolder) -> list[str]:
    """An alarm of the guard against reward hacking, with what the evaluations said then."""
    found = []
    for name in run.names(r"eval(_.+)?_alarms"):
        alarms = [(step, value) for step, value in run.series(name) if value > 0]
        if not alarms:
            continue
        prefix = name.removesuffix("_alarms")
        steps = ", ".join(str(int(step)) for step, _ in alarms[:8]) + (", ..." if len(alarms) > 8 else "")
        changes = _changes_at(run, prefix, alarms[-1][0])
        found.append(
            f"The reward may have been exploited: the hacking guard raised alarms in {len(alarms)} evaluations, after "
            f"step {steps}. From the first evaluation to step {int(alarms[-1][0])}: {changes}. Look at the images."
        )
    return found


def _changes_at(run: RunFolder, prefix: str, step: float) -> str:
    """How what the guard compares moved from the first evaluation to another one."""
    untrained = [name for name, weight in reward_weights(run).items() if not weight]
    names = {f"{prefix}_reward": "held-out reward"}
    names |= {f"{prefix}_rewards/{name}/mean": f"{name} (never trained on)" for name in untrained}
    names |= {name: name.split("_images/")[1] for name in run.names(rf"{re.escape(prefix)}_images/.+")}
    parts = []
    for name, label in names.items():
        values = dict(run.series(name))
        if step in values and len(values) > 1:
            parts.append(f"{label} {short(next(iter(values.values())))} → {short(values[step])}")
    return "; ".join(parts) or "the numbers are not in the logs"


def _reward_warnings(run: RunFolder) -> list[str]:
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


def _number_warnings(run: RunFolder) -> list[str]:
    found = []
    steps = [step for step, share in run.series("nonfinite/steps") if share > 0]
    if steps:
        found.append(
            f"Gradients were infinite or NaN in {len(steps)} log entries, first at step {int(steps[0])}; these "
            "optimizer steps were dropped. Lower the learning rate, or use bf16 instead of fp16."
        )
    images = [step for step, count in run.series("nonfinite/images") if count > 0]
    if images:
        found.append(f"Images were infinite or NaN in {len(images)} log entries, first at step {int(images[0])}.")
    for name in run.names(r"(eval(_.+?)?_)?rewards/.+/failed"):
        failures = [(step, count) for step, count in run.series(name) if count > 0]
        if failures:
            where = "evaluations" if name.startswith("eval") else "log entries"
            reward = name.split("rewards/", 1)[1].removesuffix("/failed")
            step, worst = max(failures, key=lambda failure: failure[1])
            found.append(
                f"{reward} could not score all images in {len(failures)} {where}: up to {short(worst)} images at "
                f"step {int(step)}. They were left out."
            )
    return found


def _signal_warnings(run: RunFolder) -> list[str]:
    found = []
    clipped = [value for _, value in run.series("clip_ratio/region_mean")]
    if _share(clipped, HIGH_CLIP_SHARE) > 0.25:
        found.append(
            f"More than {HIGH_CLIP_SHARE:.0%} of the transitions were clipped in {_share(clipped, HIGH_CLIP_SHARE):.0%} "
            "of the log entries. `epsilon` may be too small for the image size, or the learning rate too high."
        )
    places = [place for place, share in run.by_window("clip_ratio") if share > HIGH_CLIP_SHARE]
    if places and not found:
        shown = ", ".join(str(int(place)) for place in places)
        found.append(f"More than {HIGH_CLIP_SHARE:.0%} of the transitions are clipped where the window starts at {shown}.")
    flat = [value for _, value in run.series("frac_reward_zero_std")]
    if _share(flat, HIGH_SHARE_WITHOUT_SIGNAL) > 0.25:
        found.append(
            f"In more than {HIGH_SHARE_WITHOUT_SIGNAL:.0%} of the groups all images had the same reward in "
            f"{_share(flat, HIGH_SHARE_WITHOUT_SIGNAL):.0%} of the log entries: they teach nothing. Use harder prompts "
            "or a finer reward."
        )
    epsilon = as_number(run.settings.get("epsilon"))
    deviation = max((value for _, value in run.series("ratio/on_policy_max_deviation")), default=0.0)
    if epsilon is not None and run.settings.get("loss_type") == "grpo" and deviation > epsilon:
        found.append(
            f"Before the first update of an iteration the ratio deviated from 1 by up to {short(deviation)}, more than "
            f"the clip range `epsilon={short(epsilon)}`: rounding alone clips."
        )
    return found


def _share(values: Sequence[float], limit: float) -> float:
    """The share of values above a limit."""
    return sum(value > limit for value in values) / len(values) if values else 0.0
