"""The report of `train_flux_mixgrpo.py`: a summary, a reward curve, and images from before and after training.

It needs the optional packages of `pip install "diffusers-mixgrpo[demo]"`. The other examples import these from here,
so that a missing one is reported in the same way, and before any work is done.
"""

import json
import math
import os
import random
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


try:
    import matplotlib
    import yaml
except ImportError as error:
    raise ImportError(
        f'The examples need matplotlib and PyYAML ({error}). Run `pip install "diffusers-mixgrpo[demo]"`.'
    ) from error

matplotlib.use("Agg")  # draws into files, without a display

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from PIL import Image  # noqa: E402

from diffusers_mixgrpo import MixGRPOTrainer, hybrid_inference  # noqa: E402
from diffusers_mixgrpo.core.advantages import combine_rewards  # noqa: E402
from diffusers_mixgrpo.mixgrpo_config import without_secrets  # noqa: E402


METHOD_NAMES = {
    "dancegrpo": "DanceGRPO",
    "flow-grpo": "Flow-GRPO",
    "mixgrpo": "MixGRPO",
    "mixgrpo-flash": "MixGRPO-Flash",
    "mixgrpo-flash-star": "MixGRPO-Flash*",
}
MOST_GAINED = "Largest gains"
MOST_LOST = "Largest losses"
RANDOM = "Random"
FIRST = "First held-out prompts"
CHOICE_RULE = "Held-out prompts: the 2 largest gains, the 2 largest losses, and 4 of the others at random (seed 0)"
GROUP_COLORS = {MOST_GAINED: "#e3f1e3", MOST_LOST: "#f9e3e0", RANDOM: "#ececec", FIRST: "#ececec"}
NUM_FIRST = 8
# Name of a toy reward -> its key in the summary
TOY_METRICS = {"wholly_right": "strict", "extra_objects": "extra_objects"}


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


# ---- Evaluations ----


@dataclass
class Evaluation:
    """
    The trainer's evaluation on the held-out prompts.

    Attributes:
        metrics (`dict[str, float]`): The result of `trainer.evaluate()`.
        scores (`list[float]`): The weighted reward of each prompt, NaN where an image could not be scored.
        first_images (`list[PIL.Image.Image]`): Images of the first prompts, in full fine-tuning.
    """

    metrics: dict[str, float]
    scores: list[float]
    first_images: list[Image.Image]


@dataclass
class Example:
    """One held-out prompt before and after training. `index` is its place in the dataset."""

    group: str
    index: int
    prompt: str
    before: Image.Image
    after: Image.Image
    score_before: float
    score_after: float


def evaluate(trainer: MixGRPOTrainer) -> Evaluation:
    """Evaluates on the trainer's held-out prompts, if there are any."""
    if trainer.eval_dataset is None:
        return Evaluation(metrics={}, scores=[], first_images=[])
    metrics = trainer.evaluate()
    scores = combine_rewards(trainer.eval_rewards, trainer.engine.reward_weights).tolist()
    first_images = []
    if not trainer.weights.is_lora:
        first_images = trainer.sample_images(_prompts(trainer)[:NUM_FIRST])
    return Evaluation(metrics, scores, first_images)


def sample_examples(trainer: MixGRPOTrainer, before: Evaluation, after: Evaluation) -> list[Example]:
    """
    The images of some held-out prompts, with the seeds of the evaluation. Call it after training.

    With a LoRA the prompts are those of [`choose_examples`], since the images from before training can be sampled
    afterwards, without the LoRA. Full fine-tuning changes the weights themselves: there they are the first prompts.
    """
    prompts = _prompts(trainer)
    if trainer.weights.is_lora:
        groups = choose_examples(before.scores, after.scores)
    else:
        groups = {FIRST: list(range(len(before.first_images)))}
    indices = [index for group in groups.values() for index in group]
    if not indices:
        return []
    images_before, images_after = before.first_images, after.first_images
    if trainer.weights.is_lora:
        chosen = [prompts[index] for index in indices]
        seeds = [trainer.args.eval_seed + index for index in indices]
        images_after = trainer.sample_images(chosen, seeds)
        with hybrid_inference(trainer.pipe, trained_ratio=0):
            images_before = trainer.sample_images(chosen, seeds)
    images = zip(images_before, images_after, strict=True)
    examples = []
    for group, members in groups.items():
        for index in members:
            image_before, image_after = next(images)
            example = Example(
                group=group,
                index=index,
                prompt=prompts[index],
                before=image_before,
                after=image_after,
                score_before=before.scores[index],
                score_after=after.scores[index],
            )
            examples.append(example)
    return examples


