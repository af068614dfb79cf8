"""The end of a training run: `summary.json`, and whether the saved LoRA is the trained one."""

import json
import os
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from ..mixgrpo_config import without_secrets
from ..mixgrpo_trainer import MixGRPOTrainer
from ..policies.loading import one_progress_bar
from .before_after import Example, held_out_prompts


# Name of a toy reward -> its key in the summary
TOY_METRICS = {"wholly_right": "strict", "extra_objects": "extra_objects"}


def check_reload(trainer: MixGRPOTrainer, model: str, examples: list[Example]) -> int:
    """
    Loads the saved LoRA into a new stock pipeline with stock calls, and samples the same images with it.

    Returns:
        `int`: The largest difference of a pixel value, of 255, from the images of the trained policy.

    Raises:
        `RuntimeError`: If the images differ. In half precision they differ by rounding, so that is only reported.
    """
    args = trainer.args
    logging.set_verbosity_error()  # diffusers warns about a LoRA without weights for the text encoders
    with one_progress_bar():
        pipe = DiffusionPipeline.from_pretrained(model, dtype=trainer.pipe.vae.dtype).to(args.device)
    pipe.load_lora_weights(args.output_dir)
    pipe.set_progress_bar_config(disable=True)
    if args.shift is not None:
        pipe.scheduler = pipe.scheduler.from_config(
            pipe.scheduler.config, shift=args.shift, use_dynamic_shifting=False
        )
    images = pipe(
        [example.prompt for example in examples],
        generator=[torch.Generator().manual_seed(args.eval_seed + example.index) for example in examples],
        **trainer.evaluator.policy.call_arguments,
    ).images
    difference = 0
    for image, example in zip(images, examples, strict=True):
        pixels = np.asarray(image, dtype=int) - np.asarray(example.after, dtype=int)
        difference = max(difference, int(np.abs(pixels).max()))
    if difference > 8 and trainer.pipe.vae.dtype == torch.float32:
        raise RuntimeError(
            f"The LoRA in {args.output_dir} must give the images of the trained policy in a stock pipeline, got pixel "
            f"values that differ by up to {difference} of 255."
        )
    return difference


def write_summary(
    trainer: MixGRPOTrainer,
    script: Any,
    before: dict[str, float],
    after: dict[str, float],
    seconds: float,
    reload_max_difference: int | None = None,
) -> dict[str, Any]:
    """
    Writes `summary.json` and returns its content.

    `seconds` is the training time without the two evaluations. `nfe_rollout` is the number of denoising steps of one
    image, `nfe_rollout_computed` the number of forward passes computed for it (a group shares its prefix), and
    `steps_trained` the size of the window.
    """
    args = trainer.args
    num_prompts = len(held_out_prompts(trainer))
    summary: dict[str, Any] = {}
    for when, metrics in (("before", before), ("after", after)):
        if metrics:
            summary[f"reward_{when}"] = metrics["eval_reward"]
            summary[f"reward_{when}_se"] = metrics["eval_reward_se"]
        for name, key in TOY_METRICS.items():
            if f"eval_rewards/{name}/mean" in metrics:
                summary[f"{key}_{when}"] = metrics[f"eval_rewards/{name}/mean"]
                std = metrics[f"eval_rewards/{name}/std"]
                summary[f"{key}_{when}_se"] = std / num_prompts**0.5
    rollouts = [entry for entry in trainer.state.log_history if "nfe" in entry]
    iterations = trainer.state.global_step / args.optimizer_steps_per_iteration
    summary |= {
        "seconds": seconds,
        "seconds_per_iteration": seconds / max(iterations, 1),
        "iterations": iterations,
        "optimizer_steps": trainer.state.global_step,
        "nfe_rollout": float(np.mean([entry["nfe"] for entry in rollouts])) if rollouts else None,
        "nfe_rollout_computed": float(np.mean([entry["nfe_amortized"] for entry in rollouts])) if rollouts else None,
        "steps_trained": args.window_size,
        "eval_prompts": num_prompts,
        "configuration": {"script": without_secrets(vars(script)), "training": args.to_dict()},
    }
    if reload_max_difference is not None:
        summary["reload_max_difference"] = reload_max_difference
    os.makedirs(args.output_dir, exist_ok=True)
    with open(os.path.join(args.output_dir, "summary.json"), "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=2, default=str)
    return summary


def in_words(summary: dict[str, Any], output_dir: str) -> str:
    """The summary for the terminal: the gain, and the files."""
    lines = [f"\nTraining took {summary['seconds']:.0f} s for {summary['optimizer_steps']} optimizer steps."]
    if "reward_before" in summary:
        before = f"{summary['reward_before']:.3f} ± {summary['reward_before_se']:.3f}"
        after = f"{summary['reward_after']:.3f} ± {summary['reward_after_se']:.3f}"
        lines.append(
            f"Held-out reward: {before} before training, {after} after "
            f"(mean and standard error over {summary['eval_prompts']} prompts that are not trained on)."
        )
    if "strict_before" in summary:
        before = f"{summary['strict_before']:.1%} ± {summary['strict_before_se']:.1%}"
        after = f"{summary['strict_after']:.1%} ± {summary['strict_after_se']:.1%}"
        lines.append(f"Images that match the prompt exactly: {before} before, {after} after.")
        lines.append(
            f"Extra objects per image: {summary['extra_objects_before']:+.2f} before, "
            f"{summary['extra_objects_after']:+.2f} after."
        )
    if "reload_max_difference" in summary:
        lines.append(
            "Reload check: the saved LoRA in a stock pipeline gives the images of the trained policy "
            f"(largest pixel difference: {summary['reload_max_difference']} of 255)."
        )
    names = ["reward_curve.png", "summary.json", "report.html"]
    if os.path.exists(os.path.join(output_dir, "by_window.png")):
        names.insert(1, "by_window.png")
    if summary["eval_prompts"] > 0:
        names.insert(0, "before_after.png")
    files = [os.path.join(output_dir, name) for name in names]
    lines.append(f"Files: {', '.join(files)}")
    return "\n".join(lines)
