"""Qwen-Image, Qwen-Image-Edit, and pipelines that share its autoencoder."""

from functools import cache, partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    Krea2Transformer2DModel,
    NucleusMoEImageTransformer2DModel,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)
from parts import SIZE, Case, case, embeds, mask, ones, picture
from policies.miniatures import build_qwen_image


TEXT = {"prompt_embeds": embeds(1, 4, 16), "prompt_embeds_mask": ones(1, 4)}
NEGATIVE = {"negative_prompt_embeds": embeds(1, 4, 16, seed=2), "negative_prompt_embeds_mask": ones(1, 4)}
IMAGE = {"image": picture(), "strength": 0.9}
# They encode an image of a million pixels, whatever its size and that of the result
EDIT = {"vae": {"levels": 6}, "height": 256, "width": 256}
DIMENSIONS: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}

# Its latents must have more channels than its images, or they are taken for each other
LAYERED = {"in_channels": 32, "out_channels": 8}


@cache
def qwen_vae(channels: int = 3, levels: int = 1, z_dim: int = 4) -> AutoencoderKLQwenImage:
    """Halves the size once for each level."""
    torch.manual_seed(0)
    options = {"latents_mean": [0.1, -0.2] * (z_dim // 2), "latents_std": [0.8, 1.1] * (z_dim // 2)}
    options |= {"input_channels": channels, "dim_mult": [1] * (levels + 1), "temperal_downsample": [False] * levels}
    return AutoencoderKLQwenImage(base_dim=2 if levels > 1 else 4, z_dim=z_dim, num_res_blocks=1, **options)


def qwen(name: str, control_channels: int | None = None, vae: dict[str, int] | None = None, **arguments: Any) -> Case:
    torch.manual_seed(0)
    is_layered = name == "QwenImageLayeredPipeline"
    transformer = QwenImageTransformer2DModel(
        use_layer3d_rope=is_layered, use_additional_t_cond=is_layered, **(DIMENSIONS | (LAYERED if is_layered else {}))
    )
    parts = {"transformer": transformer, "vae": qwen_vae(**(vae or {}))}
    if is_layered:
        parts["text_encoder"] = build_qwen_image().text_encoder
    if control_channels is not None:
        net = QwenImageControlNetModel(extra_condition_channels=control_channels, **DIMENSIONS)
        torch.nn.init.normal_(net.controlnet_blocks[0].weight)  # which is zero at first
        parts["controlnet"] = net
    return case(name, parts, true_cfg_scale=2.0, **(TEXT | NEGATIVE | arguments))


def krea2() -> Case:
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    text = {"prompt_embeds": embeds(1, 4, 3, 16), "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.bool)}
    parts = {"transformer": transformer, "vae": qwen_vae(), "text_encoder_select_layers": (0, 1, 2)}
    return case("Krea2Pipeline", parts, guidance_scale=0.0, **text, **SIZE)


def nucleus() -> Case:
    torch.manual_seed(0)
    options = DIMENSIONS | {"num_layers": 2, "moe_enabled": False, "capacity_factors": [8.0, 8.0]}
    parts = {"transformer": NucleusMoEImageTransformer2DModel(**options), "vae": qwen_vae()}
    return case("NucleusMoEImagePipeline", parts, guidance_scale=2.0, **TEXT, **NEGATIVE, **SIZE)


PIPELINES = {
    "QwenImagePipeline": partial(qwen, "QwenImagePipeline", **SIZE),
    "QwenImageImg2ImgPipeline": partial(qwen, "QwenImageImg2ImgPipeline", **IMAGE, **SIZE),
    "QwenImageInpaintPipeline": partial(qwen, "QwenImageInpaintPipeline", mask_image=mask(), **IMAGE, **SIZE),
    "QwenImageControlNetPipeline": partial(
        qwen, "QwenImageControlNetPipeline", control_channels=0, control_image=picture(), **SIZE
    ),
    "QwenImageControlNetInpaintPipeline": partial(
        qwen,
        "QwenImageControlNetInpaintPipeline",
        control_channels=4,
        control_image=picture(),
        control_mask=mask(),
        **SIZE,
    ),
    "QwenImageEditPipeline": partial(qwen, "QwenImageEditPipeline", image=picture(), **EDIT),
    "QwenImageEditInpaintPipeline": partial(qwen, "QwenImageEditInpaintPipeline", mask_image=mask(), **IMAGE, **EDIT),
    "QwenImageEditPlusPipeline": partial(qwen, "QwenImageEditPlusPipeline", image=[picture()], **EDIT),
    "QwenImageLayeredPipeline": partial(
        qwen,
        "QwenImageLayeredPipeline",
        image=picture(mode="RGBA"),
        layers=2,
        resolution=640,
        prompt="a cat",
        output_type="pt",
        vae={"channels": 4, "levels": 6, "z_dim": 8},
    ),
    "Krea2Pipeline": krea2,
    "NucleusMoEImagePipeline": nucleus,
}
