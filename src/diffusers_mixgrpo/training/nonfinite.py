"""Infinite and NaN numbers: found before they reach the weights, counted, and reported with their prompts."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class NonFiniteError(RuntimeError):
    """The gradient or the weights are infinite or NaN, on all ranks."""


class NonFiniteSteps:
    """
    Counts the optimizer steps in a row whose gradient was infinite or NaN.

    Args:
        limit (`int`): The number of such steps in a row at which to stop.

    Attributes:
        in_a_row (`int`): The number so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0

    def count(self, is_finite: bool, step: int) -> None:
        """
        Count the optimizer step after `step` others.

        Raises:
            [`NonFiniteError`]: At the limit.
        """
        self.in_a_row = 0 if is_finite else self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"The gradient was infinite or NaN in {self.in_a_row} optimizer steps in a row, up to step "
                f"{step + 1}. The weights are those before these steps. Lower `learning_rate`, or use bf16 instead of "
                "fp16; `max_nonfinite_steps` sets how many such steps are tolerated."
            )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float | None:
    """
    The 2-norm of all gradients, infinite or NaN if one of them is, or `None` without gradients, as with DeepSpeed.

    Waits for them. With sharded gradients, all ranks must call this function.
    """
    return _total_norm([parameter.grad for parameter in parameters if parameter.grad is not None], norm_type=2)


@torch.no_grad()
def finite_weights(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all weights are finite. With sharded weights, all ranks must call this function."""
    # The largest absolute value is finite if and only if all values are: NaN propagates.
    norm = _total_norm(list(parameters), norm_type=math.inf)
    return norm is None or math.isfinite(norm)


def _total_norm(tensors: Sequence[Tensor], norm_type: float) -> float | None:
    tensors = [tensor for tensor in tensors if tensor.numel()]  # DeepSpeed leaves empty ones
    if not tensors:
        return None
    norm = torch.nn.utils.get_total_norm(tensors, norm_type=norm_type)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm)
