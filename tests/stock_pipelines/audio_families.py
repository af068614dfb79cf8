"""Pipelines for music, sounds and speech."""

from functools import cache, partial
from typing import Any

import torch
from diffusers import (
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    AutoencoderSAME,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudio3DiTModel,
)
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from parts import Case, case, embeds, flux_parts
from policies.miniatures import chat_tokenizer, qwen3_config
from transformers import Qwen3Model, UMT5Config, UMT5EncoderModel


def ace_step() -> Case:
    """Music of eight latents."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
    }
    transformer = AceStepTransformer1DModel(
        num_hidden_layers=1, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, **options
    )
    encoder = AceStepConditionEncoder(
        text_hidden_dim=16,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **options,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=8,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    tokenizer = chat_tokenizer()
    parts = {
        "transformer": transformer,
        "condition_encoder": encoder,
        "vae": vae,
        "tokenizer": tokenizer,
        "text_encoder": Qwen3Model(qwen3_config(len(tokenizer), layers=1)),
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    }
    return case("AceStepPipeline", parts, prompt="a piano", lyrics="la la", audio_duration=4.0, guidance_scale=1.0)


@cache
def same_vae() -> AutoencoderSAME:
    torch.manual_seed(0)
    return AutoencoderSAME(
        audio_channels=2,
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )


def stable_audio3(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    transformer = StableAudio3DiTModel(
        io_channels=8,
        patch_size=1,
        embed_dim=32,
        depth=1,
        num_heads=4,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
        use_differential_attention=False,
    )
    parts = {
        "transformer": transformer,
        "vae": same_vae(),
        "duration_embedder": StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16),
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    }
    text = {"prompt_embeds": embeds(1, 4, 16), "encoder_attention_mask": torch.ones(1, 4, dtype=torch.bool)}
    return case(name, parts, duration=1.0, **text, **arguments)


def longcat_audio() -> Case:
    """Makes a scheduler of its own where it is given none."""
    torch.manual_seed(0)
    tokenizer = flux_parts()["tokenizer_2"]
    config = UMT5Config(d_model=32, d_kv=8, num_layers=1, num_heads=4, d_ff=64, vocab_size=len(tokenizer))
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(config),
        "transformer": LongCatAudioDiTTransformer(
            dit_dim=64, dit_depth=1, dit_heads=4, dit_text_dim=32, latent_dim=8, text_conv=False
        ),
        "vae": LongCatAudioDiTVae(
            in_channels=1,
            channels=16,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=2,
            sample_rate=240,
        ),
        "scheduler": None,
    }
    return case("LongCatAudioDiTPipeline", parts, prompt="a cat", audio_duration_s=0.2, guidance_scale=1.0)


AUDIO = {"audio": embeds(1, 2, 16)}

PIPELINES = {
    "AceStepPipeline": ace_step,
    "StableAudio3Pipeline": partial(stable_audio3, "StableAudio3Pipeline"),
    "StableAudio3AudioToAudioPipeline": partial(
        stable_audio3, "StableAudio3AudioToAudioPipeline", init_noise_level=0.9, **AUDIO
    ),
    "StableAudio3InpaintPipeline": partial(
        stable_audio3, "StableAudio3InpaintPipeline", mask_start_seconds=0.2, mask_end_seconds=0.6, **AUDIO
    ),
    "LongCatAudioDiTPipeline": longcat_audio,
}
