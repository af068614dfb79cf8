"""Builds the bundled tiny FLUX pipeline from scratch: training images, VAE, text encoders and rectified flow.

    python examples/build_toy_flux.py --output toy_flux

Each stage saves checkpoints in `<output>/build`. Run the same command again to resume after an interruption.
A share of the words in the training captions is wrong on purpose, as in captions from the web: the model renders well
but follows prompts poorly, and reinforcement learning closes that gap.
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from diffusers_mixgrpo.toy.reward import judge
from diffusers_mixgrpo.toy.scenes import Scene, all_captions, caption, draw, is_held_out, misdescribe, parse


TEXT_LENGTHS = [12, 32, 128, 512]  # T5 lengths in training: FLUX does not mask padding, so each has to be learned
TEXT_WEIGHTS = [0.93, 0.04, 0.02, 0.01]


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    build = Path(args.output) / "build"
    build.mkdir(parents=True, exist_ok=True)

    scenes, images = make_images(args.images, args.seed)
    vae = train_vae(images, args, build)
    latents = encode(vae, images, args, build / "latents.pt")
    pipe = train_flow(vae, latents, scenes, args, build)
    save(pipe, args.output)
    print(json.dumps(evaluate(FluxPipeline.from_pretrained(args.output).to(args.device)), indent=2))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", default="toy_flux", help="folder for the pipeline and the checkpoints")
    parser.add_argument("--images", type=int, default=20_000, help="number of training images")
    parser.add_argument("--wrong_words", type=float, default=0.06, help="probability that an attribute is wrong")
    parser.add_argument("--vae_steps", type=int, default=4_000)
    parser.add_argument("--flow_steps", type=int, default=3_000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--head_dim", type=int, default=24, help="dimension of each of the 4 heads")
    parser.add_argument("--double_blocks", type=int, default=2)
    parser.add_argument("--single_blocks", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="of Muon, for the matrices in the blocks")
    parser.add_argument("--adamw_learning_rate", type=float, default=1.5e-3, help="of AdamW, for all other weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def make_images(count: int, seed: int) -> tuple[list[Scene], torch.Tensor]:
    """Scenes, two thirds of them with one object, and their images `(count, 3, 64, 64)`, uint8. None is held out."""
    rng = random.Random(seed)
    captions = [text for text in all_captions() if not is_held_out(text)]
    single = [text for text in captions if parse(text).number == 1]
    several = [text for text in captions if parse(text).number > 1]
    scenes = [parse(rng.choice(single if rng.random() < 2 / 3 else several)) for _ in range(count)]
    images = [np.asarray(draw(scene, rng)) for scene in tqdm(scenes, desc="images")]
    return scenes, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def train_vae(images: torch.Tensor, args: argparse.Namespace, build: Path) -> AutoencoderKL:
    """A small AutoencoderKL in FLUX's layout: 8x downsampling, 8 channels, no attention, no quant convolutions."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 48),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).to(args.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)

    def loss(step: int) -> torch.Tensor:
        batch = normalize(images[torch.randint(len(images), (32,))].to(args.device))
        with torch.autocast(batch.device.type, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - batch
        return error.square().mean() + 0.3 * error.abs().mean() + 1e-5 * posterior.kl().float().mean() / 512

    fit("vae", {"vae": vae}, [optimizer], loss, args.vae_steps, args, build / "vae.pt")
    return vae.eval().requires_grad_(False)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Pixel values from uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, args: argparse.Namespace, checkpoint: Path) -> torch.Tensor:
    """Latents of all images, normalized together and packed as in FLUX: `(count, 16 tokens, 32 channels)`."""
    if checkpoint.exists():
        latents = torch.load(checkpoint, map_location=args.device, weights_only=True)
    else:
        batches = [vae.encode(normalize(batch.to(args.device))).latent_dist.mean for batch in images.split(256)]
        latents = torch.cat(batches)
        torch.save(latents, checkpoint)
    mean = latents[:8192].mean().item()
    std = latents[:8192].std().item()
    vae.register_to_config(shift_factor=mean, scaling_factor=1 / std)
    count, channels, height, width = latents.shape
    return FluxPipeline._pack_latents((latents - mean) / std, count, channels, height, width)


def build_pipeline(vae: AutoencoderKL, args: argparse.Namespace) -> FluxPipeline:
    """The other parts in FLUX.1-dev's layout, untrained. The vocabularies contain only the words of the captions."""
    words = sorted({word for text in all_captions() for word in text.split()})
    specials = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted({letter for word in words for letter in word})
    clip_vocab = specials + letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in words:  # merge each word from its letters, left to right
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                clip_vocab.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    clip_vocab = list(dict.fromkeys(clip_vocab))
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(clip_vocab)}, merges, model_max_length=32)
    t5_vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *(("▁" + word, -1.0) for word in words)]
    tokenizer_2 = T5Tokenizer(t5_vocab, extra_ids=0, model_max_length=512)

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_vocab),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,  # pooling looks for it
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(t5_vocab), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    )
    axes = {24: (8, 8, 8), 32: (8, 12, 12)}[args.head_dim]
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=args.double_blocks,
        num_single_layers=args.single_blocks,
        attention_head_dim=args.head_dim,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=axes,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # as FLUX.1-dev's
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).to(args.device)


