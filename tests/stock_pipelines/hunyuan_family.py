"""HunyuanVideo, HunyuanImage, Kandinsky, EasyAnimate and Mochi."""

from functools import cache, partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6SRVAE,
    Kandinsky6Transformer3DModel,
    MochiTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from parts import SIZE, Case, case, embeds, hunyuan_video_vae, image_vae, ones, picture
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel


VIDEO = SIZE | {"num_frames": 9}
MASKS = {"prompt_attention_mask": ones(1, 4), "negative_prompt_attention_mask": ones(1, 4)}


@cache
def siglip() -> dict[str, Any]:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    processor = SiglipImageProcessor(size={"height": 16, "width": 16})
    return {"image_encoder": SiglipVisionModel(config), "feature_extractor": processor}


def hunyuan_video(name: str, in_channels: int = 4, **arguments: Any) -> Case:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }
    parts: dict[str, Any] = {"vae": hunyuan_video_vae()}
    if name == "HunyuanVideoFramepackPipeline":
        images = {"has_image_proj": True, "image_proj_dim": 32, "has_clean_x_embedder": True, "patch_size": 2}
        parts["transformer"] = HunyuanVideoFramepackTransformer3DModel(**(options | images))
        parts |= siglip()
    else:
        if name == "HunyuanVideoImageToVideoPipeline":
            options |= {"image_condition_type": "latent_concat", "guidance_embeds": False}
        parts["transformer"] = HunyuanVideoTransformer3DModel(**options)
    text = {"prompt_embeds": embeds(1, 4, 16), "pooled_prompt_embeds": embeds(1, 8)}
    text |= {"negative_prompt_embeds": embeds(1, 4, 16, seed=2), "negative_pooled_prompt_embeds": embeds(1, 8, seed=2)}
    return case(name, parts, **(text | MASKS | VIDEO | arguments))


def hunyuan_video15(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=32,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="i2v" if "Image" in name else "t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    guider = ClassifierFreeGuidance(guidance_scale=1.0)
    parts = {"transformer": transformer, "vae": vae, "guider": guider, **siglip()}
    text = {"prompt_embeds": embeds(1, 4, 16), "prompt_embeds_mask": ones(1, 4)}
    text |= {"prompt_embeds_2": embeds(1, 4, 32), "prompt_embeds_mask_2": ones(1, 4)}
    return case(name, parts, **text, **arguments)


def hunyuan_image(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    is_refiner = "Refiner" in name
    transformer = HunyuanImageTransformer2DModel(
        in_channels=16 if is_refiner else 4,
        out_channels=8 if is_refiner else 4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1) if is_refiner else (1, 1),
        guidance_embeds=True,
        text_embed_dim=32,
        text_embed_2_dim=None if is_refiner else 32,
        rope_axes_dim=(2, 2, 4) if is_refiner else (4, 4),
    )
    if is_refiner:
        vae: Any = AutoencoderKLHunyuanImageRefiner(
            latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1, spatial_compression_ratio=4
        )
        text = {}
    else:
        vae = AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=32,
            scaling_factor=0.5,
        )
        text = {"prompt_embeds_2": embeds(1, 4, 32), "prompt_embeds_mask_2": ones(1, 4)}
    text |= {"prompt_embeds": embeds(1, 4, 32), "prompt_embeds_mask": ones(1, 4)}
    return case(name, {"transformer": transformer, "vae": vae}, **text, **SIZE, **arguments)


def kandinsky5(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        visual_cond="I2" in name,
        attention_type="regular",
    )
    vae = image_vae(blocks=4, mid_block_add_attention=False) if name.endswith("2IPipeline") else hunyuan_video_vae()
    text = {"prompt_embeds_qwen": embeds(1, 4, 32), "prompt_embeds_clip": embeds(1, 16)}
    text |= {"prompt_cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "guidance_scale": 1.0}
    return case(name, {"transformer": transformer, "vae": vae}, **text, **arguments)


def kandinsky6() -> Case:
    torch.manual_seed(0)
    transformer = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        in_audio_dim=4,
        out_audio_dim=4,
    )
    text = {"prompt_embeds": embeds(1, 4, 32), "pooled_prompt_embeds": embeds(1, 16), "guidance_scale": 1.0}
    parts = {"transformer": transformer, "vae": hunyuan_video_vae()}
    return case("Kandinsky6TI2VAPipeline", parts, **text, **VIDEO, sample_audio=False)


