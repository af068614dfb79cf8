"""A miniature FLUX with random weights, and small trainers of it: what many tests share."""

import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from filelock import FileLock
from peft import LoraConfig
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, PipelinePolicy, Trajectory


PROMPTS = [{"prompt": text, "tag": i} for i, text in enumerate(["a cat", "two dogs", "sea", "red", "blue tree"])]

# Two prompts with four images each per iteration, two optimizer steps in each, on the miniature pipeline
SMALL: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 5,
    "max_sequence_length": 12,
    "window_size": 2,
    "window_interval": 1,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "epsilon": 1e-2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "logging_images_steps": None,
    "use_cpu": True,
    "disable_tqdm": True,
}


def build_pipeline(seed: int = 0, guidance_embeds: bool = True, dynamic_shift: bool = True) -> FluxPipeline:
    """Images of 32x32 (4 latent channels, 2x down): 64 packed tokens of 16. T5 and CLIP read single characters."""
    torch.manual_seed(seed)
    letters = list(string.ascii_lowercase)
    clip_vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(clip_vocab)}, [], model_max_length=16)
    t5_vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer_2 = T5Tokenizer(t5_vocab + [(letter, -3.0) for letter in letters], extra_ids=0, model_max_length=512)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer_2), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def redness(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float]:
    """A reward for the images of the miniature pipeline: how much more red than green they are."""
    pixels = np.stack([np.asarray(image, dtype=float) for image in images]) / 255
    return (pixels[..., 0] - pixels[..., 1]).mean((1, 2)).tolist()


def small_config(output_dir: str | Path, **changes: Any) -> MixGRPOConfig:
    """`SMALL` with changes."""
    return MixGRPOConfig(output_dir=str(output_dir), **(SMALL | changes))


def make_trainer(
    output_dir: str | Path,
    pipe: Any = None,
    rewards: Any = redness,
    lora: bool | LoraConfig = True,
    train_dataset: Any = PROMPTS,
    eval_dataset: Any = None,
    callbacks: Any = None,
    optimizers: Any = (None, None),
    eval_reward_funcs: Any = None,
    **changes: Any,
) -> MixGRPOTrainer:
    """
    A trainer with `SMALL` and changes to it. Without `pipe` it trains a new miniature pipeline.

    `lora` is `True` for a LoRA of rank 4, `False` for full fine-tuning, or the LoRA's own configuration.
    """
    return MixGRPOTrainer(
        model=build_pipeline() if pipe is None else pipe,
        reward_funcs=rewards,
        args=small_config(output_dir, **changes),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=LoraConfig(r=4, lora_alpha=8) if lora is True else lora or None,
        callbacks=callbacks,
        optimizers=optimizers,
        eval_reward_funcs=eval_reward_funcs,
    )


def trained(trainer: MixGRPOTrainer) -> dict[str, torch.Tensor]:
    """Copies of the trained weights."""
    return {n: p.detach().clone() for n, p in trainer.pipe.transformer.named_parameters() if p.requires_grad}


def logged(trainer: MixGRPOTrainer, name: str) -> list[float]:
    """The values of a metric in the order in which they were logged."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_the_ratio_is_one(policy: PipelinePolicy, trajectory: Trajectory) -> None:
    """
    Replayed before any update, in batches of any size, the 8 transitions have the log-probs of the rollout.

    A log-prob is a mean over elements whose velocity rounds differently in other batches: by a few units of 2^-23
    times the number of layers. Guidance multiplies the difference of two passes, and `cps` divides by small stds at
    late steps.
    """
    images, steps = trajectory.transition_indices()
    assert len(images) == 8
    for size in (1, 3, 8):
        for part in torch.arange(len(images)).split(size):
            with torch.no_grad():
                replay = trajectory.replay(policy, images[part], steps[part])
            ratio = torch.exp(replay.log_probs - trajectory.log_probs[images[part], steps[part]])
            assert (ratio - 1).abs().max() <= 1e-5


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float) -> None:
    """The same names and values: bit for bit, unless a tolerance is given."""
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name, **({"rtol": 0, "atol": 0} | tolerance))


def once(tmp_path_factory: Any, name: str, make: Callable[[Path], None]) -> Path:
    """
    A folder that `make` has filled, one for all test processes: the first fills it, and the others wait for it.
    """
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder
