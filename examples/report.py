"""What the examples leave behind beside the weights: a summary, a reward curve, pictures of before and after."""

import json
import os
import textwrap

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.utils import logging


def write_summary(trainer, script, before: dict, after: dict, seconds: float) -> dict:
    """
    Writes `summary.json` and returns what is in it.

    `seconds` are those of training without the two evaluations. `nfe_rollout` counts the sampler's steps for one
    picture, `nfe_rollout_computed` the transformer passes that were computed for it (a group shares its prefix), and
    `steps_trained` the steps of it that are trained.
    """
    args, history = trainer.args, trainer.state.log_history
    rollouts = [entry for entry in history if "nfe" in entry]
    summary: dict = {}
    for when, metrics in (("before", before), ("after", after)):
        if metrics:
            summary[f"reward_{when}"] = metrics["eval_reward"]
            summary[f"reward_{when}_se"] = metrics["eval_reward_se"]
        for name, key in (("wholly_right", "strict"), ("extra_objects", "extra_objects")):
            if f"eval_rewards/{name}/mean" in metrics:
                summary[f"{key}_{when}"] = metrics[f"eval_rewards/{name}/mean"]
                std = metrics[f"eval_rewards/{name}/std"]
                summary[f"{key}_{when}_se"] = std / len(trainer.eval_dataset) ** 0.5
    iterations = trainer.state.global_step / args.optimizer_steps_per_iteration
    summary |= {
        "seconds": seconds,
        "seconds_per_iteration": seconds / max(iterations, 1),
        "iterations": iterations,
        "optimizer_steps": trainer.state.global_step,
        "nfe_rollout": float(np.mean([entry["nfe"] for entry in rollouts])) if rollouts else None,
        "nfe_rollout_computed": float(np.mean([entry["nfe_amortized"] for entry in rollouts])) if rollouts else None,
        "steps_trained": args.window_size,
        "eval_prompts": 0 if trainer.eval_dataset is None else len(trainer.eval_dataset),
        "configuration": {"script": vars(script), "training": trainer.args.to_dict()},
    }
    os.makedirs(args.output_dir, exist_ok=True)
    with open(os.path.join(args.output_dir, "summary.json"), "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=2, default=str)
    return summary


def draw_reward_curve(history: list[dict], output_dir: str) -> None:
    """`reward_curve.png`: the training reward, the held-out reward before and after, and where the window was."""
    train = [(entry["step"], entry["reward"], entry["window/start"]) for entry in history if "reward" in entry]
    held_out = [(e["step"], e["eval_reward"], e.get("eval_reward_se", 0)) for e in history if "eval_reward" in e]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[4, 1], layout="constrained")
    if train:
        steps, rewards, starts = zip(*train, strict=True)
        top.plot(steps, rewards, color="#4477aa", linewidth=1, label="training prompts, mixed ODE-SDE sampler")
        bottom.step(steps, starts, color="#777777", where="post")
    if held_out:
        steps, rewards, errors = zip(*held_out, strict=True)
        top.errorbar(
            steps, rewards, errors, color="#cc3311", fmt="o-", capsize=3, label="held-out prompts, ODE sampler"
        )
    top.set_ylabel("mean reward")
    top.grid(alpha=0.3)
    top.legend(loc="lower right")
    bottom.set_ylabel("window\nstart")
    bottom.set_xlabel("optimizer step")
    figure.savefig(os.path.join(output_dir, "reward_curve.png"), dpi=120)
    plt.close(figure)


def draw_before_after(prompts, before, after, scores_before, scores_after, output_dir: str) -> None:
    """`before_after.png`: the same prompts and seeds in two rows, with the reward under each picture."""
    count = len(prompts)
    figure, axes = plt.subplots(2, count, figsize=(1.6 * count, 4.6), squeeze=False, layout="constrained")
    rows = (("before", before, scores_before), ("after", after, scores_after))
    for row, (when, pictures, scores) in zip(axes, rows, strict=True):
        for axis, prompt, picture, score in zip(row, prompts, pictures, scores, strict=True):
            axis.imshow(np.asarray(picture), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel("not scored" if score is None else f"reward {score:.2f}")
            if when == "before":
                axis.set_title("\n".join(textwrap.wrap(prompt, 18)[:5]), fontsize=8)
        row[0].set_ylabel(when)
    figure.savefig(os.path.join(output_dir, "before_after.png"), dpi=120)
    plt.close(figure)


def check_reload(model: str, args, prompts, expected) -> int:
    """
    Loads the saved LoRA into a fresh stock pipeline with stock calls, and draws the same pictures with it.

    Returns:
        `int`: the largest difference of a pixel's value, of 255, from the trained policy's pictures.

    Raises:
        `RuntimeError`: if the pictures are others.
    """
    logging.set_verbosity_error()  # else diffusers remarks that the LoRA has no part for the text encoder
    pipe = FluxPipeline.from_pretrained(model)
    pipe.load_lora_weights(args.output_dir)
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        prompts,
        height=args.height,
        width=args.width,
        num_inference_steps=args.eval_num_inference_steps or args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        max_sequence_length=args.max_sequence_length,
        generator=[torch.Generator().manual_seed(args.eval_seed + i) for i in range(len(prompts))],
    ).images
    difference = max(
        int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
        for a, b in zip(pictures, expected, strict=True)
    )
    if difference > 8:
        raise RuntimeError(
            f"The LoRA in {args.output_dir} draws other pictures in a stock pipeline than the trained policy did: "
            f"pixels differ by up to {difference} of 255."
        )
    return difference


def in_words(summary: dict, output_dir: str) -> str:
    """The last lines of an example: what was gained, and where to look."""
    lines = [f"\nTrained for {summary['seconds']:.0f} s, {summary['optimizer_steps']} optimizer steps."]
    if "reward_before" in summary:
        values = {key: summary[f"reward_{key}"] for key in ("before", "before_se", "after", "after_se")}
        lines.append(
            "Held-out reward: {before:.3f} +- {before_se:.3f} before, {after:.3f} +- {after_se:.3f} after".format(
                **values
            )
            + f" ({summary['eval_prompts']} prompts that training never saw)."
        )
    if "strict_before" in summary:
        lines.append(
            f"Wholly right pictures: {summary['strict_before']:.0%} before, {summary['strict_after']:.0%} after; "
            f"objects too many, on average: {summary['extra_objects_before']:+.2f} before, "
            f"{summary['extra_objects_after']:+.2f} after."
        )
    if "reload_max_difference" in summary:
        lines.append(
            "The LoRA was loaded into a fresh stock FluxPipeline and drew the same pictures (largest difference of a "
            f"pixel: {summary['reload_max_difference']} of 255)."
        )
    pictures = [name for name in ("before_after.png", "reward_curve.png") if name in os.listdir(output_dir)]
    pictures = [os.path.join(output_dir, name) for name in pictures]
    lines.append(f"Pictures: {' and '.join(pictures)}. Figures: {os.path.join(output_dir, 'summary.json')}.")
    return "\n".join(lines)