def kandinsky6_sr() -> Case:
    """Twice as large, in one tile."""
    torch.manual_seed(0)
    transformer = Kandinsky6SRTransformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_visual_blocks=1,
        axes_dims=(8, 4, 4),
        tile_sizes=((128, 128),),
    )
    vae = Kandinsky6SRVAE(
        latent_channels=4,
        encoder_block_out_channels=(32,) * 5,
        decoder_block_out_channels=(32,) * 5,
        layers_per_block=1,
    )
    video = {"video": [picture(64)], "resolution_scale": 2, "output_type": "pt"}
    return case("Kandinsky6SRPipeline", {"transformer": transformer, "vae": vae}, **video)


def easy_animate(name: str, in_channels: int, **arguments: Any) -> Case:
    torch.manual_seed(0)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        mmdit_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
        add_norm_text_encoder=True,
    )
    vae = AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    vae.register_to_config(cache_mag_vae=False)  # which EasyAnimateInpaintPipeline reads
    text = {"prompt_embeds": embeds(1, 4, 16), "negative_prompt_embeds": embeds(1, 4, 16, seed=2)}
    parts = {"transformer": transformer, "vae": vae}
    return case(name, parts, **text, **MASKS, **(SIZE | {"num_frames": 5}), **arguments)


def mochi() -> Case:
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    with torch.no_grad():  # the class leaves them as they are in memory
        transformer.pos_frequencies.zero_()
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    text = {"prompt_embeds": embeds(1, 16, 32), "negative_prompt_embeds": embeds(1, 16, 32, seed=2)}
    masks = {name: torch.ones(1, 16, dtype=torch.bool) for name in MASKS}
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    return case("MochiPipeline", parts, **text, **masks, **SIZE, num_frames=7)


PIPELINES = {
    "HunyuanVideoPipeline": partial(hunyuan_video, "HunyuanVideoPipeline"),
    "HunyuanVideoImageToVideoPipeline": partial(
        hunyuan_video, "HunyuanVideoImageToVideoPipeline", in_channels=9, image=picture()
    ),
    "HunyuanSkyreelsImageToVideoPipeline": partial(
        hunyuan_video, "HunyuanSkyreelsImageToVideoPipeline", in_channels=8, image=picture()
    ),
    "HunyuanVideoFramepackPipeline": partial(
        hunyuan_video, "HunyuanVideoFramepackPipeline", image=picture(32), latent_window_size=3, height=32, width=32
    ),
    "HunyuanVideo15Pipeline": partial(hunyuan_video15, "HunyuanVideo15Pipeline", **VIDEO),
    "HunyuanVideo15ImageToVideoPipeline": partial(
        hunyuan_video15, "HunyuanVideo15ImageToVideoPipeline", image=picture(), num_frames=9
    ),
    "HunyuanImagePipeline": partial(hunyuan_image, "HunyuanImagePipeline"),
    "HunyuanImageRefinerPipeline": partial(hunyuan_image, "HunyuanImageRefinerPipeline", image=picture()),
    "Kandinsky5T2VPipeline": partial(kandinsky5, "Kandinsky5T2VPipeline", **(VIDEO | {"height": 32, "width": 32})),
    "Kandinsky5I2VPipeline": partial(
        kandinsky5, "Kandinsky5I2VPipeline", image=picture(32), height=32, width=32, num_frames=17
    ),
    "Kandinsky5T2IPipeline": partial(kandinsky5, "Kandinsky5T2IPipeline", height=32, width=32),
    "Kandinsky5I2IPipeline": partial(kandinsky5, "Kandinsky5I2IPipeline", image=picture(32), height=32, width=32),
    "Kandinsky6TI2VAPipeline": kandinsky6,
    "Kandinsky6SRPipeline": kandinsky6_sr,
    "EasyAnimatePipeline": partial(easy_animate, "EasyAnimatePipeline", 4),
    "EasyAnimateInpaintPipeline": partial(
        easy_animate,
        "EasyAnimateInpaintPipeline",
        9,
        video=embeds(1, 3, 5, 16, 16),
        mask_video=torch.ones(1, 1, 5, 16, 16),
        strength=0.9,
    ),
    "MochiPipeline": mochi,
}