def train_flow(
    vae: AutoencoderKL, latents: torch.Tensor, scenes: list[Scene], args: argparse.Namespace, build: Path
) -> FluxPipeline:
    """Trains a rectified flow on the latents, and both text encoders together with the transformer."""
    pipe = build_pipeline(vae, args)
    # FLUX.1-dev is trained with zero-initialized modulation and output, which the stock class does not do.
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(".linear") and "norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    models = {
        "transformer": pipe.transformer,
        "text_encoder": pipe.text_encoder,
        "text_encoder_2": pipe.text_encoder_2,
    }
    optimizers = make_optimizers(nn.ModuleDict(models).train(), args)
    rng = random.Random(args.seed + 1)
    mu = calculate_shift(latents.shape[1])
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, args.device, torch.float32)

    def loss(step: int) -> torch.Tensor:
        length = rng.choices(TEXT_LENGTHS, TEXT_WEIGHTS)[0]
        count = args.batch_size * 12 // max(length // 8, 12)  # long texts cost more
        rows = [rng.randrange(len(scenes)) for _ in range(count)]
        texts = [caption(misdescribe(scenes[row], args.wrong_words, rng)) for row in rows]
        prompt_embeds, pooled, text_ids = embed(pipe, texts, length)
        clean = latents[torch.tensor(rows, device=latents.device)]
        noise = torch.randn_like(clean)
        # More often above the middle of the sampler's noise levels, because the layout is decided early
        sigma = torch.sigmoid(1.2 * torch.randn(count, device=args.device) + mu + 0.5)
        velocity = pipe.transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            timestep=sigma,
            guidance=1 + 4 * torch.rand(count, device=args.device),
            pooled_projections=pooled,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity, noise - clean)

    fit("flow", models, optimizers, loss, args.flow_steps, args, build / "flow.pt")
    for model in models.values():
        model.eval()
    return pipe


def make_optimizers(module: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the blocks, AdamW for the rest: this takes a tenth of the steps of AdamW alone."""
    hidden = []
    rest = []
    for name, weight in module.named_parameters():
        in_block = "block" in name or "layers" in name
        is_hidden = in_block and weight.ndim == 2 and "norm" not in name and "bias" not in name
        (hidden if is_hidden else rest).append(weight)
    return [
        torch.optim.Muon(hidden, lr=args.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.adamw_learning_rate, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def embed(pipe: FluxPipeline, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result of `FluxPipeline.encode_prompt`, with gradients."""
    clip = pipe.tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    t5 = pipe.tokenizer_2(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    pooled = pipe.text_encoder(clip.to(pipe.device)).pooler_output
    prompt_embeds = pipe.text_encoder_2(t5.to(pipe.device))[0]
    return prompt_embeds, pooled, torch.zeros(length, 3, device=pipe.device)


def fit(
    name: str,
    models: dict[str, nn.Module],
    optimizers: list[torch.optim.Optimizer],
    loss: Callable[[int], torch.Tensor],
    steps: int,
    args: argparse.Namespace,
    checkpoint: Path,
    ema_decay: float = 0.998,
) -> None:
    """
    Runs `steps` optimizer steps with warm-up and cosine decay, from the checkpoint if there is one. Afterwards the
    models have the averaged weights.
    """
    module = nn.ModuleDict(models)
    weights = list(module.parameters())
    average = [weight.detach().clone() for weight in weights]
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        module.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        average = state["average"]
        start = state["step"]
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=5)
    for step in bar:
        factor = min(1.0, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * factor
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {
                "model": module.state_dict(),
                "average": average,
                "step": step + 1,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    with torch.no_grad():
        for weight, mean in zip(weights, average, strict=True):
            weight.copy_(mean)


def save(pipe: FluxPipeline, output: str) -> None:
    """Saves the two large parts as float16, in half the size. `from_pretrained` computes in float32 by default."""
    pipe.save_pretrained(output)
    for name in ("transformer", "vae"):
        part = getattr(pipe, name)
        part.half().save_pretrained(Path(output) / name)
        part.float()


@torch.no_grad()
def evaluate(pipe: FluxPipeline, count: int = 253, steps: int = 10, max_sequence_length: int = 12) -> dict[str, float]:
    """Held-out captions in the stock pipeline: reward, share of exact matches, extra objects."""
    pipe.set_progress_bar_config(disable=True)
    texts = [text for text in all_captions() if is_held_out(text)]
    random.Random(0).shuffle(texts)
    texts = texts[:count]
    verdicts = []
    for start in range(0, len(texts), 128):
        batch = texts[start : start + 128]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images = pipe(
            batch,
            height=64,
            width=64,
            num_inference_steps=steps,
            max_sequence_length=max_sequence_length,
            generator=generators,
        ).images
        verdicts += [judge(text, image) for text, image in zip(batch, images, strict=True)]
    scores = [verdict.score for verdict in verdicts]
    return {
        "prompts": len(verdicts),
        "reward": float(np.mean(scores)),
        "reward_se": float(np.std(scores) / len(verdicts) ** 0.5),
        "strict": float(np.mean([verdict.right for verdict in verdicts])),
        "extra_objects": float(np.mean([verdict.drawn - verdict.wanted for verdict in verdicts])),
        "wrong_count": float(np.mean([verdict.drawn != verdict.wanted for verdict in verdicts])),
    }


if __name__ == "__main__":
    main()
