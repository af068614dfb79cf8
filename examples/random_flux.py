"""A FLUX pipeline of FLUX.1-dev's size with random weights, which needs no download, and its number of operations."""

from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

from diffusers_mixgrpo import toy


T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


def build_flux_dev(args: Any, device: torch.device) -> FluxPipeline:
    """
    FLUX.1-dev's transformer and VAE with random weights.

    The text encoders have one layer each, because they only run once per iteration, unless `args.text_encoders` asks
    for those of full size.
    """
    parts = toy.load().components
    num_double, num_single = args.flux_dev_layers or (19, 38)
    clip_config = parts["text_encoder"].config.to_dict() | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 1,
    }
    t5_config = parts["text_encoder_2"].config.to_dict() | {"d_model": 4096, "d_ff": 1024, "num_layers": 1}
    if args.text_encoders != "one_layer" and not args.flux_dev_layers:
        clip_config["num_hidden_layers"] = 12
        t5_config = T5_XXL | {"vocab_size": t5_config["vocab_size"]}
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            parts["transformer"] = FluxTransformer2DModel(
                num_layers=num_double,
                num_single_layers=num_single,
                num_attention_heads=args.flux_dev_heads,
                guidance_embeds=True,
            )
            parts["text_encoder"] = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip_config))
            parts["text_encoder_2"] = transformers.T5EncoderModel(transformers.T5Config(**t5_config))
            parts["vae"] = AutoencoderKL(
                block_out_channels=(32,) * 4 if args.flux_dev_layers else (128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=16,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
            if args.load_in_4bit:
                quantize(parts["transformer"], "blocks")
            if args.text_encoders == "full_4bit":
                quantize(parts["text_encoder_2"], "block")
    finally:
        torch.set_default_dtype(torch.float32)
    return FluxPipeline(**parts)


def quantize(model: torch.nn.Module, blocks: str) -> None:
    """Make the linear layers whose names have `blocks` in them 4-bit, as `from_pretrained` does with saved weights."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError(
            f"`load_in_4bit` needs bitsandbytes ({error}). Install it with "
            '`pip install "diffusers-mixgrpo[quantization]"`.'
        ) from error
    for name, module in list(model.named_modules()):
        # transformers leaves T5's `wo` as it is.
        if isinstance(module, torch.nn.Linear) and blocks in name and not name.endswith(".wo"):
            small = bnb.nn.Linear4bit(
                module.in_features, module.out_features, compute_dtype=module.weight.dtype, quant_type="nf4"
            )
            weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            small.weight = weight.to(module.weight.device)
            small.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, small)
    model.is_loaded_in_4bit = True  # peft checks this flag


def iteration_flops(pipe: FluxPipeline, settings: dict[str, Any], passes: dict[str, float], full: bool) -> float:
    """
    Operations of the transformer's matrix products in one iteration, without those of the LoRA.

    A backward pass costs two forward passes, one for the activations and one for the weights. A LoRA saves the latter,
    except in the attention, which has no weights. Recomputation by gradient checkpointing is not counted.
    """
    image_tokens = settings["height"] * settings["width"] // (2 * pipe.vae_scale_factor) ** 2
    linear, attention = pass_flops(pipe.transformer.config, image_tokens, settings["max_sequence_length"])
    trained = passes["window" if settings.get("reuse_rollout_graph") else "replay_forward"]
    forward_flops = sum(passes.values()) * (linear + attention)
    backward_flops = trained * (linear * (1 + full) + 2 * attention)
    return forward_flops + backward_flops


def pass_flops(config: Any, image_tokens: int, text_tokens: int) -> tuple[float, float]:
    """Operations of one image's forward pass: in linear layers, and between queries, keys and values."""
    double = config.num_layers
    single = config.num_single_layers
    tokens = image_tokens + text_tokens
    width = config.num_attention_heads * config.attention_head_dim
    blocks = width**2 * 12 * (double + single) * tokens
    modulation = width**2 * (12 * double + 3 * single + 2)
    embeddings = width * (2 * config.in_channels * image_tokens + config.joint_attention_dim * text_tokens)
    embeddings += (1 + config.guidance_embeds) * width * (256 + width)
    embeddings += width * (config.pooled_projection_dim + width)
    attention = 4.0 * tokens**2 * width * (double + single)
    return 2.0 * (blocks + modulation + embeddings), attention
