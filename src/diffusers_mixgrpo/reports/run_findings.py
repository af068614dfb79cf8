"""What a run's logs say, in words: above all whether the reward rose on held-out prompts."""

import math
import re
from dataclasses import dataclass
from typing import Any

from .line_charts import short
from .logged_run import LoggedRun, as_list, as_number, as_object


NOISE = 2
"""A change of less than this many standard errors of the difference is called noise."""


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


def evaluation_names(run: LoggedRun) -> list[str]:
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


def evaluations(run: LoggedRun, prefix: str = "eval") -> list[Evaluation]:
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


def _prompt_count(run: LoggedRun, prefix: str) -> int | None:
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


def _count_from_errors(run: LoggedRun, prefix: str) -> int | None:
    """With one trained reward the standard error is its standard deviation over the square root of the number."""
    weighted = [name for name, weight in reward_weights(run).items() if weight != 0]
    if len(weighted) != 1:
        return None
    for entry in run.history:
        std = entry.get(f"{prefix}_rewards/{weighted[0]}/std")
        error = entry.get(f"{prefix}_reward_se")
        if std and error:
            return round((std / error) ** 2)
    return None


# ---- Rewards ----


def reward_weights(run: LoggedRun) -> dict[str, float | None]:
    """
    The weight of each reward, which sum to 1. Rewards that are only evaluated have the weight 0.

    The configuration has the weights in the order of the reward functions, which the logs do not tell: where the names
    are known from them alone and the weights differ, a weight is `None`.
    """
    logged = [name.split("/", 1)[1].removesuffix("/mean") for name in run.names(r"rewards/.+/mean")]
    ordered = _names_in_order(run, logged)
    names = ordered or logged
    given = as_list(run.info.get("reward_weights")) or as_list(run.settings.get("reward_weights"))
    weights = [as_number(weight) or 0.0 for weight in given]
    if len(weights) != len(names) or sum(weights) <= 0:
        weights = [1.0] * len(names)
    is_known = bool(ordered) or len(set(weights)) <= 1
    total = sum(weights)
    trained = {name: weight / total if is_known else None for name, weight in zip(names, weights, strict=True)}
    evaluated = _texts(as_list(run.info.get("eval_reward_names")))
    evaluated += [re.sub(r"^eval.*?_rewards/|/mean$", "", name) for name in run.names(r"eval(_.+?)?_rewards/.+/mean")]
    return trained | {name: 0.0 for name in evaluated if name not in trained}


def _names_in_order(run: LoggedRun, logged: list[str]) -> list[str]:
    """The names of the reward functions in their order, as far as something but the logs tells it."""
    names = as_list(run.info.get("reward_names"))
    if names and isinstance(names[0], list):  # all names, and those of the trained rewards
        names = names[0]
    if names := _texts(names):
        return names
    script = as_object(as_object(run.summary.get("configuration")).get("script"))
    functions = [name.rsplit(":", 1)[-1] for name in _texts(as_list(script.get("reward_funcs")))]
    return functions if sorted(functions) == sorted(logged) else []


def _texts(values: list[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


# ---- Headline ----


@dataclass(frozen=True)
class Headline:
    """What came of a run: a sentence, and a word for its color: that of [`Change.verdict`], or `"alarm"`."""

    sentence: str
    verdict: str
    change: Change | None = None


def headline(run: LoggedRun) -> Headline:
    """Whether the reward rose on held-out prompts, as far as the evaluations can tell."""
    names = evaluation_names(run)
    prefix = next((name for name in names if not is_average(name)), None)
    found = evaluations(run, prefix) if prefix else []
    if prefix is None or not found:
        return Headline(f"There was no evaluation on held-out prompts. {_training_change(run)}", "unknown")
    if len(found) == 1:
        only = found[0]
        return Headline(
            f"There is one evaluation, after step {only.step}: a reward of {only}{_over(only)}. A second one is "
            f"needed to compare with. {_training_change(run)}",
            "unknown",
        )
    change = Change(found[0], found[-1])
    several = len([name for name in names if not is_average(name)]) > 1
    what = f"The reward on {evaluation_label(prefix)}" if several else "The held-out reward"
    sentence = f"{what} {_change_in_words(change)}"
    if change.before.step > 0:
        sentence += f" The first evaluation is after step {change.before.step}, not of the untrained model."
    if change.after.step < run.last_step:
        sentence += f" The last evaluation is after step {change.after.step}; the logs go on to step {run.last_step}."
    if change.verdict == "gain" and dict(run.series(f"{prefix}_alarms")).get(change.after.step, 0) > 0:
        sentence += " But the hacking guard raised an alarm: see the warnings."
        return Headline(sentence, "alarm", change)
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


def _training_change(run: LoggedRun) -> str:
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


def comparison(first: LoggedRun, second: LoggedRun) -> Headline:
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
            f"The difference of {change.difference:+.3f} is {abs(change.errors):.1f} standard errors: within the "
            "noise of the evaluation."
        )
    else:
        better = "B" if change.verdict == "gain" else "A"
        sentence += f"{better} is ahead by {abs(change.difference):.3f}, {abs(change.errors):.1f} standard errors."
    sentence += " This error is that of the prompts; another training seed changes the result too."
    if change.before.count != change.after.count:
        sentence += " The numbers of held-out prompts differ or are not known."
    weights = [
        {name: weight for name, weight in reward_weights(run).items() if weight != 0} for run in (first, second)
    ]
    if weights[0] != weights[1]:
        sentence += " The trained rewards differ: compare each reward by itself."
    return Headline(sentence, "unknown" if change.verdict == "unknown" else "noise", change)


# ---- State ----


def total_steps(run: LoggedRun) -> int | None:
    """Optimizer steps that the run was to take, if something tells it."""
    for value in (run.settings.get("max_steps"), run.state.get("max_steps")):
        number = as_number(value)
        if number is not None and number > 0:
            return int(number)
    return None


def is_finished(run: LoggedRun) -> bool:
    """Whether the training came to its end, which logs its run time, or has written its summary."""
    steps = [entry for entry in run.history if "reward" in entry or "train_runtime" in entry]
    return bool(run.summary) or bool(steps) and "train_runtime" in steps[-1]
