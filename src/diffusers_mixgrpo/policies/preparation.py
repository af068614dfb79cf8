"""Making a pipeline ready for training: what is frozen, the LoRA, precision, devices, and diffusers' own options."""

import copy
import functools
from collections.abc import Collection
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import cast_training_params
from peft import PeftConfig
from torch import nn
from transformers.utils import logging

from ..mixgrpo_config import MixGRPOConfig
from .adapters import TrainedWeights, prepare_adapter
from .base import PipelinePolicy
from .loading import NO_FULL_FINE_TUNING


logger = logging.get_logger(__name__)


def prepare_pipeline(
    policy: PipelinePolicy, peft_config: PeftConfig | None, settings: MixGRPOConfig
) -> TrainedWeights:
    """
    Freeze the weights that are not trained, add the LoRA, keep trained weights in float32, and switch off dropout.

    The transformer then gets diffusers' own options: the attention backend and compiled blocks.

    Raises:
        `ValueError`: If a stock pipeline would not load the LoRA (see [`prepare_adapter`]), if quantized weights are
            to be trained, or if hooks take the transformer off the device.
    """
    pipe = policy.pipe
    transformer = pipe.transformer
    _refuse_offloading(transformer)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    if all(parameter.dim() < 5 for parameter in pipe.vae.parameters()):  # not a VAE of videos
        pipe.vae.to(memory_format=torch.channels_last)  # faster convolutions
    weights = prepare_adapter(policy, peft_config)
    if getattr(transformer, "is_quantized", False):
        if not weights.is_lora:
            raise ValueError(f"`model`: {NO_FULL_FINE_TUNING}")
        if settings.merge_lora:
            raise ValueError(
                "`merge_lora` must be False with quantized weights, got True: the LoRA would be rounded to them."
            )
    if not weights.is_lora:
        transformer.requires_grad_(True)
    if weights.is_lora or settings.bf16 or settings.fp16:
        # Steps of 1e-5 vanish in bfloat16, and float16 gradients cannot be unscaled. Autocast computes in half anyway.
        cast_training_params(transformer, torch.float32)
    for module in transformer.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            logger.warning_once("Dropout is switched off: with it, old and new log-probs would differ at random.")
            module.p = 0.0
    if settings.attention_backend is not None:
        transformer.set_attention_backend(settings.attention_backend)
    if settings.compile_repeated_blocks:
        compile_repeated_blocks(transformer)  # after the LoRA's layers and the backend are in place
    return weights


def _refuse_offloading(transformer: ModelMixin) -> None:
    for module in transformer.modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        is_offloaded = any(isinstance(hook, CpuOffload) or getattr(hook, "offload", False) for hook in hooks)
        registry = getattr(module, "_diffusers_hook", None)
        is_group_offloaded = registry is not None and registry.get_hook("group_offloading") is not None
        if is_offloaded or is_group_offloaded:
            fix = (
                "Load the pipeline again without it" if is_group_offloaded else "Call `pipe.remove_all_hooks()` first"
            )
            raise ValueError(
                f"`model` must be a pipeline without CPU offload, got {'group' if is_group_offloaded else 'CPU'} "
                "offloading of its transformer, whose weights must stay on the device to be trained. "
                f"{fix}, and use `offload_vae=True` and `cache_prompt_embeds=True` to save memory."
            )


def check_prepared(transformer: ModelMixin, weights: TrainedWeights) -> None:
    """Raise a `ValueError` unless the LoRA is as [`prepare_pipeline`] left it, as after another trainer was made."""
    loaded = list(getattr(transformer, "peft_config", {}))
    active = transformer.active_adapters() if loaded else []
    expected = [weights.adapter_name] if weights.is_lora else []
    if active != expected:
        raise ValueError(
            f"The pipeline must have the active LoRAs {expected} that this trainer was made with, got {active}: "
            "another trainer or a call changed them since. Use a pipeline per trainer, or make a new trainer."
        )


def compile_repeated_blocks(transformer: ModelMixin) -> None:
    """Compile a diffusers model's blocks in place, unless they are compiled already. Its weights keep their names."""
    if any(module._compiled_call_impl is not None for module in transformer.modules()):
        return
    # A graph each for: passes of one image, of the first batch size and of any; with and without gradient, and
    # adapters; the first block and the others. Past the limit, 8, passes would not be compiled and round differently.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    transformer.compile_repeated_blocks()


def make_reference(transformer: ModelMixin, settings: MixGRPOConfig) -> nn.Module:
    """A frozen copy of the transformer, which rounds as the transformer does."""
    reference = copy.deepcopy(transformer).requires_grad_(False).to(settings.device)
    if settings.compile_repeated_blocks:
        compile_repeated_blocks(reference)
    return reference


def place_components(pipe: DiffusionPipeline, settings: MixGRPOConfig, stay: Collection[str] = ()) -> None:
    """Move each model to its device, except for the transformer, which the Trainer moves, and those in `stay`."""
    for name, component in pipe.components.items():
        if not isinstance(component, nn.Module) or name in ("transformer", *stay) or hasattr(component, "_hf_hook"):
            continue
        device = torch.device("cpu") if name == "vae" and settings.offload_vae else settings.device
        if getattr(component, "device", None) != device:  # bitsandbytes' weights may refuse to be moved
            component.to(device)


def rename_gradient_checkpointing(transformer: ModelMixin) -> None:
    """Give a diffusers model the method with which the Trainer switches on gradient checkpointing."""
    transformer.activation_checkpointing_enable = functools.partial(_enable_gradient_checkpointing, transformer)


def _enable_gradient_checkpointing(
    transformer: ModelMixin,
    activation_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    if every_n_layers != 1 or offload:
        raise ValueError(
            "`activation_checkpointing_kwargs` of a diffusers model must only hold arguments of "
            f"torch.utils.checkpoint.checkpoint, got every_n_layers={every_n_layers}, offload={offload}."
        )
    kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
    transformer.enable_gradient_checkpointing(functools.partial(torch.utils.checkpoint.checkpoint, **kwargs))
