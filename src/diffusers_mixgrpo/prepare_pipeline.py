"""Making a pipeline ready for training: its precision, what is frozen, its LoRA, and what makes it cheaper."""

import contextlib
import copy
import functools
import os
from collections.abc import Collection, Iterator
from typing import Any

import torch
from diffusers import FluxPipeline
from peft import PeftConfig
from torch import nn
from transformers.utils import logging

from .mixgrpo_config import MixGRPOConfig
from .policies import FLUX_LORA_TARGET_MODULES, load_flux_pipeline
from .quantization import make_quantization
from .scheduling_mixed_ode_sde import MixedODESDEScheduler


logger = logging.get_logger(__name__)

NO_FULL_FINE_TUNING = (
    "the transformer's quantised weights cannot be trained themselves, since they hold too few bits for a small step. "
    "Train a LoRA on them with `peft_config`, or leave the transformer as it is."
)


def load_pipeline(
    model: FluxPipeline | str | os.PathLike, args: MixGRPOConfig, peft_config: PeftConfig | None
) -> FluxPipeline:
    """
    Load the pipeline, unless it is one: frozen parts in the precision of the computation, trained weights in float32.

    Raises:
        `ValueError`: If `quantization` cannot be had, as for a pipeline that is loaded already.
    """
    if not isinstance(model, (str, os.PathLike)):
        if args.quantization is not None:
            raise ValueError(
                f"`quantization={args.quantization}` says how to load a pipeline, and `model` is one. Pass the name "
                "or folder that it comes from, or load it quantised and leave out `quantization`."
            )
        return model
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    kwargs: dict[str, Any] = {"torch_dtype": half}
    if peft_config is None:
        kwargs["torch_dtype"] = {"transformer": torch.float32, "default": half}
    if isinstance(args.model_init_kwargs, dict):  # the configuration has parsed JSON
        kwargs |= args.model_init_kwargs
    if isinstance(kwargs["torch_dtype"], str):
        kwargs["torch_dtype"] = getattr(torch, kwargs["torch_dtype"])
    if isinstance(args.quantization, dict):
        if peft_config is None and "transformer" in args.quantization.get("components_to_quantize", ()):
            raise ValueError(f"`quantization={args.quantization}`: {NO_FULL_FINE_TUNING}")
        kwargs["quantization_config"] = make_quantization(args.quantization, FluxPipeline)
    return load_flux_pipeline(model, **kwargs)


def prepare_pipeline(pipe: FluxPipeline, peft_config: PeftConfig | None, args: MixGRPOConfig) -> tuple[bool, str]:
    """
    Freeze what is not trained, add the LoRA, keep trained weights in float32, switch off dropout; then the options of
    diffusers: the attention backend, compiled blocks.

    Returns:
        `tuple[bool, str]`: Whether a LoRA is trained (or else the whole transformer), and its name.

    Raises:
        `ValueError`: If there is a LoRA already, and another one is asked for or several are active; or if quantised
            weights are to be trained.
    """
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    pipe.vae.to(memory_format=torch.channels_last)  # in which convolutions are faster
    is_lora, adapter_name = _prepare_adapter(pipe.transformer, peft_config)
    if getattr(pipe.transformer, "is_quantized", False):
        if not is_lora:
            raise ValueError(f"`model`: {NO_FULL_FINE_TUNING}")
        if args.merge_lora:
            raise ValueError("`merge_lora=True` would round the LoRA to quantised weights. Leave it False.")
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
    if args.attention_backend is not None:
        pipe.transformer.set_attention_backend(args.attention_backend)
    if args.compile_repeated_blocks:
        compile_repeated_blocks(pipe.transformer)  # with the LoRA's layers and the backend in it
    return is_lora, adapter_name


def compile_repeated_blocks(transformer: Any) -> None:
    """Compile a diffusers model's blocks in place, unless they are; its weights keep their names."""
    if any(module._compiled_call_impl is not None for module in transformer.modules()):
        return
    # A graph for each of: passes of one image, of the first batch size and of any; with and without gradient, and
    # adapters; the first block and the others. Past the limit, 8, passes would be uncompiled and round otherwise.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    transformer.compile_repeated_blocks()


def make_reference(pipe: FluxPipeline, args: MixGRPOConfig) -> nn.Module:
    """A frozen copy of the transformer, which rounds as the transformer does."""
    reference = copy.deepcopy(pipe.transformer).requires_grad_(False).to(args.device)
    if args.compile_repeated_blocks:
        compile_repeated_blocks(reference)
    return reference


def place_components(pipe: FluxPipeline, args: MixGRPOConfig, stay: Collection[str] = ()) -> None:
    """Move all models but the transformer, which is the Trainer's, and those in `stay` to where they are needed."""
    for name, component in pipe.components.items():
        if not isinstance(component, nn.Module) or name in ("transformer", *stay) or hasattr(component, "_hf_hook"):
            continue
        device = torch.device("cpu") if name == "vae" and args.offload_vae else args.device
        if getattr(component, "device", None) != device:  # bitsandbytes' weights may refuse to be moved
            component.to(device)


@contextlib.contextmanager
def vae_on_device(pipe: FluxPipeline, args: MixGRPOConfig) -> Iterator[None]:
    """Have the VAE where pictures are decoded, and with `offload_vae` on the CPU again afterwards."""
    if not args.offload_vae or hasattr(pipe.vae, "_hf_hook"):
        yield
        return
    pipe.vae.to(args.device)
    try:
        yield
    finally:
        pipe.vae.to("cpu")


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
