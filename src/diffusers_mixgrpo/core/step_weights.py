"""Weights of the steps' losses, so that late steps do not get far larger updates than early ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .transitions import Transitions


STEP_WEIGHTINGS = ("none", "rectified", "noise")


def step_weights(weighting: str, transitions: Transitions, trained: Sequence[int]) -> Tensor:
    """
    The weight of each step's loss, with mean 1 over the steps that a run trains.

    The log-prob of a late step changes much more with the velocity than that of an early one
    ([`Transitions.sensitivities`]), so its gradient is larger, while the noise that the gradient rates is smaller.
    With one learning rate, the updates are then too large late in a sweep of the window. The weights are

    - `"none"`: 1, as published in MixGRPO, Flow-GRPO and DanceGRPO.
    - `"rectified"`: the inverse sensitivity `1 / g`, which makes the gradients of all steps equally large
      (Flash-GRPO).
    - `"noise"`: the std of the step (TempFlow-GRPO, https://arxiv.org/abs/2508.04324).

    Args:
        weighting (`str`): One of the three.
        transitions ([`Transitions`] of length `n`): The steps.
        trained (`Sequence[int]`): The steps among them that the run trains, each counted once in the mean.

    Returns:
        `torch.Tensor` of shape `(n,)`: On the device of the transitions.

    Raises:
        `ValueError`: If `weighting` is unknown.
    """
    if weighting == "none":
        return torch.ones_like(transitions.sigmas)
    if weighting == "rectified":
        weights = 1 / transitions.sensitivities()
    elif weighting == "noise":
        weights = transitions.stds()
    else:
        legal = ", ".join(map(repr, STEP_WEIGHTINGS))
        raise ValueError(f"`step_weighting` must be one of {legal}, got {weighting!r}.")
    # Not indexed by a list, whose copy the device would wait for
    return weights / torch.stack([weights[step] for step in trained]).mean()