def choose_examples(before: list[float], after: list[float]) -> dict[str, list[int]]:
    """
    The indices of the prompts to show, by group: see `CHOICE_RULE`.

    Prompts whose score did not change, or that have no score, can only be drawn at random.
    """
    changes = [b - a for a, b in zip(before, after, strict=True)]
    scored = [index for index, change in enumerate(changes) if not math.isnan(change)]
    ranked = sorted(scored, key=lambda index: -changes[index])
    gains = [index for index in ranked[:2] if changes[index] > 0]
    losses = [index for index in reversed(ranked[-2:]) if changes[index] < 0]
    others = [index for index in range(len(changes)) if index not in gains + losses]
    drawn = random.Random(0).sample(others, min(4, len(others)))
    return {MOST_GAINED: gains, MOST_LOST: losses, RANDOM: drawn}


def _prompts(trainer: MixGRPOTrainer) -> list[str]:
    dataset = trainer.eval_dataset
    return [] if dataset is None else [dataset[i]["prompt"] for i in range(len(dataset))]


# ---- Figures ----


def draw_reward_curve(history: list[dict], output_dir: str) -> None:
    """`reward_curve.png`: training reward, held-out reward before and after, and the start of the window."""
    training = [entry for entry in history if "reward" in entry]
    held_out = [entry for entry in history if "eval_reward" in entry]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[4, 1], layout="constrained")
    if training:
        steps = [entry["step"] for entry in training]
        rewards = [entry["reward"] for entry in training]
        starts = [entry["window/start"] for entry in training]
        top.plot(steps, rewards, color="#4477aa", linewidth=1, label="training prompts, mixed ODE-SDE sampling")
        bottom.step(steps, starts, color="#777777", where="post")
    if held_out:
        steps = [entry["step"] for entry in held_out]
        rewards = [entry["eval_reward"] for entry in held_out]
        errors = [entry.get("eval_reward_se", 0) for entry in held_out]
        label = "held-out prompts, ODE sampling (± standard error)"
        top.errorbar(steps, rewards, errors, color="#cc3311", fmt="o-", capsize=3, label=label)
    top.set_title("Reward during training")
    top.set_ylabel("mean reward")
    top.grid(alpha=0.3)
    top.legend(loc="lower right")
    bottom.set_ylabel("window\nstart")
    bottom.yaxis.get_major_locator().set_params(integer=True)
    bottom.set_xlabel("optimizer step")
    figure.savefig(os.path.join(output_dir, "reward_curve.png"), dpi=120)
    plt.close(figure)


