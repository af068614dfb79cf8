"""Wan, and pipelines for videos and edits that share its autoencoder: SkyReels, ChronoEdit, Cosmos 3, Sana-Video..."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    Cosmos3OmniTransformer,
    JoyImageEditTransformer3DModel,
    MotifVideoTransformer3DModel,
    SanaVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from parts import SIZE, Case, case, clip_vision, embeds, ones, picture, wan_vae
from policies.miniatures import chat_tokenizer


TEXT = {"prompt_embeds": embeds(1, 4, 32), "negative_prompt_embeds": embeds(1, 4, 32, seed=2)}
VIDEO = SIZE | {"num_frames": 5}
DIMENSIONS: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}
WITH_IMAGE: dict[str, Any] = {"in_channels": 36, "image_dim": 4}


def wan(name: str, transformer: type = WanTransformer3DModel, options: Any = None, **arguments: Any) -> Case:
    torch.manual_seed(0)
    parts = {"transformer": transformer(**(DIMENSIONS | (options or {}))), "vae": wan_vae(), **clip_vision()}
    if name in OF_UNIPC:
        parts["scheduler"] = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
    return case(name, parts, **(TEXT | arguments))


def sana_video(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    transformer = SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        sample_size=8,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    masks = {"prompt_attention_mask": ones(1, 4), "negative_prompt_attention_mask": ones(1, 4)}
    options = {"frames": 5, "use_resolution_binning": False, "negative_prompt": None, "height": 32, "width": 32}
    return case(name, {"transformer": transformer, "vae": wan_vae()}, **TEXT, **masks, **options, **arguments)


def joy() -> Case:
    torch.manual_seed(0)
    transformer = JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2],
        in_channels=16,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=16,
        num_layers=1,
        rope_dim_list=[4, 6, 6],
        theta=256,
    )
    text = {"prompt_embeds": embeds(1, 4, 16), "prompt_embeds_mask": ones(1, 4)}
    parts = {"transformer": transformer, "vae": wan_vae(levels=6), "text_token_max_length": 16}  # for a million pixels
    size = {"height": 64, "width": 64, "guidance_scale": 1.0}
    return case("JoyImageEditPipeline", parts, image=picture(32), **size, **text)


def cosmos3() -> Case:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    special = [*tokenizer.all_special_tokens, "<|vision_start|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": "<|im_end|>"})
    transformer = Cosmos3OmniTransformer(
        head_dim=6,
        hidden_act="relu2",
        hidden_size=6,
        intermediate_size=12,
        latent_channel=16,
        latent_patch_size=1,
        num_attention_heads=1,
        num_hidden_layers=1,
        num_key_value_heads=1,
        patch_latent_dim=16,
        qk_norm_for_text=False,
        rope_axes_dim=[1, 1, 1],
        vocab_size=len(tokenizer),
    )
    prompt = {"prompt": "a cat", "guidance_scale": 1.0, "use_system_prompt": False}
    prompt |= {"add_resolution_template": False, "add_duration_template": False}
    parts = {"transformer": transformer, "vae": wan_vae(), "text_tokenizer": tokenizer, "enable_safety_checker": False}
    return case("Cosmos3OmniPipeline", parts, **prompt, **VIDEO)


def motif(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    transformer = MotifVideoTransformer3DModel(
        in_channels=33,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    )
    masks = {"prompt_attention_mask": ones(1, 4), "negative_prompt_attention_mask": ones(1, 4)}
    parts = {"transformer": transformer, "vae": wan_vae(), "guider": ClassifierFreeGuidance(guidance_scale=2.0)}
    return case(name, parts, **TEXT, **masks, **VIDEO, **arguments)


SKY = {"transformer": SkyReelsV2Transformer3DModel, **VIDEO}
FORCING = SKY | {"num_frames": 9, "base_num_frames": 9, "prompt": None}
OF_UNIPC = {
    "SkyReelsV2DiffusionForcingPipeline",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
}
"""Those that run with the timesteps of UniPC only: integers."""

PIPELINES = {
    "WanPipeline": partial(wan, "WanPipeline", **VIDEO),
    "WanImageToVideoPipeline": partial(wan, "WanImageToVideoPipeline", options=WITH_IMAGE, image=picture(), **VIDEO),
    "WanVideoToVideoPipeline": partial(
        wan, "WanVideoToVideoPipeline", video=[picture()] * 5, strength=0.9, timesteps=[1000, 750, 500, 250], **SIZE
    ),
    "WanVACEPipeline": partial(
        wan,
        "WanVACEPipeline",
        transformer=WanVACETransformer3DModel,
        options={"vace_layers": [0], "vace_in_channels": 96},
        video=[picture()] * 5,
        **VIDEO,
    ),
    "WanAnimatePipeline": partial(
        wan,
        "WanAnimatePipeline",
        transformer=WanAnimateTransformer3DModel,
        options=WITH_IMAGE
        | {
            "latent_channels": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        image=picture(),
        pose_video=[picture()] * 5,
        face_video=[picture()] * 5,
        segment_frame_length=5,
        **SIZE,
    ),
    "LucyEditPipeline": partial(wan, "LucyEditPipeline", options={"in_channels": 32}, video=[picture()] * 5, **VIDEO),
    "ChronoEditPipeline": partial(
        wan,
        "ChronoEditPipeline",
        transformer=ChronoEditTransformer3DModel,
        options=WITH_IMAGE,
        image=picture(),
        **VIDEO,
    ),
    "SkyReelsV2Pipeline": partial(wan, "SkyReelsV2Pipeline", **SKY),
    "SkyReelsV2ImageToVideoPipeline": partial(
        wan, "SkyReelsV2ImageToVideoPipeline", options=WITH_IMAGE, image=picture(), **SKY
    ),
    "SkyReelsV2DiffusionForcingPipeline": partial(wan, "SkyReelsV2DiffusionForcingPipeline", **FORCING),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": partial(
        wan, "SkyReelsV2DiffusionForcingImageToVideoPipeline", options={"image_dim": 4}, image=picture(), **FORCING
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": partial(
        wan,
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        video=[picture()] * 5,
        overlap_history=5,
        **(FORCING | {"num_frames": 17}),
    ),
    "SanaVideoPipeline": partial(sana_video, "SanaVideoPipeline"),
    "SanaImageToVideoPipeline": partial(sana_video, "SanaImageToVideoPipeline", image=picture(32)),
    "JoyImageEditPipeline": joy,
    "Cosmos3OmniPipeline": cosmos3,
    "MotifVideoPipeline": partial(motif, "MotifVideoPipeline"),
    "MotifVideoImage2VideoPipeline": partial(motif, "MotifVideoImage2VideoPipeline", image=picture(), prompt=None),
}
