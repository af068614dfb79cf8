"""Families of pipelines for images with one or two members each: from AuraFlow to Sana."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderTiny,
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    CogView4Transformer2DModel,
    DreamLiteUNetModel,
    ErnieImageTransformer2DModel,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    LongCatImageTransformer2DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    OvisImageTransformer2DModel,
    PRXTransformer2DModel,
    SanaControlNetModel,
    SanaTransformer2DModel,
)
from parts import SIZE, Case, case, deep_compression_vae, embeds, flux_parts, image_vae, mask, ones, picture, wan_vae
from policies.miniatures import build_flux2_klein, build_qwen_image, chat_tokenizer
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, SmolLM3Config, SmolLM3ForCausalLM


MASK = {"prompt_attention_mask": ones(1, 4)}
NEGATIVE_MASK = {"negative_prompt_attention_mask": ones(1, 4)}


def text(width: int) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": embeds(1, 4, width), "negative_prompt_embeds": embeds(1, 4, width, seed=2)}


def aura_flow() -> Case:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    parts = {"transformer": transformer, "vae": image_vae()}
    return case("AuraFlowPipeline", parts, **text(32), **MASK, **NEGATIVE_MASK, **SIZE)


def bria() -> Case:
    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[0, 4, 4],
    )
    return case("BriaPipeline", {"transformer": transformer, "vae": image_vae()}, **text(32), **SIZE)


def bria_fibo(name: str, **arguments: Any) -> Case:
    """Its latents are those of an autoencoder that divides sizes by 16."""
    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        text_encoder_dim=32,
        axes_dims_rope=[0, 4, 4],
    )
    config = SmolLM3Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    parts = {"text_encoder": SmolLM3ForCausalLM(config), "tokenizer": flux_parts()["tokenizer_2"], "vae": wan_vae()}
    size = {"height": 64, "width": 64, "prompt": '{"a": "cat"}'}
    return case(name, parts | {"transformer": transformer}, **(size | arguments))


def bria_fibo2() -> Case:
    torch.manual_seed(0)
    transformer = BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=(8, 4, 4),
        axes_lens=(64, 32, 32),
    )
    words = {"prompt_embeds": embeds(1, 2, 4, 16), "negative_prompt_embeds": embeds(1, 2, 4, 16, seed=2)}
    parts = {"transformer": transformer, "vae": build_flux2_klein().vae}
    return case("BriaFibo2Pipeline", parts, **words, **SIZE)


def cogview4(name: str, in_channels: int = 4, **arguments: Any) -> Case:
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=in_channels,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    words = {"prompt_embeds": embeds(1, 16, 32), "negative_prompt_embeds": embeds(1, 16, 32, seed=2)}
    return case(name, {"transformer": transformer, "vae": image_vae()}, **words, **SIZE, **arguments)


def glm() -> Case:
    torch.manual_seed(0)
    transformer = GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=128,
    )
    parts = {"transformer": transformer, "vae": image_vae(blocks=4)}
    size = {"height": 32, "width": 32, "prior_token_ids": torch.arange(4)[None]}
    return case("GlmImagePipeline", parts, **text(32), **size)


def hidream() -> Case:
    torch.manual_seed(0)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    words = {
        "prompt_embeds_t5": embeds(1, 4, 32),
        "prompt_embeds_llama3": embeds(2, 1, 4, 16),
        "pooled_prompt_embeds": embeds(1, 64),
        "negative_prompt_embeds_t5": embeds(1, 4, 32, seed=2),
        "negative_prompt_embeds_llama3": embeds(2, 1, 4, 16, seed=2),
        "negative_pooled_prompt_embeds": embeds(1, 64, seed=2),
    }
    pipe, arguments = case("HiDreamImagePipeline", {"transformer": transformer, "vae": image_vae()}, **words, **SIZE)
    pipe.default_sample_size = 8  # sizes are scaled up to this
    return pipe, arguments


def ernie() -> Case:
    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=1,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(8, 4, 4),
    )
    words = {"prompt_embeds": [embeds(4, 16)], "negative_prompt_embeds": [embeds(4, 16, seed=2)], "use_pe": False}
    parts = {"transformer": transformer, "vae": build_flux2_klein().vae}
    return case("ErnieImagePipeline", parts, **words, height=32, width=32)


def longcat() -> Case:
    """Counts its prompts, and so cannot do without them."""
    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    parts = {"transformer": transformer, "vae": image_vae(16), "text_encoder": build_qwen_image().text_encoder}
    options = {"prompt": "a cat", "enable_prompt_rewrite": False, "guidance_scale": 1.0}
    return case("LongCatImagePipeline", parts | {"tokenizer": chat_tokenizer()}, **options, **SIZE)


def qwen3_vl(vocab_size: int, layers: int = 1) -> Qwen3VLForConditionalGeneration:
    size = {"hidden_size": 16, "intermediate_size": 16}
    text_config = {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    text_config |= {"rope_parameters": {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e4}}
    vision_config = size | {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text_config | size | {"vocab_size": vocab_size}, vision_config=vision_config)
    )


def ideogram4() -> Case:
    """Reads 13 layers of its encoder, up to the 36th."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": 13 * 16,
        "rope_theta": 10_000,
        "mrope_section": (4, 2, 2),
    }
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    parts = {
        "transformer": Ideogram4Transformer2DModel(**options),
        "unconditional_transformer": Ideogram4Transformer2DModel(**options),
        "vae": build_flux2_klein().vae,
        "text_encoder": qwen3_vl(len(tokenizer), layers=36).model,
        "tokenizer": tokenizer,
    }
    options = {"prompt": "a cat", "guidance_scale": 2.0, "guidance_schedule": None, "max_sequence_length": 8}
    return case("Ideogram4Pipeline", parts, **options, **SIZE)


