"""Calling reward functions: at once or in the background, their results as numbers, and whose fault an error is."""

import asyncio
import inspect
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from .advantages import combine_rewards, scored_std


RewardFunc = Callable[..., Sequence["float | None"] | Coroutine[Any, Any, Sequence["float | None"]]]

logger = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A reward function returned something else than one score per image, or failed too often."""


class RewardRunner:
    """
    Calls `K` reward functions on images as they come: asynchronous ones at once, in the background, the others in one
    batched call each at the end.

    An image that a reward cannot score (`None`, NaN, an exception, a timeout) is NaN and never a number. When a
    batched call raises, its images are scored one by one, so that one bad image costs no other its score.

    Args:
        funcs (`list` of reward functions):
            `reward(prompts, images, **columns) -> list[float | None]`, plain or `async`.
        timeout (`float`, *optional*):
            Seconds that one call may take. A plain function that takes longer is left to itself in its thread.
        device (`torch.device` or `str`, *optional*):
            Where rewards that hold a model, and so have a method `to`, are moved. `None` leaves them where they are.
        offload (`bool`, defaults to `False`):
            Move them there for each scoring, and to the CPU afterwards.

    Attributes:
        names (`list[str]`): The rewards' names in logs.
        errors (`dict[str, Exception]`): The last exception of each reward that has had one.

    Raises:
        `ValueError`, `TypeError`: As [`reward_names`].
    """

    def __init__(
        self,
        funcs: Sequence[RewardFunc],
        timeout: float | None = None,
        device: torch.device | str | None = None,
        offload: bool = False,
    ):
        self.funcs, self.names, self.timeout = list(funcs), reward_names(funcs), timeout
        self.device, self.offload = device, offload
        if not offload:
            self._move(device)
        self.errors: dict[str, Exception] = {}
        self._batches: list[tuple[list[str], list[Any], dict[str, list[Any]], dict[str, Future]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, rows: Sequence[dict[str, Any]], images: Sequence[Any]) -> None:
        """Take in images, one data set row each, and set the asynchronous rewards to work on them."""
        prompts = [row["prompt"] for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        futures = {}
        for func, name in zip(self.funcs, self.names, strict=True):
            if _is_async(func):
                call = asyncio.wait_for(func(prompts=prompts, images=list(images), **columns), self.timeout)  # type: ignore[arg-type]
                futures[name] = asyncio.run_coroutine_threadsafe(call, self._background())
        self._batches.append((prompts, list(images), columns, futures))

    def finish(self) -> torch.Tensor:
        """
        Scores of all images since the last time: `(K, n)` float64, NaN where there is none.

        Raises:
            [`RewardError`]: On all ranks, if on one of them a reward returns anything else than one number or `None`
                per image.
        """
        batches, self._batches = self._batches, []
        scores, wrong = [], None
        if self.offload:
            self._move(self.device)
        try:
            scores = [self._scores(func, name, batches) for func, name in zip(self.funcs, self.names, strict=True)]
        except RewardError as error:
            wrong = error
        if self.offload:
            self._move("cpu")
        # If only one rank left, the others would wait for it until they are killed, and nothing be saved.
        if others := [message for message in _gather(None if wrong is None else str(wrong)) if message]:
            raise wrong or RewardError(others[0])
        return torch.tensor(scores, dtype=torch.float64)

    def all_errors(self) -> dict[str, Any]:
        """The last exception of each reward that has had one: on any rank, so all have to call this."""
        if PartialState().num_processes == 1:
            return dict(self.errors)
        own = {name: f"{type(error).__name__}: {error}" for name, error in self.errors.items()}
        return {name: text for errors in _gather(own) for name, text in errors.items()}

    def clear(self) -> None:
        """Forget images that were taken in and whose scores nobody has asked for."""
        self._batches.clear()

    def _move(self, device: torch.device | str | None) -> None:
        for func in self.funcs:
            if device is not None and callable(move := getattr(func, "to", None)):
                move(device)

    def _scores(self, func: RewardFunc, name: str, batches: list[Any]) -> list[float]:
        """One reward's scores of all images of the batches."""
        if _is_async(func):
            parts = [self._collect(name, futures[name], len(part)) for part, _, _, futures in batches]
            scores = [score for part in parts for score in part]
        else:
            prompts = [prompt for batch in batches for prompt in batch[0]]
            images = [image for batch in batches for image in batch[1]]
            columns = {name: [value for batch in batches for value in batch[2][name]] for name in batches[0][2]}
            scores = self._call(func, name, prompts, images, columns)
        if (error := getattr(func, "last_error", None)) is not None and any(map(math.isnan, scores)):
            self.errors[name] = error
        return scores

    def _call(
        self, func: RewardFunc, name: str, prompts: list[str], images: list[Any], columns: dict[str, list[Any]]
    ) -> list[float]:
        try:
            scores = _within(self.timeout, func, prompts=prompts, images=images, **columns)
        except Exception as error:
            self._note(name, error)
            if len(images) == 1 or isinstance(error, TimeoutError):
                return [math.nan] * len(images)
            single = ({key: [values[i]] for key, values in columns.items()} for i in range(len(images)))
            rows = zip(prompts, images, single, strict=True)
            return [self._call(func, name, [prompt], [image], column)[0] for prompt, image, column in rows]
        return as_scores(scores, name, len(images))

    def _collect(self, name: str, future: Future, count: int) -> list[float]:
        try:
            scores = future.result()
        except Exception as error:
            self._note(name, error)
            return [math.nan] * count
        return as_scores(scores, name, count)

    def _note(self, name: str, error: Exception) -> None:
        if name not in self.errors:
            logger.warning(
                "The reward `%s` raised %s: %s. Its images have no score.", name, type(error).__name__, error
            )
        self.errors[name] = error

    def _background(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True).start()
        return self._loop


