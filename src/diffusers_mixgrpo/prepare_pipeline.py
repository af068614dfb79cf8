"""Making a pipeline ready for training: its precision, what is frozen, its LoRA."""

import copy
import functools
import os
from typing import Any

import diffusers
import torch
from diffusers import FluxPipeline
from peft import PeftConfig
from torch import nn
from transformers.utils import logging

from .mixgrpo_config import MixGRPOConfig
from .policies import FLUX_LORA_TARGET_MODULES, load_flux_pipeline
from .scheduling_mixed_ode_sde import MixedODESDEScheduler


logger = logging.get_logger(__name__)


def load_pipeline(model: str | os.PathLike, args: MixGRPOConfig, peft_config: PeftConfig | None) -> FluxPipeline:
    """Load the pipeline: frozen parts in the precision of the computation, trained weights in float32."""
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    kwargs: dict[str, Any] = {"torch_dtype": half}
    if peft_config is None:
        kwargs["torch_dtype"] = {"transformer": torch.float32, "default": half}
    if isinstance(args.model_init_kwargs, dict):  # the configuration has parsed JSON
        kwargs |= args.model_init_kwargs
    if isinstance(kwargs["torch_dtype"], str):
        kwargs["torch_dtype"] = getattr(torch, kwargs["torch_dtype"])
    return load_flux_pipeline(model, **kwargs)


def prepare_pipeline(pipe: FluxPipeline, peft_config: PeftConfig | None, args: MixGRPOConfig) -> tuple[bool, str]:
    """
    Freeze what is not trained, add the LoRA, keep trained weights in float32, switch off dropout.

    Returns:
        `tuple[bool, str]`: Whether a LoRA is trained (or else the whole transformer), and its name.

    Raises:
        `ValueError`: If there is a LoRA already, and another one is asked for or several are active.
    """
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    is_lora, adapter_name = _prepare_adapter(pipe.transformer, peft_config)
    if not is_lora:
        pipe.transformer.requires_grad_(True)
    if is_lora or args.bf16 or args.fp16:
        # Steps of 1e-5 vanish in bfloat16, and float16 gradients cannot be unscaled. Autocast computes in half anyway.
        for parameter in pipe.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    for module in pipe.transformer.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            logger.warning_once("Dropout is switched off: with it, new and old log-probs would differ by chance.")
            module.p = 0.0
    return is_lora, adapter_name


def _prepare_adapter(transformer: Any, peft_config: PeftConfig | None) -> tuple[bool, str]:
    loaded = list(getattr(transformer, "peft_config", {}))
    if peft_config is not None:
        if loaded:
            raise ValueError(
                f"`peft_config` was passed, and the pipeline's transformer has the adapter(s) {loaded} already. Leave "
                "out `peft_config` to go on training that adapter, or merge it first with `pipe.fuse_lora()` and "
                "`pipe.unload_lora_weights()`."
            )
        peft_config = copy.copy(peft_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = list(FLUX_LORA_TARGET_MODULES)
        transformer.add_adapter(peft_config, "default")
        return True, "default"
    if not loaded:
        return False, "default"
    active = transformer.active_adapters()
    if len(active) != 1:
        raise ValueError(
            f"The transformer has {len(active)} active adapters, {active}; only one can be trained. Choose it with "
            "`pipe.set_adapters(name)`."
        )
    transformer.set_adapter(active[0])  # also makes its weights trainable
    return True, active[0]


def make_scheduler(pipe: FluxPipeline, args: MixGRPOConfig, evaluation: bool = False) -> MixedODESDEScheduler:
    """The pipeline's scheduler with the first iteration's window, or, for evaluation, with none and plain Euler."""
    changes: dict[str, Any] = {"window_size": 0, "window_start": 0, "ode_solver": "euler"}
    changes |= {"prefix_ratio": 1.0, "suffix_ratio": 1.0}
    if not evaluation:
        names = ("sde_type", "eta", "ode_solver", "solver_order", "prefix_ratio", "suffix_ratio")
        changes |= {name: getattr(args, name) for name in names}
        changes["window_start"], changes["window_size"] = args.window_schedule().schedule(0)
    if args.shift is not None:
        changes |= {"shift": args.shift, "use_dynamic_shifting": False}
    return MixedODESDEScheduler.from_config(pipe.scheduler.config, **changes)


def make_cache(settings: dict[str, Any] | str | None) -> Any:
    """
    A cache configuration of diffusers, of its class's `name` and its arguments.

    Raises:
        `ValueError`: If there is no such class, or it does not take these arguments.
    """
    if not isinstance(settings, dict):
        return None
    kwargs = {key: value for key, value in settings.items() if key != "name"}
    names = [name for name in dir(diffusers) if name.endswith("CacheConfig")]
    if settings.get("name") not in names:
        raise ValueError(
            f"`ode_cache` must have a 'name' among {', '.join(names)}, got {settings}. For example "
            '{"name": "FirstBlockCacheConfig", "threshold": 0.1}.'
        )
    try:
        return getattr(diffusers, settings["name"])(**kwargs)
    except TypeError as error:
        raise ValueError(f"`ode_cache={settings}`: {error}.") from error


def rename_gradient_checkpointing(transformer: Any) -> None:
    """Give a diffusers model the method by which the Trainer switches on gradient checkpointing."""
    transformer.activation_checkpointing_enable = functools.partial(_enable_gradient_checkpointing, transformer)


def _enable_gradient_checkpointing(
    transformer: Any,
    activation_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    if every_n_layers != 1 or offload:
        raise ValueError(
            "`activation_checkpointing_kwargs` of a diffusers model can hold arguments of "
            f"torch.utils.checkpoint.checkpoint only, got every_n_layers={every_n_layers}, offload={offload}."
        )
    kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
    transformer.enable_gradient_checkpointing(functools.partial(torch.utils.checkpoint.checkpoint, **kwargs))
