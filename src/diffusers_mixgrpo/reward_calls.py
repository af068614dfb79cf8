"""Calling reward functions: their names, their results as numbers, and errors that say whose fault it is."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .advantages import combine_rewards, scored_std


RewardFunc = Callable[..., Sequence["float | None"]]


class RewardError(RuntimeError):
    """A reward function raised, or returned something else than one score per image."""


def reward_names(reward_funcs: Sequence[RewardFunc]) -> list[str]:
    """
    A name for each reward in logs: the function's `__name__` or the object's class, numbered where they coincide.

    Raises:
        `TypeError`: If one is not callable.
        `ValueError`: If there is none.
    """
    if not reward_funcs:
        raise ValueError("`reward_funcs` is empty; pass at least one reward function.")
    names: list[str] = []
    for func in reward_funcs:
        if not callable(func):
            raise TypeError(
                f"`reward_funcs` must be callables `reward(prompts, images, **columns) -> list[float | None]`, got "
                f"{func!r}."
            )
        name = getattr(func, "__name__", type(func).__name__)
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def call_reward(
    func: RewardFunc, name: str, prompts: Sequence[str], images: Sequence[Any], columns: dict[str, list[Any]]
) -> list[float]:
    """
    Score `n` images with one reward function, in one call.

    Args:
        func, name: The reward function and its name in messages.
        prompts, images, columns: The prompt, the picture and the other columns of the data set, one entry per image.

    Returns:
        `list[float]` of length `n`: NaN where the image could not be scored (`None` or NaN).

    Raises:
        [`RewardError`]: If the function raises, or returns anything else than `n` numbers or `None`.
    """
    try:
        scores = func(prompts=list(prompts), images=list(images), **columns)
    except Exception as error:
        raise RewardError(
            f"The reward function `{name}` raised {type(error).__name__}: {error}. It was called as {name}(prompts, "
            f"images{''.join(f', {key}=...' for key in columns)}) with {len(images)} images; return None for an image "
            "that cannot be scored."
        ) from error
    try:
        values = [math.nan if score is None else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"The reward function `{name}` returned {_shorten(scores)}; it must return a list of {len(images)} "
            "numbers (or None), one per image."
        ) from error
    if len(values) != len(images):
        raise RewardError(
            f"The reward function `{name}` returned {len(values)} scores for {len(images)} images; it must return one "
            "per image, in their order, with None for an image that cannot be scored."
        )
    return [value if math.isfinite(value) else math.nan for value in values]


def check_failures(rewards: torch.Tensor, names: Sequence[str], limit: float, iteration: int) -> None:
    """
    Stop at a reward that does not work.

    Raises:
        [`RewardError`]: If more than the share `limit` of a reward's scores is missing; `rewards` are `(K, ...)`.
    """
    for name, scores in zip(names, rewards, strict=True):
        rate = float(scores.isnan().double().mean())
        if rate > limit:
            raise RewardError(
                f"The reward function `{name}` could not score {rate:.0%} of the {scores.numel()} images of iteration "
                f"{iteration} (it returned None or NaN), more than max_reward_failure_rate={limit}. Mend it, or allow "
                "more failures."
            )


def reward_statistics(rewards: torch.Tensor, names: Sequence[str], weights: torch.Tensor) -> dict[str, float]:
    """
    Statistics of scores of shape `(K, n)`, under their names in the logs, over the images that could be scored.

    `reward` is the weighted mean over the rewards, `reward_se` its standard error over images; `std` is over images.
    """
    combined = combine_rewards(rewards, weights)
    scored = int((~combined.isnan()).sum())
    statistics = {
        "reward": float(combined.nanmean()),
        "reward_se": float(scored_std(combined, dims=(0,))) / max(1, scored) ** 0.5,
    }
    for name, scores in zip(names, rewards, strict=True):
        statistics[f"rewards/{name}/mean"] = float(scores.nanmean())
        statistics[f"rewards/{name}/std"] = float(scored_std(scores, dims=(0,)))
        statistics[f"rewards/{name}/failed"] = float(scores.isnan().sum())
    return statistics


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
