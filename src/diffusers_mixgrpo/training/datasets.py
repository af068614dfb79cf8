"""Checks of datasets before training, so that no row fails in the middle of a run."""

from collections.abc import Iterable
from typing import Any

import datasets

from ..rewards.runner import TRL_ARGUMENTS
from .plan import PromptDataset


# Names of the rewards' other arguments
RESERVED_COLUMNS = ("prompts", "images", *TRL_ARGUMENTS)


def evaluations(eval_dataset: Any) -> dict[str, PromptDataset]:
    """The datasets of an evaluation, by their names in messages."""
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{name!r}]": part for name, part in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def check_dataset(name: str, dataset: object) -> None:
    """
    Check that each row of a dataset can be trained on or evaluated. `None` passes.

    Args:
        name (`str`): The name of the argument in messages.
        dataset: The dataset.

    Raises:
        `TypeError`, `ValueError`: If it has no length or no items, a row has no `"prompt"` or other columns than the
            first one, or a column has the name of a reward's argument. The message names the row.
    """
    if dataset is None:
        return
    if isinstance(dataset, dict):
        raise TypeError(
            f"`{name}` must be one dataset, got a {type(dataset).__name__} of {', '.join(map(repr, dataset))}. Pass "
            "one of its parts, such as `dataset['train']`."
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"`{name}` must have a length and be indexable, like a datasets.Dataset or a list of {{'prompt': ...}}, "
            f"got {type(dataset).__name__}. Load a streaming dataset without `streaming=True`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` must have at least one row with a 'prompt', got an empty dataset.")
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None:
        _check_columns(name, dataset.column_names)
        if "prompt" in dataset.column_names:
            feature = dataset.features["prompt"]
            is_text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
            if not is_text or dataset.data.column("prompt").null_count > 0:
                _check_prompts(name, dataset["prompt"])
        else:
            _check_row(name, 0, dataset[0])
        return
    # A format may make the columns of a row as it is read, so that all rows have to be read.
    first = dataset[0]
    _check_row(name, 0, first)
    _check_columns(name, first)
    for i in range(1, len(dataset)):
        row = dataset[i]
        _check_row(name, i, row)
        if row.keys() != first.keys():
            changed = ", ".join(map(repr, sorted(row.keys() ^ first.keys(), key=str)))
            raise ValueError(
                f"`{name}` must have the same columns in each row, got row {i} that differs from row 0 in {changed}. "
                "Write None where a value is missing."
            )


def _check_row(name: str, i: int, row: Any) -> None:
    if not isinstance(row, dict) or "prompt" not in row:
        found = f"the columns {list(row)}" if isinstance(row, dict) else repr(row)
        raise ValueError(
            f"`{name}` must have a column 'prompt' of strings, got {found} in row {i}. Rename the column, for example "
            "with `dataset.rename_column('text', 'prompt')`, or use [{'prompt': text} for text in texts]."
        )
    _check_prompts(name, [row["prompt"]], start=i)


def _check_prompts(name: str, prompts: Iterable[object], start: int = 0) -> None:
    for i, prompt in enumerate(prompts, start):
        if not isinstance(prompt, str):
            raise ValueError(
                f"`{name}` must have a column 'prompt' of strings, got {prompt!r} in row {i}. Remove such rows, for "
                "example with `dataset.filter(lambda row: row['prompt'] is not None)`, or convert them."
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` must have prompts of valid Unicode, got {prompt[:40]!r} in row {i} ({error.reason}). "
                "Decode the text again, or remove the row."
            ) from error


def _check_columns(name: str, columns: Iterable[str]) -> None:
    for column in columns:
        if column in RESERVED_COLUMNS:
            raise ValueError(
                f"`{name}` must not have a column {column!r}, since rewards get something else under this name, "
                f"got {list(columns)}. Rename it, for example with "
                f"`dataset.rename_column({column!r}, 'dataset_{column}')`."
            )
        if not isinstance(column, str):
            raise ValueError(
                f"`{name}` must have columns named by strings, which become arguments of reward functions, got "
                f"{column!r}. Rename it."
            )
