"""The files of what was trained, as diffusers loads them: a LoRA, or the whole transformer."""

import os
from typing import Any

import torch
from diffusers import FluxPipeline
from peft import get_peft_model_state_dict, set_peft_model_state_dict


LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
TRANSFORMER_FOLDER = "transformer"


def save_transformer(transformer: Any, folder: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Save the transformer as a part of a pipeline's folder; `state_dict` if its weights are sharded."""
    if state_dict is not None:
        with torch.device("meta"):
            transformer = type(transformer).from_config(transformer.config)
        transformer.load_state_dict(state_dict, assign=True)
    transformer.save_pretrained(os.path.join(folder, TRANSFORMER_FOLDER))


def load_trained_weights(pipe: FluxPipeline, folder: str, is_lora: bool, adapter_name: str) -> None:
    """
    Read what [`save_lora`] or [`save_transformer`] wrote back into the pipeline that is being trained.

    Raises:
        `FileNotFoundError`: If the folder holds no such thing.
        `ValueError`: If it is a LoRA of another shape.
    """
    name = LORA_WEIGHTS_NAME if is_lora else TRANSFORMER_FOLDER
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"`resume_from_checkpoint={folder!r}` has no {name}, so it is no checkpoint of "
            f"{'a LoRA' if is_lora else 'a full fine-tuning'} by this trainer."
        )
    if is_lora:
        _reload_lora(pipe, folder, adapter_name)
    else:
        pipe.transformer.load_state_dict(type(pipe.transformer).from_pretrained(path).state_dict())


def save_lora(
    pipe: FluxPipeline, folder: str, adapter_name: str, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Save the LoRA as `pipe.load_lora_weights(folder)` expects it; `state_dict` if its weights are sharded."""
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(
            pipe.transformer, state_dict=state_dict, adapter_name=adapter_name
        ),
        # It holds the LoRA's alpha: without it a LoRA would come back scaled as if alpha were its rank.
        transformer_lora_adapter_metadata=pipe.transformer.peft_config[adapter_name].to_dict(),
        weight_name=LORA_WEIGHTS_NAME,
    )


def _reload_lora(pipe: FluxPipeline, folder: str, adapter_name: str) -> None:
    state_dict = pipe.lora_state_dict(folder, weight_name=LORA_WEIGHTS_NAME)
    state_dict = {key.removeprefix("transformer."): value for key, value in state_dict.items()}
    own = get_peft_model_state_dict(pipe.transformer, adapter_name=adapter_name)
    if {key: value.shape for key, value in state_dict.items()} != {key: value.shape for key, value in own.items()}:
        raise ValueError(
            f"The LoRA in {folder!r} has other layers or another rank than this trainer's. Resume with the "
            "`peft_config` that it was trained with."
        )
    set_peft_model_state_dict(pipe.transformer, state_dict, adapter_name=adapter_name)
