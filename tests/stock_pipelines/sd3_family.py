"""Stable Diffusion 3, with its ControlNets and perturbed attention."""

from functools import partial
from typing import Any

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from parts import SIZE, Case, case, embeds, image_vae, mask, picture


TEXT = {"prompt_embeds": embeds(1, 4, 32), "pooled_prompt_embeds": embeds(1, 32)}
NEGATIVE = {"negative_prompt_embeds": embeds(1, 4, 32, seed=2), "negative_pooled_prompt_embeds": embeds(1, 32, seed=3)}
IMAGE = {"image": picture(), "strength": 0.9}
DIMENSIONS: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
}


def sd3(name: str, control_channels: int | None = None, **arguments: Any) -> Case:
    torch.manual_seed(0)
    parts = {"transformer": SD3Transformer2DModel(**DIMENSIONS), "vae": image_vae(16)}
    if control_channels is not None:
        net = SD3ControlNetModel(extra_conditioning_channels=control_channels, **DIMENSIONS)
        torch.nn.init.normal_(net.controlnet_blocks[0].weight)  # which is zero at first
        parts["controlnet"] = net
    return case(name, parts, guidance_scale=2.0, **(TEXT | NEGATIVE | SIZE | arguments))


PIPELINES = {
    "StableDiffusion3Pipeline": partial(sd3, "StableDiffusion3Pipeline"),
    "StableDiffusion3Img2ImgPipeline": partial(sd3, "StableDiffusion3Img2ImgPipeline", **IMAGE),
    "StableDiffusion3InpaintPipeline": partial(sd3, "StableDiffusion3InpaintPipeline", mask_image=mask(), **IMAGE),
    "StableDiffusion3ControlNetPipeline": partial(
        sd3, "StableDiffusion3ControlNetPipeline", control_channels=0, control_image=picture()
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": partial(
        sd3,
        "StableDiffusion3ControlNetInpaintingPipeline",
        control_channels=1,
        control_image=embeds(1, 3, 16, 16),
        control_mask=embeds(1, 1, 16, 16),
    ),
    "StableDiffusion3PAGPipeline": partial(sd3, "StableDiffusion3PAGPipeline", pag_scale=1.0),
    "StableDiffusion3PAGImg2ImgPipeline": partial(sd3, "StableDiffusion3PAGImg2ImgPipeline", pag_scale=1.0, **IMAGE),
}
