"""Hybrid inference: the trained model takes the first denoising steps of an image, the base model the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn


@dataclass
class ForwardPasses:
    """
    Number of forward passes of each model inside [`hybrid_inference`].

    Attributes:
        trained (`int`): Forward passes of the trained model.
        base (`int`): Forward passes of the base model.
    """

    trained: int = 0
    base: int = 0


@contextmanager
def hybrid_inference(
    pipe: DiffusionPipeline, trained_ratio: float = 0.8, base_transformer: ModelMixin | None = None
) -> Iterator[ForwardPasses]:
    r"""
    Context in which the base model finishes the images that the trained model begins, as a guard against reward
    hacking.

    The trained model takes the first `trained_ratio` of the denoising steps of each pipeline call, which settle the
    composition. The base model takes the rest, which add the detail where reward hacking shows (MixGRPO,
    https://huggingface.co/papers/2507.21802, uses 80%). At ratio 1 the images are those of the trained model, at
    ratio 0 those of the base model. All forward passes of a step, such as the two of classifier-free guidance, go to
    the same model.

    The base model is the pipeline's transformer without its LoRA or, after full fine-tuning, `base_transformer`. The
    LoRA is off only during a forward pass of the base model, so a call that raises or is interrupted leaves the
    pipeline as it was.

    Args:
        pipe ([`DiffusionPipeline`]):
            A pipeline with a `transformer` and a `scheduler` that counts its steps in `step_index`.
        trained_ratio (`float`, *optional*, defaults to 0.8):
            Share of the denoising steps that the trained model takes, in [0, 1]. It is rounded down to whole steps,
            but to no less than one step unless it is 0.
        base_transformer ([`ModelMixin`], *optional*):
            The transformer before training, on the pipeline's device and in its dtype. If `None`, the pipeline's own
            transformer with all its LoRA layers off.

    Yields:
        [`ForwardPasses`]: The number of forward passes that each model has made so far.

    Raises:
        `ValueError`: If `trained_ratio` is not a number in [0, 1], if it is below 1 and there is no base model (no
            `base_transformer`, and no active LoRA that is not fused), or if the pipeline is inside another
            `hybrid_inference`.

    Example:

    ```py
    >>> pipe = DiffusionPipeline.from_pretrained("path/to/pipeline", dtype=torch.bfloat16).to("cuda")
    >>> pipe.load_lora_weights("path/to/lora")
    >>> with hybrid_inference(pipe, 0.8) as passes:
    ...     image = pipe(prompt, num_inference_steps=25).images[0]
    >>> passes
    ForwardPasses(trained=20, base=5)
    ```
    """
    transformer = pipe.transformer
    _check_arguments(transformer, trained_ratio, base_transformer)
    passes = ForwardPasses()
    # The calls of a module go through this attribute, which `Module.compile` sets too. Unlike `forward`, it is not
    # replaced by offloading and caching hooks, some of which are removed and added again after each pipeline call.
    compiled_call = transformer._compiled_call_impl
    call = compiled_call or transformer._call_impl
    transformer._compiled_call_impl = _HybridCall(pipe, transformer, call, trained_ratio, base_transformer, passes)
    try:
        yield passes
    finally:
        transformer._compiled_call_impl = compiled_call


@dataclass
class _HybridCall:
    """Stands in for the call of a pipeline's transformer, and selects the model that makes the forward pass."""

    pipe: DiffusionPipeline
    transformer: ModelMixin
    transformer_call: Callable[..., Any]
    trained_ratio: float
    base_transformer: ModelMixin | None
    passes: ForwardPasses

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_trained_step(self.pipe.scheduler, self.trained_ratio):
            self.passes.trained += 1
            return self.transformer_call(*args, **kwargs)
        self.passes.base += 1
        if self.base_transformer is not None:
            return self.base_transformer(*args, **kwargs)
        with _lora_off(self.transformer):
            return self.transformer_call(*args, **kwargs)


def num_trained_steps(trained_ratio: float, num_steps: int) -> int:
    """Number of steps, of `num_steps`, that the trained model takes."""
    # 0.29 * 100 is 28.999999999999996 in floating point, which must count as 29.
    steps = math.floor(round(trained_ratio * num_steps, 6))
    return max(steps, int(trained_ratio > 0))


def _is_trained_step(scheduler: SchedulerMixin, trained_ratio: float) -> bool:
    # An image-to-image pipeline skips the steps before `begin_index`.
    first_step = scheduler.begin_index or 0
    # The index is None until the scheduler has made its first step.
    step = first_step if scheduler.step_index is None else scheduler.step_index
    return step - first_step < num_trained_steps(trained_ratio, len(scheduler.timesteps) - first_step)


def _check_arguments(transformer: ModelMixin, trained_ratio: float, base_transformer: ModelMixin | None) -> None:
    if not isinstance(trained_ratio, Real) or not 0 <= trained_ratio <= 1:
        raise ValueError(f"`trained_ratio` must be in [0, 1], got {trained_ratio!r}.")
    if isinstance(transformer._compiled_call_impl, _HybridCall):
        raise ValueError(
            "`pipe` must be outside of `hybrid_inference`, got a pipeline that is inside. Leave that context first."
        )
    if base_transformer is transformer:
        raise ValueError(
            "`base_transformer` must be the transformer before training, got the pipeline's own. Load it a second "
            "time, or leave `base_transformer` out to switch the LoRA off."
        )
    if trained_ratio < 1 and base_transformer is None and not _active_lora_layers(transformer):
        raise ValueError(
            "`base_transformer` must be the transformer before training if the pipeline has no active LoRA, got None. "
            "Load a LoRA with `load_lora_weights` (and do not fuse it), or pass `base_transformer`."
        )


def _active_lora_layers(transformer: ModelMixin) -> list[BaseTunerLayer]:
    """The LoRA layers that can be switched off and on again. A fused one cannot: its weights would be rounded."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    return [layer for layer in layers if layer.active_adapters and not layer.disable_adapters and not layer.merged]


@contextmanager
def _lora_off(transformer: ModelMixin) -> Iterator[None]:
    """Switches off the LoRA layers that are on, and leaves everything as it was."""
    layers = _active_lora_layers(transformer)
    # peft changes `requires_grad` with the switch, which would unfreeze a frozen LoRA.
    parameters: list[nn.Parameter] = [parameter for layer in layers for parameter in layer.parameters()]
    requires_grad = [parameter.requires_grad for parameter in parameters]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in zip(parameters, requires_grad, strict=True):
            parameter.requires_grad_(flag)