def _gather(value: Any) -> list[Any]:
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def _is_async(func: Any) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def _within(timeout: float | None, func: Callable, **kwargs: Any) -> Any:
    """`func(**kwargs)`, or a `TimeoutError` after `timeout` seconds; the call itself cannot be stopped."""
    if timeout is None:
        return func(**kwargs)
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(func(**kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(timeout)
    except TimeoutError as error:
        raise error if future.done() else TimeoutError(f"no answer within reward_timeout={timeout} s") from error


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
                "`reward_funcs` must be names or callables `reward(prompts, images, **columns) -> list[float | "
                f"None]`, got {func!r}."
            )
        name = getattr(func, "__name__", type(func).__name__)
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def as_scores(scores: Any, name: str, count: int) -> list[float]:
    """
    What a reward function returned for `count` images, as numbers: NaN where it has none.

    Raises:
        [`RewardError`]: If it is anything else than `count` numbers or `None`.
    """
    try:
        values = [math.nan if score is None else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"The reward function `{name}` returned {_shorten(scores)}; it must return a list of {count} numbers (or "
            "None), one per image."
        ) from error
    if len(values) != count:
        raise RewardError(
            f"The reward function `{name}` returned {len(values)} scores for {count} images; it must return one per "
            "image, in their order, with None for an image that cannot be scored."
        )
    return [value if math.isfinite(value) else math.nan for value in values]


def check_failures(
    rewards: torch.Tensor,
    names: Sequence[str],
    limit: float | None,
    errors: dict[str, Any],
    iteration: int | None = None,
) -> None:
    """
    Stop at a reward that does not work.

    Args:
        rewards (`torch.Tensor` of shape `(K, ...)`): Scores, NaN where there is none.
        names, errors: The rewards' names, and the last exception of those that have had one.
        limit (`float`, *optional*): The share of missing scores to bear. `None`, for a trial on grey pictures: any,
            but not if all are missing through an exception.
        iteration (`int`, *optional*): For the message.

    Raises:
        [`RewardError`]: If more of a reward's scores are missing.
    """
    for name, scores in zip(names, rewards, strict=True):
        rate, error = float(scores.isnan().double().mean()), errors.get(name)
        reason = "it returned None or NaN" if error is None else f"the last error was {error!r}"
        cause = error if isinstance(error, BaseException) else None
        if limit is None and rate == 1 and error is not None:
            raise RewardError(
                f"The reward function `{name}` failed on two grey pictures, before training: {error!r}. It is called "
                "as reward(prompts, images, **columns), and may return None for an image that it cannot score."
            ) from cause
        if limit is not None and rate > limit:
            raise RewardError(
                f"The reward function `{name}` could not score {rate:.0%} of the {scores.numel()} images of iteration "
                f"{iteration} ({reason}), more than max_reward_failure_rate={limit}. Mend it, or allow more failures."
            ) from cause


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
