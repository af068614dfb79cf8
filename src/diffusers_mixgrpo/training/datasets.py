"""Checks of datasets before training, so that no row fails in the middle of a run; and their images to edit."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import datasets
from PIL import Image

from ..rewards.runner import TRL_ARGUMENTS
from .plan import PromptDataset, Row


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
    if isinstance(dataset, OpenedImages):
        dataset = dataset.dataset
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


# ---- Images to edit ----


class OpenedImages:
    """A dataset whose column `image` holds paths: each image is read when its row is."""

    def __init__(self, dataset: PromptDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        row = self.dataset[index]
        return {**row, "image": _opened(row["image"])}


def open_images(name: str, dataset: PromptDataset, pipeline: str) -> PromptDataset:
    """
    A dataset whose column `image` has PIL images, from one that has them or their paths.

    Args:
        name (`str`): The name of the argument in messages.
        dataset ([`PromptDataset`]): A dataset that has passed [`check_dataset`].
        pipeline (`str`): The class of the pipeline that edits the images, for messages.

    Returns:
        [`PromptDataset`]: The dataset itself if nothing has to be opened.

    Raises:
        `ValueError`: If there is no such column, or a row has no image that can be read. Of images in the dataset
            itself only the first one is decoded here.
    """
    if isinstance(dataset, OpenedImages):
        return dataset
    columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else list(dataset[0])
    if "image" not in columns:
        raise ValueError(
            f"`{name}` must have a column 'image' for a {pipeline}, which edits images, got the columns {columns}. "
            "Add PIL images or their paths, or rename a column, for example with `dataset.rename_column('input', "
            "'image')`."
        )
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None:
        if isinstance(dataset.features["image"], datasets.Image):
            if dataset.data.column("image").null_count > 0:
                for i, value in enumerate(dataset.cast_column("image", datasets.Image(decode=False))["image"]):
                    if value is None:
                        _check_image(name, i, value)
            decoded = dataset.cast_column("image", datasets.Image())
            _check_image(name, 0, decoded[0]["image"])
            return decoded
        values: Iterable[Any] = dataset["image"]
    else:
        values = (dataset[i]["image"] for i in range(len(dataset)))
    are_open = [_check_image(name, i, value) for i, value in enumerate(values)]
    return dataset if all(are_open) else OpenedImages(dataset)


def open_evaluations(
    dataset: PromptDataset | dict[str, PromptDataset] | None, pipeline: str
) -> PromptDataset | dict[str, PromptDataset] | None:
    """As [`open_images`], of an `eval_dataset`: one, several by name, or none."""
    opened = {name: open_images(name, part, pipeline) for name, part in evaluations(dataset).items()}
    if isinstance(dataset, dict):
        return dict(zip(dataset, opened.values(), strict=True))
    return opened.get("eval_dataset")


def _check_image(name: str, i: int, value: object) -> bool:
    """Whether the image of row `i` is a PIL image. Otherwise it must be the path of one."""
    if isinstance(value, Image.Image):
        return True
    problem = ""
    if isinstance(value, (str, os.PathLike)):
        try:
            with Image.open(value):
                return False
        except OSError as error:
            problem = f" ({error}; the working directory is {os.getcwd()})"
    raise ValueError(
        f"`{name}` must have a column 'image' of PIL images or their paths, got {value!r} in row {i}{problem}. "
        "Correct it, or remove the row."
    )


def _opened(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    feature = datasets.Image()  # turns photographs as their cameras say
    return feature.decode_example(feature.encode_example(os.fspath(value)))


class ImagePrompts(Sequence[tuple[str, Image.Image]]):
    """
    Prompts with their images at the size that a policy edits, each read when it is asked for.

    Args:
        places (`Sequence[tuple]`): A dataset, the index of a row, and [`PipelinePolicy.fit_image`] of the policy.
    """

    def __init__(self, places: Sequence[tuple[PromptDataset, int, Callable[[Image.Image], Image.Image]]]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Image.Image]: ...

    @overload
    def __getitem__(self, index: slice) -> "ImagePrompts": ...

    def __getitem__(self, index: int | slice) -> "tuple[str, Image.Image] | ImagePrompts":
        if isinstance(index, slice):
            return ImagePrompts(self.places[index])
        dataset, i, fit = self.places[index]
        row = dataset[i]
        return row["prompt"], fit(row["image"])
