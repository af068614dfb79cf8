"""What a stock pipeline returns, as tensors."""

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image


def draw(pipe: DiffusionPipeline, scheduler: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """All that the pipeline returns with that scheduler and the same random numbers: latents, if it can."""
    # VisualCloze is two pipelines in one
    for inner in (pipe, getattr(pipe, "generation_pipe", None), getattr(pipe, "upsampling_pipe", None)):
        if inner is not None:
            inner.scheduler = scheduler
            inner.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    return tensors(pipe(**{"generator": generator, "output_type": "latent", "return_dict": False} | arguments))


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, np.ndarray | Image.Image):
        return [torch.from_numpy(np.array(value))]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, list | tuple) else []
