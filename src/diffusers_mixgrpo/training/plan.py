"""
What an iteration is: its prompts, its window, and its random numbers, as functions of its number and of no state.

So all ranks agree, and a resumed run draws what an uninterrupted one would have drawn.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..core.window_schedule import Window, WindowSchedule
from ..mixgrpo_config import MixGRPOConfig


Row = dict[str, Any]
"""A row of a dataset: a `"prompt"`, and other columns for the rewards."""


class PromptDataset(Protocol):
    """A sized, indexable collection of rows, such as a `datasets.Dataset` or a `list`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


# ---- Plans ----


@dataclass(frozen=True)
class IterationPlan:
    """
    Everything about one iteration on one rank that is known before it begins.

    Args:
        iteration (`int`): Its number, counted from 0.
        rows (`list[dict]` of length `P`): Dataset rows of this rank's prompts.
        window ([`Window`]): The stochastic steps, in steps of the uncompressed schedule.
        steps (`torch.LongTensor` of shape `(k,)`): The steps to train, counted from the start of the window.
        latent_seeds (`list[int]`): Seeds of the initial noise: one per prompt if its images share it, or per image.
        sde_seed (`int`): Seed of the window's noise.
        order_seed (`int`): Seed of the order in which images are trained.
    """

    iteration: int
    rows: list[Row]
    window: Window
    steps: Tensor
    latent_seeds: list[int]
    sde_seed: int
    order_seed: int

    @property
    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.rows]


def plan_iteration(
    settings: MixGRPOConfig, schedule: WindowSchedule, iteration: int, rows: Sequence[Row], rank: int
) -> IterationPlan:
    """
    The plan of an iteration on one rank.

    Args:
        settings ([`MixGRPOConfig`]): The configuration.
        schedule ([`WindowSchedule`]): The place of the window.
        iteration (`int`): Number of the iteration, counted from 0.
        rows (`Sequence[dict]`): Dataset rows of this rank's prompts.
        rank (`int`): The rank.
    """
    window = schedule.schedule(iteration)
    noises = len(rows) * (1 if settings.shared_noise else settings.num_generations)
    return IterationPlan(
        iteration=iteration,
        rows=list(rows),
        window=window,
        steps=draw_steps(settings.seed, iteration, window.size, settings.window_train_fraction),
        latent_seeds=draw_seeds(settings.seed, iteration, "latents", rank, noises),
        sde_seed=draw_seeds(settings.seed, iteration, "sde", rank)[0],
        order_seed=draw_seeds(settings.seed, iteration, "order", rank)[0],
    )


# ---- Random numbers ----


STREAMS = ("latents", "sde", "order")


def draw_seeds(seed: int, iteration: int, stream: str, rank: int, count: int = 1) -> list[int]:
    """`count` seeds for one of `STREAMS`, in one iteration and on one rank of a run with `seed`."""
    entropy = (seed, iteration, STREAMS.index(stream), rank)
    return [int(value) for value in np.random.SeedSequence(entropy).generate_state(count, np.uint64) >> 1]


def draw_steps(seed: int, iteration: int, window_size: int, fraction: float) -> Tensor:
    """The window's steps to train: a `fraction` of them and at least one, the same on all ranks."""
    if fraction == 1:
        return torch.arange(window_size)
    count = max(1, int(fraction * window_size))
    generator = np.random.default_rng((seed, iteration))
    return torch.from_numpy(np.sort(generator.permutation(window_size)[:count]))