def draw_by_window(histories: Mapping[str, list[dict[str, float]]], file: str | os.PathLike) -> bool:
    """
    The gradient's norm, the spread of rewards and the share of clipped transitions at each place of the window.

    Args:
        histories (`dict[str, list[dict]]`): `trainer.state.log_history` of one run or several, by their labels.
        file (`str` or `os.PathLike`): Where to draw.

    Returns:
        `bool`: False if no window has moved. Then there is nothing to draw.
    """
    panels = {
        "grad_norm": "gradient norm before clipping",
        "reward_std": "std of rewards in a group",
        "clip_ratio": "share of clipped transitions",
    }
    curves = {(label, name): _by_window(history, name) for label, history in histories.items() for name in panels}
    if max(map(len, curves.values()), default=0) < 2:
        return False
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for label in histories:
            curve = curves[label, name]
            if len(curve) < 2:
                continue  # a window that does not move
            axis.plot(curve.keys(), curve.values(), marker="o", markersize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("first step of the window")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if any(value > 0 for label in histories for value in curves[label, "grad_norm"].values()):
        axes[0].set_yscale("log")
    if len(histories) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


def _by_window(history: list[dict[str, float]], name: str) -> dict[int, float]:
    """The mean of a measurement at each place of the window, in the order of the places."""
    values: dict[int, list[float]] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith(f"{name}_by_window/"):
                values.setdefault(int(key.rsplit("/", 1)[1]), []).append(value)
    return {place: float(np.mean(values[place])) for place in sorted(values)}


def draw_before_after(examples: list[Example], output_dir: str) -> None:
    """`before_after.png`: each prompt's images before and after training, and their rewards."""
    columns = min(4, len(examples))
    rows = math.ceil(len(examples) / columns)
    figure = plt.figure(figsize=(2.5 * columns, 1.95 * rows + 0.3), layout="constrained")
    panels = figure.subfigures(rows, columns, squeeze=False, hspace=0.04, wspace=0.03).flatten()
    titles = [_example_title(example) for example in examples]
    most_lines = max(title.count("\n") for title in titles)
    for panel, example, title in zip(panels, examples, titles, strict=False):
        panel.set_facecolor(GROUP_COLORS[example.group])
        panel.suptitle(title + "\n" * (most_lines - title.count("\n")), fontsize=8.5)
        left, right = panel.subplots(1, 2)
        _show(left, example.before, "before", example.score_before)
        _show(right, example.after, "after", example.score_after)
    has_rule = any(example.group != FIRST for example in examples)
    note = f"{CHOICE_RULE if has_rule else FIRST}. Numbers are rewards."
    figure.supxlabel(textwrap.fill(note, 36 * columns), fontsize=8.5)
    figure.savefig(os.path.join(output_dir, "before_after.png"), dpi=160)
    plt.close(figure)


def _example_title(example: Example) -> str:
    change = example.score_after - example.score_before
    change_text = "not scored" if math.isnan(change) else f"{change:+.2f}"
    prompt = textwrap.wrap(example.prompt, 32)[:3]
    return "\n".join([f"{example.group}: {change_text}", *prompt])


def _show(axes: Any, image: Image.Image, when: str, score: float) -> None:
    axes.imshow(np.asarray(image), interpolation="nearest" if image.width <= 128 else "auto")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(when if math.isnan(score) else f"{when}: {score:.2f}", fontsize=8.5)


# ---- Numbers ----


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
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=trainer.pipe.vae.dtype).to(args.device)
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
    summary: dict[str, Any] = {}
    for when, metrics in (("before", before), ("after", after)):
        if metrics:
            summary[f"reward_{when}"] = metrics["eval_reward"]
            summary[f"reward_{when}_se"] = metrics["eval_reward_se"]
        for name, key in TOY_METRICS.items():
            if f"eval_rewards/{name}/mean" in metrics:
                summary[f"{key}_{when}"] = metrics[f"eval_rewards/{name}/mean"]
                std = metrics[f"eval_rewards/{name}/std"]
                summary[f"{key}_{when}_se"] = std / len(trainer.eval_dataset) ** 0.5
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
        "eval_prompts": 0 if trainer.eval_dataset is None else len(trainer.eval_dataset),
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
    names = ["reward_curve.png", "summary.json"]
    if os.path.exists(os.path.join(output_dir, "by_window.png")):
        names.insert(1, "by_window.png")
    if summary["eval_prompts"] > 0:
        names.insert(0, "before_after.png")
    files = [os.path.join(output_dir, name) for name in names]
    lines.append(f"Files: {', '.join(files)}")
    return "\n".join(lines)
