"""Runs reward functions, batched or async, and separates broken rewards from images that cannot be scored."""

import asyncio
import inspect
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from ..core.advantages import combine_rewards, scored_std


Scores = Sequence[float | None]
RewardFunc = Callable[..., Scores | Coroutine[Any, Any, Scores]]
T = TypeVar("T")
MAX_STUCK_THREADS = 4  # of one reward, whose calls outlasted the timeout and still run
TRL_ARGUMENTS = ("trainer_state", "log_metric", "log_extra")
_ANSWER_SECONDS = 0.5  # a free event loop takes microseconds

logger = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A reward function failed too often, or returned something other than one score per image."""


@dataclass(frozen=True)
class _Batch:
    """
    `n` images that were passed to [`RewardRunner.start`] and whose scores are still pending.

    Attributes:
        prompts (`list[str]` of length `n`), images (`list[PIL.Image.Image]` of length `n`):
            The images with their prompts.
        columns (`dict[str, list]`): The dataset's other columns, of length `n` each.
        pending (`dict[str, Future]`): The running calls of the async rewards, by name.
    """

    prompts: list[str]
    images: list[Image.Image]
    columns: dict[str, list[Any]]
    pending: dict[str, Future[Scores]]


class RewardRunner:
    """
    Runs `K` reward functions on batches of images. Async rewards start immediately in the background; the others are
    called once in [`RewardRunner.finish`] on all images.

    An image that a reward cannot score (`None`, NaN, an exception, a timeout) becomes NaN, never a number. When a
    batched call raises, its images are scored one by one, so that a bad image does not affect the scores of others.

    Each async reward has an event loop in a daemon thread of its own, so one that blocks does not delay the others. A
    call that blocks past the time limit is abandoned with its thread, which ends when the call returns. While
    `MAX_STUCK_THREADS` threads of a reward are stuck, it is not called again: its images have no score.

    Args:
        funcs (`list` of reward functions):
            `reward(prompts, images, **columns) -> list[float | None]`, sync or async.
        timeout (`float`, *optional*):
            Time limit of one call in seconds. A call that blocks (a sync function, or an async one that does not
            await) cannot be stopped: it goes on in its own thread, and its result is ignored.
        device (`torch.device` or `str`, *optional*):
            Device to which rewards with a method `to` are moved. `None` does not move them.
        offload (`bool`, defaults to `False`):
            Move the rewards to `device` only while they score, and to the CPU afterwards.
        state (`Callable`, *optional*):
            Gives the [`~transformers.TrainerState`] of the training at the time of a call.

    A reward whose signature names one of TRL's arguments gets it: `trainer_state`, the state (`None` without a
    training); `log_metric(name, value)`, which adds a number to the metrics of [`RewardRunner.pop_metrics`];
    `log_extra(column, values)`, which does nothing here: TRL adds a column to its table of completions, and the logged
    images have none.

    Attributes:
        funcs (`list` of reward functions): The reward functions.
        names (`list[str]`): The rewards' names in logs.
        errors (`dict[str, Exception]`): The last exception of each reward that has raised one.

    Raises:
        `ValueError`, `TypeError`: See [`reward_names`].
    """

    def __init__(
        self,
        funcs: Sequence[RewardFunc],
        timeout: float | None = None,
        device: torch.device | str | None = None,
        offload: bool = False,
        state: Callable[[], object] | None = None,
    ) -> None:
        self.funcs = list(funcs)
        self.names = reward_names(funcs)
        self.timeout = timeout
        self.device = device
        self.offload = offload
        if not offload:
            self._move(device)
        self.errors: dict[str, Exception] = {}
        self._state = state
        self._accepted = {name: _accepted(func) for func, name in zip(self.funcs, self.names, strict=True)}
        self._logged: list[tuple[str, float]] = []
        self._batches: list[_Batch] = []
        self._loops: dict[str, _EventLoop] = {}
        self._abandoned: defaultdict[str, list[threading.Thread]] = defaultdict(list)

    def start(self, rows: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> None:
        """
        Add a batch of images and start the async rewards on it.

        Args:
            rows (`Sequence[dict]` of length `n`): The dataset row of each image, with its `"prompt"`.
            images (`Sequence[PIL.Image.Image]` of length `n`): The images.
        """
        prompts = [row["prompt"] for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        pending = {}
        for func, name in zip(self.funcs, self.names, strict=True):
            if _is_async(func):
                kwargs = columns | self._extra_arguments(name)
                pending[name] = self._submit(func, name, prompts=prompts, images=list(images), **kwargs)
        self._batches.append(_Batch(prompts, list(images), columns, pending))

    def finish(self) -> torch.Tensor:
        """
        Scores of all images since the previous call.

        Returns:
            `torch.Tensor` of shape `(K, n)`, float64: NaN for images without a score.

        Raises:
            [`RewardError`]: On all ranks, if a reward of any rank returns something other than one number or `None`
                per image.
        """
        batches = self._batches
        self._batches = []
        scores: list[list[float]] = []
        wrong: RewardError | None = None
        if self.offload:
            self._move(self.device)
        try:
            scores = [self._scores(func, name, batches) for func, name in zip(self.funcs, self.names, strict=True)]
        except RewardError as error:
            wrong = error
        if self.offload:
            self._move("cpu")
        # If only one rank raised, the others would wait for it until they are killed, and nothing would be saved.
        messages = _gather(None if wrong is None else str(wrong))
        reported = [message for message in messages if message]
        if reported:
            raise wrong or RewardError(reported[0])
        return torch.tensor(scores, dtype=torch.float64)

    def try_on_gray_images(self, dataset: Any, size: tuple[int, int]) -> None:
        """
        Call each reward on two gray images, so that a broken one is found before a rollout.

        Args:
            dataset (indexable collection of `dict`): Rows with a `"prompt"`, whose first ones are used.
            size (`tuple[int, int]`): Width and height of the images in pixels.

        Raises:
            [`RewardError`]: If a reward raises, or returns anything but one score per image.
        """
        rows = [dict(dataset[i % len(dataset)]) for i in range(2)]
        self.start(rows, [Image.new("RGB", size, "gray") for _ in rows])
        check_failures(self.finish(), self.names, limit=None, errors=self.errors)
        self._logged.clear()

    def pop_metrics(self) -> dict[str, float]:
        """
        The mean of each metric that rewards have logged since the previous call, over their calls on all ranks.

        All ranks must call this.
        """
        logged, self._logged = self._logged, []
        if not any("log_metric" in accepted for accepted in self._accepted.values()):
            return {}
        values: dict[str, list[float]] = {}
        for name, value in (pair for pairs in _gather(logged) for pair in pairs):
            values.setdefault(name, []).append(value)
        return {name: sum(numbers) / len(numbers) for name, numbers in sorted(values.items())}

    def all_errors(self) -> Mapping[str, Exception | str]:
        """The last error of each reward that has one on any rank. All ranks must call this method."""
        if PartialState().num_processes == 1:
            return dict(self.errors)
        own = {name: f"{type(error).__name__}: {error}" for name, error in self.errors.items()}
        return {name: text for errors in _gather(own) for name, text in errors.items()}

    def clear(self) -> None:
        """Discard images whose scores have not been collected, and cancel their async calls."""
        for batch in self._batches:
            for call in batch.pending.values():
                call.cancel()
        self._batches.clear()
        self._logged.clear()

    def _extra_arguments(self, name: str) -> dict[str, Any]:
        """Those of TRL's arguments that a reward takes."""
        state = None if self._state is None else self._state()
        extra = {"trainer_state": state, "log_metric": self._log_metric, "log_extra": _log_nothing}
        return {key: value for key, value in extra.items() if key in self._accepted[name]}

    def _log_metric(self, name: str, value: float) -> None:
        if not isinstance(name, str):
            raise TypeError(f"`log_metric` must get a name and a number, got {name!r}.")
        self._logged.append((name, float(value)))

    def _move(self, device: torch.device | str | None) -> None:
        if device is None:
            return
        for func in self.funcs:
            move = getattr(func, "to", None)
            if callable(move):
                move(device)

    def _scores(self, func: RewardFunc, name: str, batches: list[_Batch]) -> list[float]:
        """The scores of one reward for all images of the batches."""
        if not batches:
            return []
        if _is_async(func):
            scores = []
            deadline = None if self.timeout is None else time.monotonic() + self.timeout
            for batch in batches:
                scores += self._collect(name, batch.pending[name], len(batch.images), deadline)
        else:
            prompts = [prompt for batch in batches for prompt in batch.prompts]
            images = [image for batch in batches for image in batch.images]
            columns = {
                column: [value for batch in batches for value in batch.columns[column]]
                for column in batches[0].columns
            }
            scores = self._call(func, name, prompts, images, columns)
        last_error = getattr(func, "last_error", None)
        if last_error is not None and any(math.isnan(score) for score in scores):
            self.errors[name] = last_error
        return scores

    def _call(
        self,
        func: RewardFunc,
        name: str,
        prompts: list[str],
        images: list[Image.Image],
        columns: dict[str, list[Any]],
    ) -> list[float]:
        """The scores of a sync reward: in one call, or image by image if that call raises."""
        try:
            kwargs = columns | self._extra_arguments(name)
            scores = self._call_within(func, name, prompts=prompts, images=images, **kwargs)
        except Exception as error:
            self._note(name, error)
            if len(images) == 1 or isinstance(error, TimeoutError):
                return [math.nan] * len(images)
            singles = []
            for i in range(len(images)):
                column = {key: [values[i]] for key, values in columns.items()}
                singles += self._call(func, name, [prompts[i]], [images[i]], column)
            return singles
        return as_scores(scores, name, len(images))

    def _call_within(self, func: RewardFunc, name: str, **kwargs: Any) -> Any:
        """`func(**kwargs)`, or a `TimeoutError` after the time limit. The call itself cannot be stopped."""
        if self.timeout is None:
            return func(**kwargs)
        self._check_stuck(name)
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(func(**kwargs))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
        thread.start()
        try:
            return future.result(self.timeout)
        except TimeoutError as error:
            if future.done():
                raise
            self._abandoned[name].append(thread)
            raise self._no_answer() from error

    def _submit(self, func: RewardFunc, name: str, **kwargs: Any) -> Future[Any]:
        """Start a call of an async reward on its event loop."""
        try:
            self._check_stuck(name)
        except TimeoutError as error:
            refused: Future[Any] = Future()
            refused.set_exception(error)
            return refused
        if name not in self._loops:
            self._loops[name] = _EventLoop(f"reward {name}")
        return self._loops[name].submit(_outcome(func, kwargs, self.timeout))

    def _collect(self, name: str, call: Future[Any], count: int, deadline: float | None) -> list[float]:
        """The `count` scores of a running call, after waiting for it until `deadline`."""
        try:
            scores = call.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Exception as error:
            if not call.done():
                call.cancel()
                # A loop that answers is not blocked and stops the call. It stays, with what the reward keeps there.
                if name in self._loops and not self._loops[name].answers(_ANSWER_SECONDS):
                    self._abandoned[name].append(self._loops.pop(name).stop())
            is_limit = isinstance(error, TimeoutError) and not str(error)
            self._note(name, self._no_answer() if is_limit else error)
            return [math.nan] * count
        if isinstance(scores, _Exit):
            raise scores.error
        return as_scores(scores, name, count)

    def _check_stuck(self, name: str) -> None:
        """Raise a `TimeoutError` if too many threads of a reward are stuck."""
        self._abandoned[name] = [thread for thread in self._abandoned[name] if thread.is_alive()]
        if len(self._abandoned[name]) >= MAX_STUCK_THREADS:
            raise TimeoutError(
                f"{MAX_STUCK_THREADS} calls still run after reward_timeout={self.timeout} s, so it is not called again"
            )

    def _no_answer(self) -> TimeoutError:
        return TimeoutError(f"no answer within reward_timeout={self.timeout} s")

    def _note(self, name: str, error: Exception) -> None:
        if name not in self.errors:
            logger.warning(
                "The reward `%s` raised %s: %s. Its images have no score.", name, type(error).__name__, error
            )
        self.errors[name] = error


