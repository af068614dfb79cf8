"""What a model card says of a run's results: rewards before and after, images, versions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult

from .logged_run import LoggedRun


BEFORE_AFTER = "before_after.png"


@dataclass(frozen=True)
class RewardChange:
    """
    A reward of held-out prompts in a run's first and last evaluation.

    Args:
        name (`str`): The reward.
        prompts (`str`): What it is a mean over, in words: "253 held-out prompts".
        before, after (`float`): Its means over the images that have a score.
        before_error, after_error (`float`, *optional*): Their standard errors, unless no image or one has a score.
        dataset (`str`, *optional*): The name of the dataset, of several.
    """

    name: str
    prompts: str
    before: float
    after: float
    before_error: float | None = None
    after_error: float | None = None
    dataset: str | None = None


def reward_changes(
    run: LoggedRun, names: Sequence[str], num_prompts: int | Mapping[str, int] | None
) -> list[RewardChange]:
    """
    The change of each reward that was evaluated before the first optimizer step and after the last one.

    Args:
        run ([`LoggedRun`]): The run.
        names (`Sequence[str]`): The rewards.
        num_prompts (`int` or `dict[str, int]`, *optional*): The number of held-out prompts, or that of each dataset.
    """
    datasets = num_prompts if isinstance(num_prompts, Mapping) else {"": num_prompts or 0}
    changes = []
    for dataset, count in datasets.items():
        prompts = f"{count} held-out prompts" if count else "held-out prompts"
        prefix = "eval"
        if dataset:
            prompts, prefix = f"{prompts} of {dataset}", f"eval_{dataset}"
        for name in names:
            means = run.series(f"{prefix}_rewards/{name}/mean")
            if len(means) >= 2 and means[0][0] == 0 and means[-1][0] == run.last_step > 0:
                before, after = (
                    _standard_error(run, f"{prefix}_rewards/{name}", step, count) for step in (0, run.last_step)
                )
                change = RewardChange(name, prompts, means[0][1], means[-1][1], before, after, dataset or None)
                changes.append(change)
    return changes


def _standard_error(run: LoggedRun, reward: str, step: int, count: int) -> float | None:
    """The standard error of a reward's mean over the images that have a score, of `count` images at a step."""
    std, failed = (dict(run.series(f"{reward}/{statistic}")).get(step) for statistic in ("std", "failed"))
    scored = count - int(failed or 0)
    return None if std is None or scored < 2 else std / scored**0.5


def as_table(changes: Sequence[RewardChange], weights: dict[str, float]) -> str:
    """The changes as the rows of a Markdown table, with what each reward was for."""
    several = len({change.prompts for change in changes}) > 1
    titles = ["Reward", *["Prompts"] * several, "Before", "After", "Role"]
    rows = [_row(titles), _row(["---"] * len(titles))]
    for change in changes:
        weight = weights.get(change.name)
        role = "never trained on" if weight is None else f"trained, weight {weight:g}" if weight else "only logged"
        before, after = _with_error(change.before, change.before_error), _with_error(change.after, change.after_error)
        rows.append(_row([as_code(change.name), *[as_cell(change.prompts)] * several, before, after, role]))
    return "\n".join(rows)


def as_code(text: str) -> str:
    """A name, on one line, as Markdown shows code: also one with a backtick, or with the bar of a table's cell."""
    text = as_cell(text)
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def as_cell(text: str) -> str:
    """A text on one line that does not end the cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" if error is None else f"{mean:.3f} \u00b1 {error:.3f}"


def as_eval_results(changes: Sequence[RewardChange]) -> list[EvalResult]:
    """The changes as entries of `model-index`, two for each reward."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=change.prompts,
            dataset_config=change.dataset,
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