def dream_lite(name: str) -> Case:
    torch.manual_seed(0)
    unet = DreamLiteUNetModel(
        sample_size=8,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(16, 32),
        cross_attention_dim=16,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tokenizer = chat_tokenizer()
    parts = {"unet": unet, "vae": vae, "tokenizer": tokenizer, "text_encoder": qwen3_vl(len(tokenizer))}
    return case(name, parts, prompt="a cat", max_sequence_length=16, **SIZE)


def lumina() -> Case:
    torch.manual_seed(0)
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=8,
        qk_norm=True,
    )
    masks = MASK | NEGATIVE_MASK
    return case("LuminaPipeline", {"transformer": transformer, "vae": image_vae()}, **text(8), **masks, **SIZE)


def lumina2() -> Case:
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=8,
    )
    masks = MASK | NEGATIVE_MASK
    return case("Lumina2Pipeline", {"transformer": transformer, "vae": image_vae()}, **text(8), **masks, **SIZE)


def ovis() -> Case:
    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    parts = {"transformer": transformer, "vae": image_vae()}
    return case("OvisImagePipeline", parts, **text(32), negative_prompt=None, **SIZE)


def prx(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    is_pixel = name == "PRXPixelPipeline"
    transformer = PRXTransformer2DModel(
        patch_size=1,
        in_channels=3 if is_pixel else 4,
        context_in_dim=8,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[2, 2],
        **({"bottleneck_size": 8, "resolution_embeds": True} if is_pixel else {}),
    )
    parts = {"transformer": transformer} if is_pixel else {"transformer": transformer, "vae": image_vae()}
    masks = {name: value.bool() for name, value in (MASK | NEGATIVE_MASK).items()}
    return case(name, parts, **text(8), **masks, **SIZE, use_resolution_binning=False, **arguments)


def sana(name: str, control_net: bool = False, **arguments: Any) -> Case:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 4,
        "cross_attention_dim": 8,
        "caption_channels": 8,
        "sample_size": 32,
    }
    parts = {"transformer": SanaTransformer2DModel(**options), "vae": deep_compression_vae()}
    if control_net:
        parts["controlnet"] = SanaControlNetModel(**options)
    size = {"height": 32, "width": 32, "use_resolution_binning": False}
    return case(name, parts, **text(8), **MASK, **NEGATIVE_MASK, **size, negative_prompt=None, **arguments)


PIPELINES = {
    "AuraFlowPipeline": aura_flow,
    "BriaPipeline": bria,
    "BriaFiboPipeline": partial(bria_fibo, "BriaFiboPipeline"),
    "BriaFiboEditPipeline": partial(
        bria_fibo,
        "BriaFiboEditPipeline",
        image=picture(64),
        mask=mask(64),
        _auto_resize=False,
        prompt='{"edit_instruction": "a cat"}',
    ),
    "BriaFibo2Pipeline": bria_fibo2,
    "CogView4Pipeline": partial(cogview4, "CogView4Pipeline"),
    "CogView4ControlPipeline": partial(cogview4, "CogView4ControlPipeline", in_channels=8, control_image=picture()),
    "GlmImagePipeline": glm,
    "HiDreamImagePipeline": hidream,
    "ErnieImagePipeline": ernie,
    "LongCatImagePipeline": longcat,
    "Ideogram4Pipeline": ideogram4,
    "DreamLitePipeline": partial(dream_lite, "DreamLitePipeline"),
    "DreamLiteMobilePipeline": partial(dream_lite, "DreamLiteMobilePipeline"),
    "LuminaPipeline": lumina,
    "Lumina2Pipeline": lumina2,
    "OvisImagePipeline": ovis,
    "PRXPipeline": partial(prx, "PRXPipeline"),
    "PRXPixelPipeline": partial(prx, "PRXPixelPipeline", output_type="pt"),
    "SanaPipeline": partial(sana, "SanaPipeline"),
    "SanaControlNetPipeline": partial(sana, "SanaControlNetPipeline", control_net=True, control_image=picture(32)),
    "SanaPAGPipeline": partial(sana, "SanaPAGPipeline", pag_scale=1.0),
}