class _EventLoop:
    """An event loop in a daemon thread of its own."""

    def __init__(self, name: str) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def answers(self, seconds: float) -> bool:
        """Whether the loop does something else within `seconds`, so that no call blocks it."""
        answered = threading.Event()
        self._loop.call_soon_threadsafe(answered.set)
        return answered.wait(seconds)

    def stop(self) -> threading.Thread:
        """Stop the loop as soon as it does not block. Returns its thread, which then ends."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        return self._thread

    def _run(self) -> None:
        with self._runner:  # cancels what is left and closes the loop
            self._loop.run_forever()


@dataclass(frozen=True)
class _Exit:
    """A `KeyboardInterrupt` or `SystemExit` of a reward, which would end the event loop if it were raised there."""

    error: BaseException


async def _outcome(func: RewardFunc, kwargs: dict[str, Any], timeout: float | None) -> Any:
    """The return value of an async reward within `timeout` seconds, or [`_Exit`]."""

    async def call() -> Any:
        try:
            return await func(**kwargs)  # type: ignore[misc]  # it is async
        except (KeyboardInterrupt, SystemExit) as error:
            return _Exit(error)

    return await asyncio.wait_for(call(), timeout)


def _gather(value: T) -> list[T]:
    """The value of each rank."""
    return gather_object([value]) if PartialState().num_processes > 1 else [value]


def _accepted(func: RewardFunc) -> set[str]:
    """
    Those of TRL's arguments that a reward's signature names. With `**columns` alone it gets none of them, since it may
    pass on what it gets, as a remote reward does.
    """
    try:
        return {name for name in TRL_ARGUMENTS if name in inspect.signature(func).parameters}
    except (TypeError, ValueError):  # of a builtin
        return set()


def _log_nothing(column: str, values: Sequence[Any]) -> None:
    pass


def _is_async(func: RewardFunc) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def reward_names(reward_funcs: Sequence[RewardFunc], argument: str = "reward_funcs") -> list[str]:
    """
    The names of rewards in logs: the function's `__name__` or the object's class, numbered if they coincide. Messages
    name the `argument` that the rewards are.

    Raises:
        `TypeError`: If a reward is not callable.
        `ValueError`: If there is no reward.
    """
    if not reward_funcs:
        raise ValueError(f"`{argument}` must not be empty, got {reward_funcs!r}. Pass at least one reward function.")
    names: list[str] = []
    for func in reward_funcs:
        if not callable(func):
            raise TypeError(
                f"`{argument}` must be names or callables `reward(prompts, images, **columns) -> list[float | "
                f"None]`, got {func!r}."
            )
        name = getattr(func, "__name__", type(func).__name__)
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def as_scores(scores: Any, name: str, count: int) -> list[float]:
    """
    The return value of a reward function for `count` images as numbers, NaN for images without a score.

    Args:
        scores: The return value; anything iterable over numbers and `None` is accepted.
        name (`str`): The reward's name, for error messages.
        count (`int`): Number of images.

    Raises:
        [`RewardError`]: If it is not `count` numbers or `None`.
    """
    try:
        values = [math.nan if score is None else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"The reward function `{name}` must return a list of {count} numbers or None, one per image, got "
            f"{_shorten(scores)}. Fix its return value."
        ) from error
    if len(values) != count:
        raise RewardError(
            f"The reward function `{name}` must return one score per image, got {len(values)} scores for {count} "
            "images. Return the scores in the order of the images, with None for an image that cannot be scored."
        )
    return [value if math.isfinite(value) else math.nan for value in values]


def check_failures(
    rewards: torch.Tensor,
    names: Sequence[str],
    limit: float | None,
    errors: Mapping[str, Exception | str],
    iteration: int | None = None,
) -> None:
    """
    Raise an error if a reward does not work.

    Args:
        rewards (`torch.Tensor` of shape `(K, ...)`): Scores, NaN where there is none.
        names (`list[str]`): The rewards' names.
        limit (`float`, *optional*):
            Maximum share of missing scores. `None` is for the trial on gray images: a reward then fails only if all
            its scores are missing because of an exception.
        errors (`dict[str, Exception | str]`): The last error of each reward that has one.
        iteration (`int`, *optional*): Number of the iteration, for the message.

    Raises:
        [`RewardError`]: If more scores of a reward are missing.
    """
    for name, scores in zip(names, rewards, strict=True):
        rate = float(scores.isnan().double().mean())
        error = errors.get(name)
        cause = error if isinstance(error, BaseException) else None
        if limit is None and rate == 1 and error is not None:
            raise RewardError(
                f"The reward function `{name}` failed on two gray images before training: {error!r}. It is called as "
                "reward(prompts, images, **columns), and may return None for an image that it cannot score."
            ) from cause
        if limit is not None and rate > limit:
            reason = "it returned None or NaN" if error is None else f"the last error was {error!r}"
            raise RewardError(
                f"The reward function `{name}` could not score {rate:.0%} of the {scores.numel()} images of iteration "
                f"{iteration} ({reason}), more than max_reward_failure_rate={limit}. Fix the reward function or raise "
                "`max_reward_failure_rate`."
            ) from cause


def reward_statistics(rewards: torch.Tensor, names: Sequence[str], weights: torch.Tensor) -> dict[str, float]:
    """
    Statistics of rewards under their names in the logs, over the images that have a score.

    `reward` is the weighted mean over the rewards and `reward_se` its standard error over the images. Each reward has
    its `mean`, its standard deviation `std`, and the number `failed` of images without a score.

    Args:
        rewards (`torch.Tensor` of shape `(K, n)`): Scores, NaN where there is none.
        names (`list[str]` of length `K`): The rewards' names.
        weights (`torch.Tensor` of shape `(K,)`): The rewards' weights.
    """
    combined = combine_rewards(rewards, weights)
    scored = int((~combined.isnan()).sum())
    statistics = {
        "reward": float(combined.nanmean()),
        "reward_se": float(scored_std(combined, dims=(0,))) / max(1, scored) ** 0.5,
    }
    return statistics | statistics_by_reward(rewards, names)


def statistics_by_reward(rewards: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    """Those of [`reward_statistics`] that each of `K` rewards has by itself, from scores of shape `(K, n)`."""
    statistics = {}
    for name, scores in zip(names, rewards, strict=True):
        statistics[f"rewards/{name}/mean"] = float(scores.nanmean())
        statistics[f"rewards/{name}/std"] = float(scored_std(scores, dims=(0,)))
        statistics[f"rewards/{name}/failed"] = float(scores.isnan().sum())
    return statistics


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