def draw_order(seed: int, advantages: Tensor, batch_size: int) -> Tensor:
    """
    A random order of `B` images in which the images with an advantage are spread evenly over the training batches.

    Args:
        seed (`int`): Seed of the order.
        advantages (`torch.Tensor` of shape `(B,)`): Their advantages; those of 0 need no replay.
        batch_size (`int`): Images per training batch, a divisor of `B`.

    Returns:
        `torch.LongTensor` of shape `(B,)`. The batches' numbers of images with an advantage differ by at most one.
    """
    order = torch.randperm(len(advantages), generator=torch.Generator().manual_seed(seed))
    batches = order[advantages[order] != 0].tensor_split(len(order) // batch_size)
    fillers = order[advantages[order] == 0].split([batch_size - len(batch) for batch in batches])
    return torch.cat([part for pair in zip(batches, fillers, strict=True) for part in pair])


# ---- Prompts ----


class PromptSampler(Sampler[int]):
    """
    Yields the prompts of an iteration once for each of its training batches, then those of the next iteration.

    All training batches of an iteration come from one set of rollouts, so they share their prompts. The order is a
    function of the seed and the epoch alone, so a resumed run continues with the right prompts.

    Args:
        num_prompts (`int`): Size of the dataset.
        prompts_per_iteration (`int`): Prompts of one iteration, over all devices. A smaller dataset is repeated to
            fill one iteration; otherwise the incomplete tail of an epoch is dropped.
        repeats (`int`): Training batches per iteration.
        shuffle (`bool`, defaults to `True`): Whether each epoch has another random order.
        seed (`int`, defaults to 0): Seed of the orders.
    """

    def __init__(
        self, num_prompts: int, prompts_per_iteration: int, repeats: int, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.num_prompts = num_prompts
        self.prompts_per_iteration = prompts_per_iteration
        self.repeats = repeats
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @classmethod
    def of_run(cls, settings: MixGRPOConfig, num_prompts: int, num_processes: int, repeats: int) -> "PromptSampler":
        """The sampler of a run on `num_processes` devices."""
        return cls(
            num_prompts,
            settings.prompts_per_iteration * num_processes,
            repeats,
            settings.shuffle_dataset,
            settings.seed if settings.data_seed is None else settings.data_seed,
        )

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


def first_rows(settings: MixGRPOConfig, dataset: PromptDataset, rank: int, num_processes: int) -> list[Row]:
    """The rows of a run's first iteration on one rank."""
    sampler = PromptSampler.of_run(settings, len(dataset), num_processes, repeats=1)
    count = settings.prompts_per_iteration
    return [dataset[i] for i in islice(sampler, rank * count, (rank + 1) * count)]


def prompts_of_run(
    settings: MixGRPOConfig, dataset: PromptDataset | None, evaluations: Iterable[PromptDataset], num_processes: int
) -> list[str]:
    """
    The prompts that a run needs from beginning to end, on all devices.

    Args:
        settings ([`MixGRPOConfig`]): The configuration.
        dataset ([`PromptDataset`], *optional*): The training prompts.
        evaluations (`Iterable[PromptDataset]`): Prompts of the evaluations; all of them are needed.
        num_processes (`int`): Number of devices.
    """
    prompts: list[str] = []
    if dataset is not None:
        prompts += [dataset[i]["prompt"] for i in indices_of_run(settings, len(dataset), num_processes)]
    for evaluation in evaluations:
        prompts += [evaluation[i]["prompt"] for i in range(len(evaluation))]
    return prompts


def indices_of_run(settings: MixGRPOConfig, num_prompts: int, num_processes: int) -> list[int]:
    """The rows of a dataset that a run trains on from beginning to end, on all devices."""
    sampler = PromptSampler.of_run(settings, num_prompts, num_processes, repeats=1)
    per_iteration = sampler.prompts_per_iteration
    per_epoch = len(sampler) // per_iteration
    iterations = iterations_of_run(settings, per_epoch)
    needed: dict[int, None] = {}
    for epoch in range(math.ceil(iterations / per_epoch)):
        sampler.set_epoch(epoch)
        needed |= dict.fromkeys(islice(sampler, (iterations - epoch * per_epoch) * per_iteration))
        if len(needed) == num_prompts:
            break
    return list(needed)


def iterations_of_run(settings: MixGRPOConfig, iterations_per_epoch: int) -> int:
    """Number of iterations of a run; the last one may be cut short by `num_train_epochs`."""
    if settings.max_steps > 0:
        return math.ceil(settings.max_steps / settings.optimizer_steps_per_iteration)
    return math.ceil(settings.num_train_epochs * iterations_per_epoch)
