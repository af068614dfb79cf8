"""Hybrid inference: the trained model takes the first steps of a picture, the base model the rest."""

import math
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.callbacks import PipelineCallback
from diffusers.hooks import HookRegistry, ModelHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook


HOOK_NAME = "hybrid_inference"


class HybridInferenceCallback(PipelineCallback):
    r"""
    Lets the base model finish what the trained model began, as a guard against reward hacking.

    The trained model takes the first `cutoff_step_ratio` of the steps, which settle the composition; the base model
    takes the others, which add the detail where reward hacking shows (MixGRPO, https://arxiv.org/abs/2507.21802, 80%).
    At ratio 1 the images are those of the trained model, at ratio 0 those of the base model.

    The base model is the pipeline's transformer without its LoRA, or, after full fine-tuning, `base_transformer`. It
    stands in for single forward passes: those that a pipeline call with this callback makes at or after the cutoff.
    Between them the LoRA is on. So a run that raises, or is interrupted, leaves nothing to repair.

    Args:
        cutoff_step_ratio (`float`, *optional*, defaults to 0.8):
            Share of the steps that the trained model takes, in [0, 1]. Whole steps, rounded down, but at least one
            unless it is 0.
        base_transformer ([`ModelMixin`], *optional*):
            The transformer from before training, on the pipeline's device and in its dtype. If `None`, the pipeline's
            own with all its LoRA layers off.
        cutoff_step_index (`int`, *optional*):
            First step of the base model, instead of a ratio; needs `cutoff_step_ratio=None`.

    Raises:
        `ValueError`: For a cutoff out of its range, or, in the run, if there is no base model: neither an active LoRA
        in the pipeline's transformer nor a `base_transformer`.

    Example:

    ```py
    >>> pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
    >>> pipe.load_lora_weights("path/to/lora")
    >>> image = pipe(prompt, callback_on_step_end=HybridInferenceCallback(cutoff_step_ratio=0.8)).images[0]
    ```
    """

    tensor_inputs: list[str] = []

    def __init__(
        self,
        cutoff_step_ratio: float | None = 0.8,
        base_transformer: ModelMixin | None = None,
        cutoff_step_index: int | None = None,
    ):
        if cutoff_step_ratio is not None:
            if not 0 <= cutoff_step_ratio <= 1:
                raise ValueError(f"`cutoff_step_ratio` must be in [0, 1], but is {cutoff_step_ratio!r}.")
            cutoff_step_ratio = float(cutoff_step_ratio)
        if cutoff_step_index is not None and cutoff_step_index < 0:
            raise ValueError(f"`cutoff_step_index` must be >= 0, but is {cutoff_step_index!r}.")
        super().__init__(cutoff_step_ratio=cutoff_step_ratio, cutoff_step_index=cutoff_step_index)
        self.base_transformer = base_transformer
        if 0 in (cutoff_step_ratio, cutoff_step_index):
            # A pipeline lets a callback know of a run when the first step is over. That step can only be the base
            # model's through a hook that sees every module, which lives no longer than the callback.
            handle = register_module_forward_hook(_FirstStepHook(self), with_kwargs=True)
            weakref.finalize(self, handle.remove)

    def cutoff_step(self, num_timesteps: int) -> int:
        """The first step of the base model in a run of `num_timesteps` steps."""
        if self.config.cutoff_step_index is not None:
            return self.config.cutoff_step_index
        ratio = self.config.cutoff_step_ratio
        # 0.29 * 100 is 28.999999999999996; it is 29 steps all the same.
        return max(math.floor(round(ratio * num_timesteps, 6)), int(ratio > 0))

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        cutoff, last = self.cutoff_step(pipeline.num_timesteps), pipeline.num_timesteps - 1
        if step_index == 0 and cutoff <= last:
            self._check_base(pipeline.transformer)
        registry = HookRegistry.check_if_exists_or_initialize(pipeline.transformer)
        if step_index == last:
            registry.remove_hook(HOOK_NAME, recurse=False)
        elif step_index + 1 >= cutoff and registry.get_hook(HOOK_NAME) is None:
            registry.register_hook(_BaseModelHook(self, pipeline), HOOK_NAME)
        return callback_kwargs

    def base_forward(self, transformer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass; `forward` is the trained `transformer`'s own."""
        if self.base_transformer is not None:
            return self.base_transformer(*args, **kwargs)
        self._check_base(transformer)
        with _adapters_off(transformer):
            return forward(*args, **kwargs)

    def running_pipeline(self) -> DiffusionPipeline | None:
        """
        The pipeline whose call, with this callback, we are inside of.

        A pipeline never tells a callback that a run ended, least of all that it raised. The call stack does.
        """
        frame = sys._getframe(1)
        while frame is not None:
            if "callback_on_step_end" in frame.f_code.co_varnames:
                callback = frame.f_locals.get("callback_on_step_end")
                pipeline = frame.f_locals.get("self")
                # several callbacks come as one `MultiPipelineCallbacks`
                is_ours = callback is self or any(each is self for each in getattr(callback, "callbacks", ()))
                if is_ours and isinstance(pipeline, DiffusionPipeline):
                    return pipeline
            frame = frame.f_back  # type: ignore[assignment]
        return None

    def _check_base(self, transformer: nn.Module) -> None:
        if self.base_transformer is None and not _active_adapters(transformer):
            raise ValueError(
                "`base_transformer` is None, but the pipeline's transformer has no active LoRA to switch off either: "
                "load one with `load_lora_weights`, or pass the transformer from before full fine-tuning."
            )


class _BaseModelHook(ModelHook):
    """Sits on the pipeline's transformer from the cutoff to the end of the run; goes by itself if the run raised."""

    def __init__(self, callback: HybridInferenceCallback, pipeline: DiffusionPipeline):
        super().__init__()
        self.callback = callback
        self.pipeline = pipeline

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        # Another caller, or a first step: then the hook is left over from a run that raised.
        if self.callback.running_pipeline() is self.pipeline and not _at_first_step(self.pipeline):
            return self.callback.base_forward(module, forward, *args, **kwargs)
        HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK_NAME, recurse=False)
        return forward(*args, **kwargs)


class _FirstStepHook:
    """Replaces what the trained transformer returns at the first step, at the price of one forward pass more."""

    def __init__(self, callback: HybridInferenceCallback):
        self.callback = weakref.ref(callback)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        callback = self.callback()
        if callback is None or not isinstance(module, ModelMixin) or module is callback.base_transformer:
            return None
        pipeline = callback.running_pipeline()
        if pipeline is None or module is not pipeline.transformer or not _at_first_step(pipeline):
            return None
        return callback.base_forward(module, module.forward, *args, **kwargs)


def _at_first_step(pipeline: DiffusionPipeline) -> bool:
    return getattr(pipeline.scheduler, "step_index", None) is None


def _active_adapters(model: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters]


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """Switches off the LoRA layers that are on, and leaves everything as it was."""
    layers = _active_adapters(model)
    # peft lets `requires_grad` follow the switch; a frozen LoRA is not to come back as a trainable one.
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]  # type: ignore[attr-defined]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
