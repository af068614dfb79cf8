"""LTX-Video and LTX-2, for videos and their sound, and SANA-WM, which shares their autoencoder."""

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    SanaWMTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from parts import Case, case, embeds, flux_parts, ones, picture


TEXT = {"prompt_embeds": embeds(1, 4, 32), "prompt_attention_mask": ones(1, 4), "guidance_scale": 1.0}
VIDEO = {"height": 32, "width": 32, "num_frames": 9}


@cache
def ltx_vae() -> AutoencoderKLLTXVideo:
    torch.manual_seed(0)
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()


@cache
def ltx2_vae() -> AutoencoderKLLTX2Video:
    torch.manual_seed(0)
    return AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()


def ltx(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    parts = {"transformer": transformer, "vae": ltx_vae()}
    if name == "LTXI2VLongMultiPromptPipeline":
        parts |= {"text_encoder": flux_parts()["text_encoder_2"], "tokenizer": flux_parts()["tokenizer_2"]}
        return case(name, parts, prompt="a cat", max_sequence_length=8, **(VIDEO | arguments))
    return case(name, parts, **(TEXT | VIDEO | arguments))


def ltx2(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=8,
        rope_double_precision=False,
        rope_type="split",
        use_keyframes_abs_pos_embedding=name == "LTX2DFRPipeline",
    )
    connectors = LTX2TextConnectors(
        caption_channels=8,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    parts = {"transformer": transformer, "connectors": connectors, "vae": ltx2_vae(), "audio_vae": audio_vae}
    text = {"prompt_embeds": embeds(1, 4, 24), "prompt_attention_mask": ones(1, 4)}
    size = {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0}
    pipe, arguments = case(name, parts | {"vocoder": vocoder}, **(text | size | arguments))
    if name == "LTX2DFRPipeline":
        arguments.pop("num_inference_steps")  # it has noise levels of its own
    return pipe, arguments


def sana_wm() -> Case:
    """A video along the path of a camera, here at rest."""
    torch.manual_seed(0)
    transformer = SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=16,
        chunk_plucker_channels=6 * ltx2_vae().temporal_compression_ratio,
        chunk_plucker_post_attn_blocks=2,
        image_size=32,
        caption_channels=16,
    )
    text = {"prompt_embeds": embeds(1, 1, 4, 16), "prompt_attention_mask": ones(1, 4), "prompt": "a cat"}
    text |= {"negative_prompt_embeds": embeds(1, 1, 4, 16, seed=2), "negative_prompt_attention_mask": ones(1, 4)}
    camera = {"c2w": np.tile(np.eye(4), (5, 1, 1)), "intrinsics": [32.0, 32.0, 16.0, 16.0]}
    parts = {"transformer": transformer, "vae": ltx2_vae()}
    return case("SanaWMPipeline", parts, image=picture(32), **text, **camera, **(VIDEO | {"num_frames": 5}))


# One pass of the model for each step, as without guidance
ONE_PASS = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
ONE_PASS |= {"use_cross_timestep": False, "spatio_temporal_guidance_blocks": None}
AUDIO = ONE_PASS | {"audio_guidance_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
CONDITION = {"conditions": LTX2VideoCondition(frames=embeds(1, 3, 32, 32), index=0, strength=1.0, crf=0)}

PIPELINES = {
    "LTXPipeline": partial(ltx, "LTXPipeline"),
    "LTXImageToVideoPipeline": partial(ltx, "LTXImageToVideoPipeline", image=picture(32)),
    "LTXConditionPipeline": partial(ltx, "LTXConditionPipeline", image=picture(32)),
    "LTXI2VLongMultiPromptPipeline": partial(ltx, "LTXI2VLongMultiPromptPipeline", cond_image=picture(32)),
    "LTX2Pipeline": partial(ltx2, "LTX2Pipeline", **AUDIO),
    "LTX2ImageToVideoPipeline": partial(ltx2, "LTX2ImageToVideoPipeline", image=picture(32), image_crf=0, **AUDIO),
    "LTX2ConditionPipeline": partial(ltx2, "LTX2ConditionPipeline", **CONDITION, **AUDIO),
    "LTX2InContextPipeline": partial(ltx2, "LTX2InContextPipeline", **CONDITION, **AUDIO),
    "LTX2HDRPipeline": partial(
        ltx2,
        "LTX2HDRPipeline",
        reference_conditions=LTX2HDRReferenceCondition(frames=embeds(1, 3, 32, 32), strength=1.0),
        **ONE_PASS,
    ),
    "LTX2DFRPipeline": partial(ltx2, "LTX2DFRPipeline", **CONDITION),
    "SanaWMPipeline": sana_wm,
}
