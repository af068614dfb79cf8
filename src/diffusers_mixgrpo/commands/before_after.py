"""Held-out prompts before and after training: their rewards, and images of some of them."""

import math
import os
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..core.advantages import combine_rewards
from ..hybrid_inference import hybrid_inference
from ..mixgrpo_trainer import MixGRPOTrainer
from .figures import plt


MOST_GAINED = "Largest gains"
MOST_LOST = "Largest losses"
RANDOM = "Random"
FIRST = "First held-out prompts"
CHOICE_RULE = "Held-out prompts: the 2 largest gains, the 2 largest losses, and 4 of the others at random (seed 0)"
GROUP_COLORS = {MOST_GAINED: "#e3f1e3", MOST_LOST: "#f9e3e0", RANDOM: "#ececec", FIRST: "#ececec"}
NUM_FIRST = 8


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
    """
    One held-out prompt before and after training. `index` is its place in the dataset; `condition` is the image that
    was edited, if there is one.
    """

    group: str
    index: int
    prompt: str
    before: Image.Image
    after: Image.Image
    score_before: float
    score_after: float
    condition: Image.Image | None = None


def evaluate(trainer: MixGRPOTrainer) -> Evaluation:
    """Evaluates on the trainer's held-out prompts, if there are any."""
    if trainer.eval_dataset is None:
        return Evaluation(metrics={}, scores=[], first_images=[])
    metrics = trainer.evaluate()
    assert trainer.eval_rewards is not None
    scores = combine_rewards(trainer.eval_rewards, trainer.engine.reward_weights).tolist()
    first_images = []
    if not trainer.weights.is_lora:
        assert not isinstance(trainer.eval_dataset, (dict, type(None)))
        first_images = _sample(trainer, range(min(NUM_FIRST, len(trainer.eval_dataset))))
    return Evaluation(metrics, scores, first_images)


def sample_examples(trainer: MixGRPOTrainer, before: Evaluation, after: Evaluation) -> list[Example]:
    """
    The images of some held-out prompts, with the seeds of the evaluation. Call it after training.

    With a LoRA the prompts are those of [`choose_examples`], since the images from before training can be sampled
    afterwards, without the LoRA. Full fine-tuning changes the weights themselves: there they are the first prompts.
    """
    if trainer.weights.is_lora:
        groups = choose_examples(before.scores, after.scores)
    else:
        groups = {FIRST: list(range(len(before.first_images)))}
    indices = [index for group in groups.values() for index in group]
    if not indices:
        return []
    assert not isinstance(trainer.eval_dataset, (dict, type(None)))
    images_before, images_after = before.first_images, after.first_images
    if trainer.weights.is_lora:
        images_after = _sample(trainer, indices)
        with hybrid_inference(trainer.pipe, trained_ratio=0):
            images_before = _sample(trainer, indices)
    policy = trainer.evaluator.policy
    images = zip(images_before, images_after, strict=True)
    examples = []
    for group, members in groups.items():
        for index in members:
            image_before, image_after = next(images)
            row = trainer.eval_dataset[index]
            example = Example(
                group=group,
                index=index,
                prompt=row["prompt"],
                before=image_before,
                after=image_after,
                score_before=before.scores[index],
                score_after=after.scores[index],
                condition=policy.fit_image(row["image"]) if policy.takes_image else None,
            )
            examples.append(example)
    return examples


def _sample(trainer: MixGRPOTrainer, indices: Sequence[int]) -> list[Image.Image]:
    """Images of held-out prompts with the seeds of the evaluation."""
    assert not isinstance(trainer.eval_dataset, (dict, type(None)))
    rows = [trainer.eval_dataset[index] for index in indices]
    images = [row["image"] for row in rows] if trainer.evaluator.policy.takes_image else None
    seeds = [trainer.args.eval_seed + index for index in indices]
    return trainer.sample_images([row["prompt"] for row in rows], seeds, images)


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


def held_out_prompts(trainer: MixGRPOTrainer) -> list[str]:
    dataset = trainer.eval_dataset
    if dataset is None:
        return []
    assert not isinstance(dataset, dict)
    return [dataset[i]["prompt"] for i in range(len(dataset))]


def draw_before_after(examples: list[Example], output_dir: str) -> None:
    """`before_after.png`: each prompt's images before and after training, and their rewards; first the one edited."""
    columns = min(4, len(examples))
    rows = math.ceil(len(examples) / columns)
    parts = 2 if examples[0].condition is None else 3
    figure = plt.figure(figsize=(1.25 * parts * columns, 1.95 * rows + 0.3), layout="constrained")
    panels = figure.subfigures(rows, columns, squeeze=False, hspace=0.04, wspace=0.03).flatten()
    titles = [_example_title(example) for example in examples]
    most_lines = max(title.count("\n") for title in titles)
    for panel, example, title in zip(panels, examples, titles, strict=False):
        panel.set_facecolor(GROUP_COLORS[example.group])
        panel.suptitle(title + "\n" * (most_lines - title.count("\n")), fontsize=8.5)
        *first, left, right = panel.subplots(1, parts)
        if example.condition is not None:
            _show(first[0], example.condition, "image to edit", math.nan)
        _show(left, example.before, "before", example.score_before)
        _show(right, example.after, "after", example.score_after)
    has_rule = any(example.group != FIRST for example in examples)
    note = f"{CHOICE_RULE if has_rule else FIRST}. Numbers are rewards."
    figure.supxlabel(textwrap.fill(note, 18 * parts * columns), fontsize=8.5)
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
