"""The prompts: what a data set must have, and [`PromptSampler`], which of them each training batch is about."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class PromptSampler(Sampler[int]):
    """
    Yields the prompts of an iteration once for each of its training batches, then those of the next.

    All batches of an iteration come from one set of rollouts, so they share their prompts. The order is a function of
    the seed and the epoch alone and needs no state, so a resumed run goes on with the right prompts.

    Args:
        num_prompts (`int`): Size of the data set.
        prompts_per_iteration (`int`): Prompts of one iteration, over all devices. A data set that is smaller is gone
            through as often as it takes to fill one iteration; otherwise what is left over at the end of an epoch is
            left out.
        repeats (`int`): Training batches per iteration.
        shuffle (`bool`, defaults to `True`): Whether each epoch has another random order.
        seed (`int`, defaults to 0): Seed of the orders.
    """

    def __init__(
        self, num_prompts: int, prompts_per_iteration: int, repeats: int, shuffle: bool = True, seed: int = 0
    ):
        self.num_prompts = num_prompts
        self.prompts_per_iteration = prompts_per_iteration
        self.repeats = repeats
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        for start in range(0, len(order), self.prompts_per_iteration):
            for _ in range(self.repeats):
                yield from order[start : start + self.prompts_per_iteration]

    def __len__(self) -> int:
        return max(1, self.num_prompts // self.prompts_per_iteration) * self.prompts_per_iteration * self.repeats

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = []
        while len(order) < max(self.num_prompts, self.prompts_per_iteration):
            if self.shuffle:
                order += torch.randperm(self.num_prompts, generator=generator).tolist()
            else:
                order += range(self.num_prompts)
        return order[: len(self) // self.repeats]


def check_dataset(name: str, dataset: Any) -> None:
    """
    Check that `dataset`, called `name` in messages, can be trained on or evaluated. None passes.

    Raises:
        `TypeError`, `ValueError`: If it has no length or no items, or its rows have no `"prompt"`.
    """
    if dataset is None:
        return
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}; it must have a length and be indexable, like a datasets.Dataset "
            "or a list of {'prompt': ...}. Load a streaming data set without `streaming=True`."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty; it needs at least one row with a 'prompt'.")
    row = dataset[0]
    columns = list(row) if isinstance(row, dict) else None
    if columns is None or "prompt" not in columns or not isinstance(row["prompt"], str):
        found = f"its columns are {columns}" if columns is not None else f"its first row is {row!r}"
        raise ValueError(
            f"`{name}` must have a column 'prompt' of strings, but {found}. Rename the column, for example with "
            "`dataset.rename_column('text', 'prompt')`, or use [{'prompt': text} for text in texts]."
        )
