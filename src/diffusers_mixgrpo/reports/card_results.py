"""What a model card says of a run's results: rewards before and after, images, versions."""

from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult

from .logged_run import LoggedRun


BEFORE_AFTER = "before_after.png"


@dataclass(frozen=True)
class RewardChange:
    """
    A reward of the held-out prompts in a run's first and last evaluation.

    Args:
        name (`str`): The reward.
        before, after (`float`): Its means over the prompts.
        before_error, after_error (`float`, *optional*): Their standard errors, if they are known.
    """

    name: str
    before: float
    after: float
    before_error: float | None = None
    after_error: float | None = None


def reward_changes(run: LoggedRun, names: Sequence[str], num_prompts: int | None) -> list[RewardChange]:
    """
    The change of each reward that was evaluated before the first optimizer step and after the last one.

    Args:
        run ([`LoggedRun`]): The run.
        names (`Sequence[str]`): The rewards.
        num_prompts (`int`, *optional*): The number of held-out prompts; without it there are no standard errors.
    """
    changes = []
    for name in names:
        means = run.series(f"eval_rewards/{name}/mean")
        if len(means) < 2 or means[0][0] != 0 or not means[-1][0] == run.last_step > 0:
            continue
        stds = run.series(f"eval_rewards/{name}/std")
        errors: list[float | None] = [None, None]
        if num_prompts and len(stds) == len(means):
            errors = [stds[i][1] / num_prompts**0.5 for i in (0, -1)]
        changes.append(RewardChange(name, means[0][1], means[-1][1], *errors))
    return changes


def as_table(changes: Sequence[RewardChange], weights: dict[str, float]) -> str:
    """The changes as the rows of a Markdown table, with what each reward was for."""
    rows = ["| Reward | Before | After | Role |", "| --- | --- | --- | --- |"]
    for change in changes:
        weight = weights.get(change.name)
        role = "never trained on" if weight is None else f"trained, weight {weight:g}" if weight else "only logged"
        before = _with_error(change.before, change.before_error)
        rows.append(f"| `{change.name}` | {before} | {_with_error(change.after, change.after_error)} | {role} |")
    return "\n".join(rows)


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" if error is None else f"{mean:.3f} \u00b1 {error:.3f}"


def as_eval_results(changes: Sequence[RewardChange], num_prompts: int | None) -> list[EvalResult]:
    """The changes as entries of `model-index`, two for each reward."""
    data = "held-out prompts" if num_prompts is None else f"{num_prompts} held-out prompts"
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=data,
            metric_type=change.name,
            metric_name=f"{change.name} {when} training",
            metric_value=round(value, 6),
        )
        for change in changes
        for when, value in (("before", change.before), ("after", change.after))
    ]


def widget_of(run: LoggedRun) -> list[dict[str, object]]:
    """The last logged image of each prompt, as entries of `widget`, with paths in the folder of the run."""
    entries: dict[str, dict[str, object]] = {}
    for sample in run.images[-1].samples if run.images else []:
        if sample.path is not None and sample.prompt not in entries:
            url = sample.path.relative_to(run.path).as_posix()
            entries[sample.prompt] = {"text": sample.prompt, "output": {"url": url}}
    return list(entries.values())
