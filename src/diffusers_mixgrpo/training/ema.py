"""[`EMAWeights`]: an exponential moving average of the trained weights, to evaluate and save beside them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EMAWeights(TrainerCallback):
    r"""
    The moving average `e` of the trained weights `w`, by diffusers' [`~diffusers.training_utils.EMAModel`].

    After optimizer step `t` it is `e = d e + (1 - d) w` with `d = min(decay, t / (9 + t))`, and `d = 0` in the first
    step. A dropped optimizer step is one too, with the same weights again: so the average depends on the weights after
    each step and on `t` alone. It is updated before a step ends, and evaluations and checkpoints come after that.

    Args:
        parameters (`Sequence[torch.nn.Parameter]`): The trained weights, whole, on the device where they are trained.
            The average takes as much memory there.
        decay (`float`): The largest decay, in (0, 1).

    Raises:
        `ValueError`: If trained weights have fewer bits than float32.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        dtypes = {parameter.dtype for parameter in parameters} - {torch.float32, torch.float64}
        if dtypes:
            raise ValueError(
                f"`ema_decay` must be None for trained weights in {dtypes.pop()}, got {decay}: the small steps of the "
                "average would be lost by rounding. Use bf16=True or fp16=True, which keep trained weights in float32."
            )
        self._parameters = list(parameters)
        # Without `foreach`, whose differences of all weights at once would take their memory again
        self._average = EMAModel(self._parameters, decay=decay)
        self._trained: list[Tensor] | None = None  # while the average is in the model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The step is counted later. So a resumed run needs no other count, and a new run starts a new average.
        self._average.optimization_step = state.global_step
        self._average.step(self._parameters)

    def restart(self) -> None:
        """Let the average be the trained weights."""
        for average, parameter in zip(self._average.shadow_params, self._parameters, strict=True):
            average.copy_(parameter.detach())

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """
        A context in which the model has the average instead of the trained weights, which are back afterwards to the
        last bit. Nothing is copied: what is loaded into the model here is loaded into the average.

        Raises:
            `RuntimeError`: Inside another such context.
        """
        if self._trained is not None:
            raise RuntimeError("The model has the moving average already. Leave `applied()` first.")
        try:
            self._trained = [parameter.data for parameter in self._parameters]
            for parameter, average in zip(self._parameters, self._average.shadow_params, strict=True):
                parameter.data = average
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Give the model its trained weights back, if a signal has interrupted the end of [`applied`]."""
        if self._trained is not None:
            for parameter, data in zip(self._parameters, self._trained, strict=True):
                parameter.data = data
            self._trained = None
