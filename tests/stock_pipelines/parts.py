"""Small parts, with random weights, that miniatures of several families of pipelines share."""

import inspect
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from helpers import build_pipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection


Case = tuple[DiffusionPipeline, dict[str, Any]]
"""A miniature pipeline and small arguments for its call."""

STEPS = {"num_inference_steps": 4}
SIZE = {"height": 16, "width": 16}


def case(name: str, parts: dict[str, Any], **arguments: Any) -> Case:
    """The stock pipeline of that name, with those of the parts that it takes, and without the others that it names."""
    cls = getattr(diffusers, name)
    torch.manual_seed(0)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)} | parts
    parameters = inspect.signature(cls.__init__).parameters.values()
    given = {p.name: parts.get(p.name) for p in parameters if p.name in parts or p.default is inspect.Parameter.empty}
    given.pop("self")
    pipe = cls(**{name: part.eval() if isinstance(part, torch.nn.Module) else part for name, part in given.items()})
    pipe.set_progress_bar_config(disable=True)
    return pipe, STEPS | arguments


def embeds(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


def picture(size: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def mask(size: int = 16) -> Image.Image:
    """The left half is white."""
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[:, : size // 2] = 255
    return Image.fromarray(pixels)


def flux_parts() -> dict[str, Any]:
    """The parts of the miniature FLUX, with its encoders and tokenizers (CLIP, T5)."""
    return _flux().components


@cache
def _flux() -> DiffusionPipeline:
    return build_pipeline()


@cache
def image_vae(latent_channels: int = 4, blocks: int = 2, **options: Any) -> AutoencoderKL:
    """Halves the size in each block but the last."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        **({"scaling_factor": 0.7, "shift_factor": 0.1} | options),
    ).eval()


@cache
def wan_vae(levels: int = 3) -> AutoencoderKLWan:
    """Halves the size once for each level."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 2) + [True, True],
        scale_factor_spatial=2**levels,
    ).eval()


@cache
def hunyuan_video_vae(latent_channels: int = 4) -> AutoencoderKLHunyuanVideo:
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo(
        latent_channels=latent_channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


@cache
def deep_compression_vae() -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ).eval()


@cache
def clip_vision() -> dict[str, Any]:
    """An encoder of images, with its processor."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4,
        intermediate_size=16,
        patch_size=1,
    )
    processor = CLIPImageProcessor(crop_size=4, size=4)
    return {"image_encoder": CLIPVisionModelWithProjection(config), "image_processor": processor}
