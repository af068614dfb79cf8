"""
Images to look at while training: those of fixed prompts and seeds, and the best and the worst group trained on.

What is done with them, on disk and in trackers, is the matter of `reports/`.
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn

from ..core.advantages import combine_rewards
from ..mixgrpo_config import MixGRPOConfig
from .engine import Engine, Rollout
from .evaluation import Evaluator
from .plan import PromptDataset, Row


@dataclass(frozen=True)
class Sample:
    """
    An image with its scores.

    Args:
        prompt (`str`): Its prompt.
        image (`PIL.Image.Image`): The image.
        rewards (`dict[str, float | None]`): The score of each reward by name, `None` if it could not be scored.
        reward (`float`, *optional*): The weighted sum of the trained rewards, `None` if one of them is missing.
        seed (`int`, *optional*): The seed of a fixed prompt's image.
        advantage (`float`, *optional*): The advantage of an image that is trained on.
        condition (`PIL.Image.Image`, *optional*): The image that was edited, of a fixed prompt.
    """

    prompt: str
    image: Image.Image
    rewards: dict[str, float | None]
    reward: float | None
    seed: int | None = None
    advantage: float | None = None
    condition: Image.Image | None = None


@dataclass(frozen=True)
class SampleGroup:
    """
    A group of images that is trained on, of one prompt.

    Args:
        which (`str`): `"best"` or `"worst"` of the iteration, by the mean of its rewards.
        window_start (`int`): The first stochastic step of the images.
        samples (`list[Sample]`): The images.
    """

    which: str
    window_start: int
    samples: list[Sample]


@dataclass(frozen=True)
class Samples:
    """
    What there is to see at one optimizer step.

    Args:
        step (`int`): The number of optimizer steps taken.
        max_steps (`int`): That of the whole run.
        fixed (`list[Sample]`): The images of the fixed prompts and seeds, those of one prompt in a row.
        images_per_prompt (`int`): How many of them one prompt has.
        groups (`list[SampleGroup]`): The best and the worst group of the iteration that begins at this step: only the
            best if there is one group, and none after the last iteration.
    """

    step: int
    max_steps: int
    fixed: list[Sample]
    images_per_prompt: int
    groups: list[SampleGroup]


def are_due(settings: MixGRPOConfig, step: int, max_steps: int) -> bool:
    """Whether an iteration that begins at `step` is the first one at or after a multiple of the interval."""
    interval = settings.logging_images_steps
    if interval is None:
        return False
    steps = math.ceil(interval * max_steps) if interval < 1 else int(interval)
    return step % steps < settings.optimizer_steps_per_iteration


def fixed_rows(settings: MixGRPOConfig, dataset: PromptDataset) -> tuple[list[Row], list[int]]:
    """
    The rows and seeds of the images that a grid shows, those of one prompt in a row.

    The first two images of a prompt are those of an evaluation on the same dataset: prompt `i` of `n` has the seeds
    `eval_seed + i`, `eval_seed + n + i`, ....
    """
    count = min(settings.num_logged_prompts, len(dataset))
    places = [(i, j) for i in range(count) for j in range(settings.num_logged_seeds)]
    return [dict(dataset[i]) for i, _ in places], [settings.eval_seed + j * len(dataset) + i for i, j in places]


def sample_fixed(
    evaluator: Evaluator, rows: Sequence[Row], seeds: Sequence[int], transformer: nn.Module | None = None
) -> list[Sample]:
    """
    Sample and score the images of fixed prompts and seeds. All ranks must call this, and each gets all images.

    Global random numbers stay as they are, so that a run with images is one without them.
    """
    engine = evaluator.engine
    with _same_random_numbers(engine.settings.device), engine.timer.phase("images"):
        images, scores = evaluator.sample(rows, seeds, transformer)
    prompts = [row["prompt"] for row in rows]
    samples = _samples(engine, prompts, images, scores, evaluator.reward_names, seeds=seeds)
    if not evaluator.policy.takes_image:
        return samples
    conditions = [evaluator.policy.fit_image(row["image"]) for row in rows]
    return [replace(sample, condition=image) for sample, image in zip(samples, conditions, strict=True)]


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they are, whatever rewards draw from them."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def extreme_groups(engine: Engine, rollout: Rollout) -> list[SampleGroup]:
    """
    The groups of the highest and the lowest mean reward among those of all ranks, which must all call this.

    Each is sent by the rank that has it, so that no other images travel. A group without a score is neither.
    """
    size = engine.settings.num_generations
    rewards = combine_rewards(rollout.rewards, engine.reward_weights)
    own = rewards.unflatten(0, (-1, size)).nanmean(1)
    means = engine.gather(own)
    if means.isnan().all():
        return []
    first = engine.accelerator.process_index * len(own)
    places = {
        "best": int(means.nan_to_num(nan=-math.inf).argmax()),
        "worst": int(means.nan_to_num(nan=math.inf).argmin()),
    }
    if places["best"] == places["worst"]:
        del places["worst"]
    groups = []
    for which, place in places.items():
        if first <= place < first + len(own):
            images = range((place - first) * size, (place - first + 1) * size)
            groups.append(SampleGroup(which, rollout.plan.window.start, _trained(engine, rollout, images)))
    if engine.accelerator.num_processes > 1:
        groups = gather_object(groups)
    return sorted(groups, key=lambda group: group.which)


def _trained(engine: Engine, rollout: Rollout, images: Sequence[int]) -> list[Sample]:
    chosen = list(images)
    return _samples(
        engine,
        [rollout.rows[i]["prompt"] for i in chosen],
        [rollout.images[i] for i in chosen],
        rollout.rewards[:, chosen],
        engine.rewards.names,
        advantages=rollout.advantages[chosen].tolist(),
    )


def _samples(
    engine: Engine,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    scores: Tensor,
    names: Sequence[str],
    seeds: Sequence[int] | None = None,
    advantages: Sequence[float] | None = None,
) -> list[Sample]:
    """From scores of shape `(K, n)`, of which the trained rewards are the first."""
    combined = combine_rewards(scores[: len(engine.rewards.names)], engine.reward_weights).tolist()
    by_image = scores.T.tolist()
    return [
        Sample(
            prompt=prompts[i],
            image=images[i],
            rewards={name: _or_none(score) for name, score in zip(names, by_image[i], strict=True)},
            reward=_or_none(combined[i]),
            seed=None if seeds is None else seeds[i],
            advantage=None if advantages is None else advantages[i],
        )
        for i in range(len(images))
    ]


def _or_none(score: float) -> float | None:
    return score if math.isfinite(score) else None
