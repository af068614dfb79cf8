"""The files of trained weights, as diffusers loads them: a LoRA, or the whole transformer."""

import contextlib
import os
import shutil

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.tensor import DTensor

from .adapters import TrainedWeights


LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
TRANSFORMER_FOLDER = "transformer"
_SCALE = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")  # settings of a LoRA that its shapes do not show
EMA_FOLDER = "ema"  # holds the same files with the moving average of the trained weights


def save_trained_weights(
    pipe: DiffusionPipeline,
    folder: str,
    weights: TrainedWeights,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    Save the LoRA as `pipe.load_lora_weights(folder)` expects it, or the transformer as a part of a pipeline's folder.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): The pipeline in training.
        folder (`str`): Where to save.
        weights ([`TrainedWeights`]): Which weights are trained.
        state_dict (`dict`, *optional*): The gathered weights of a transformer that is sharded.
    """
    if weights.is_lora:
        _save_lora(pipe, folder, weights.adapter_name, state_dict)
    else:
        _save_transformer(pipe.transformer, folder, state_dict)


def gather_trained_weights(transformer: ModelMixin, keep: bool) -> dict[str, torch.Tensor]:
    """
    The trained weights and the buffers of a transformer that FSDP2 or DeepSpeed shards. All ranks must call it.

    The frozen weights are left out, and one weight is gathered at a time: it needs the memory of the largest one.

    Args:
        transformer ([`~diffusers.ModelMixin`]): The transformer.
        keep (`bool`): Whether this rank needs the weights. The others get an empty dictionary.

    Returns:
        `dict[str, torch.Tensor]`: On the CPU. With DeepSpeed these are its optimizer's float32 copies.
    """
    gathered = {}
    # Unlike `named_parameters`, this shards again what FSDP2 left whole after a forward pass.
    for name, value in transformer.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter) and not value.requires_grad:
            continue
        whole = _gather(value)
        if keep:
            gathered[name] = whole.detach().cpu()
    return gathered


def _gather(value: torch.Tensor) -> torch.Tensor:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if hasattr(value, "ds_id") or hasattr(value, "_hp_mapping"):  # set by ZeRO-3, and by ZeRO-1 and ZeRO-2
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(value)
    return value


def copy_trained_weights(source: str, target: str, weights: TrainedWeights) -> None:
    """Copy a checkpoint's files of [`save_trained_weights`], and those of a moving average, into another folder."""
    name = LORA_WEIGHTS_NAME if weights.is_lora else TRANSFORMER_FOLDER
    remove_trained_weights(os.path.join(target, EMA_FOLDER))
    for part in (name, os.path.join(EMA_FOLDER, name)):
        path, copy = os.path.join(source, part), os.path.join(target, part)
        if os.path.isdir(path):
            shutil.copytree(path, copy, dirs_exist_ok=True)
        elif os.path.isfile(path):
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copy(path, copy)


def remove_trained_weights(folder: str) -> None:
    """Remove the files of [`save_trained_weights`], of both kinds, and the folder if nothing else is in it."""
    if not os.path.isdir(folder):
        return
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, LORA_WEIGHTS_NAME))
    shutil.rmtree(os.path.join(folder, TRANSFORMER_FOLDER), ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def load_trained_weights(pipe: DiffusionPipeline, folder: str, weights: TrainedWeights) -> None:
    """
    Load the files of [`save_trained_weights`] back into the pipeline in training.

    Raises:
        `FileNotFoundError`: If the folder does not hold them.
        `ValueError`: If it holds a LoRA of another shape.
    """
    name = LORA_WEIGHTS_NAME if weights.is_lora else TRANSFORMER_FOLDER
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"`resume_from_checkpoint` must be a checkpoint of {'a LoRA' if weights.is_lora else 'full fine-tuning'} "
            f"by this trainer, got {folder!r}, which has no {name}."
        )
    if weights.is_lora:
        _load_lora(pipe, folder, weights.adapter_name)
    else:
        pipe.transformer.load_state_dict(type(pipe.transformer).from_pretrained(path).state_dict())


def _save_transformer(transformer: ModelMixin, folder: str, state_dict: dict[str, torch.Tensor] | None) -> None:
    if state_dict is not None:
        with torch.device("meta"):
            transformer = type(transformer).from_config(transformer.config)
        transformer.load_state_dict(state_dict, assign=True)
    transformer.save_pretrained(os.path.join(folder, TRANSFORMER_FOLDER))


def _save_lora(
    pipe: DiffusionPipeline, folder: str, adapter_name: str, state_dict: dict[str, torch.Tensor] | None
) -> None:
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(
            pipe.transformer, state_dict=state_dict, adapter_name=adapter_name
        ),
        # It holds the LoRA's alpha: without it a LoRA would be loaded with a scale as if alpha were its rank.
        # Dropout is off in training, and would be on in a stock pipeline.
        transformer_lora_adapter_metadata=pipe.transformer.peft_config[adapter_name].to_dict() | {"lora_dropout": 0.0},
        weight_name=LORA_WEIGHTS_NAME,
    )


def _load_lora(pipe: DiffusionPipeline, folder: str, adapter_name: str) -> None:
    state_dict, metadata = pipe.lora_state_dict(folder, weight_name=LORA_WEIGHTS_NAME, return_lora_metadata=True)
    state_dict = {key.removeprefix("transformer."): value for key, value in state_dict.items()}
    own = get_peft_model_state_dict(pipe.transformer, adapter_name=adapter_name)
    if {key: value.shape for key, value in state_dict.items()} != {key: value.shape for key, value in own.items()}:
        raise ValueError(
            f"The LoRA in {folder!r} has other layers or another rank than this trainer's. Resume with the "
            "`peft_config` that it was trained with."
        )
    config = pipe.transformer.peft_config[adapter_name]
    saved = {name: (metadata or {}).get(f"transformer.{name}") for name in _SCALE}
    if metadata and any(saved[name] != getattr(config, name) for name in _SCALE):
        got = ", ".join(f"{name}={saved[name]} instead of {getattr(config, name)}" for name in _SCALE)
        raise ValueError(
            f"The LoRA in {folder!r} has another scale than this trainer's: {got}. Resume with the `peft_config`, or "
            "the weight in `pipe.set_adapters`, that it was trained with."
        )
    set_peft_model_state_dict(pipe.transformer, state_dict, adapter_name=adapter_name)
