"""All that is random in an iteration, as functions of its number and of no state: so a resume draws the same."""

import numpy as np
import torch


STREAMS = ("latents", "sde", "order")


def draw_seeds(seed: int, iteration: int, stream: str, rank: int, count: int = 1) -> list[int]:
    """`count` seeds for one of `STREAMS`, in one iteration and on one rank of a run with `seed`."""
    entropy = (seed, iteration, STREAMS.index(stream), rank)
    return [int(value) for value in np.random.SeedSequence(entropy).generate_state(count, np.uint64) >> 1]


def draw_steps(seed: int, iteration: int, window_size: int, fraction: float) -> torch.Tensor:
    """The window's steps to train, a `fraction` of all and at least one: the same on all ranks."""
    if fraction == 1:
        return torch.arange(window_size)
    count = max(1, int(fraction * window_size))
    generator = np.random.default_rng((seed, iteration))
    return torch.from_numpy(np.sort(generator.permutation(window_size)[:count]))


def draw_order(seed: int, advantages: torch.Tensor, batch_size: int) -> torch.Tensor:
    """
    A random order of `B` images that gives all batches as many with an advantage other than 0, but for one.

    Args:
        seed (`int`): Of the order.
        advantages (`torch.Tensor` of shape `(B,)`): Their advantages.
        batch_size (`int`): Images per training batch, a divisor of `B`.

    Returns:
        `torch.LongTensor` of shape `(B,)`.
    """
    order = torch.randperm(len(advantages), generator=torch.Generator().manual_seed(seed))
    batches = order[advantages[order] != 0].tensor_split(len(order) // batch_size)
    rests = order[advantages[order] == 0].split([batch_size - len(batch) for batch in batches])
    return torch.cat([part for pair in zip(batches, rests, strict=True) for part in pair])
