"""Which denoising steps are stochastic, and trained, at a given training iteration."""

import math
import numbers
import random
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple, get_args


WindowStrategy = Literal["progressive", "random", "frozen", "linear_decay", "exp_decay"]


class Window(NamedTuple):
    """The steps `start <= i < start + size`."""

    start: int
    size: int


@dataclass(frozen=True)
class WindowSchedule:
    r"""
    The sliding window of MixGRPO (https://arxiv.org/abs/2507.21802, section 3.2): training iteration -> window.

    A pure function of the iteration. There is no state to save: all ranks agree, and a resumed run goes on where it
    was, for free. A window is never empty and never holds the last step.

    The sweeping strategies visit the starts \\(l = 0, s, 2s, \dots\\) and finally the last one, `last_start`. It is
    visited even when the stride does not divide it (the last move is then shorter), so that every step that a
    window may hold is trained. Then they wrap around to 0. They differ in how long the window stays at a start:

    - `"progressive"`: \\(\tau\\) iterations.
    - `"exp_decay"`: \\(\lceil \tau e^{-k \max(0, l - l_0)} \rceil\\) iterations: early steps are trained longer.
    - `"linear_decay"`: from \\(\tau\\) at \\(l = 0\\) linearly down to \\(\tau_{min}\\) at the last start, rounded to
      the nearest integer.

    The others do not sweep: `"random"` draws one of all starts for each iteration, `"frozen"` stays at `start`.

    Args:
        strategy (`str`, defaults to `"progressive"`): One of the five.
        num_inference_steps (`int`, defaults to 25): Denoising steps `T` of a rollout, before compression; >= 2.
        window_size (`int`, defaults to 4): Steps `w` in the window, in [1, T - 1].
        window_interval (`int`, defaults to 25): Iterations `tau` that the window stays at a start, >= 1.
        window_stride (`int`, defaults to 1): Steps `s` that it moves by, >= 1.
        seed (`int`, defaults to 0): Seed of the `random` strategy.
        start (`int`, defaults to 0): Place of the `frozen` window, in [0, T - 1 - w]; only for that strategy.
        decay_rate (`float`, defaults to 0.1): `k` of `exp_decay`, >= 0.
        decay_start (`int`, defaults to 13): `l0` of `exp_decay`, the start up to which the stay is `tau`; >= 0.
        min_interval (`int`, defaults to 1): `tau_min` of `linear_decay`, in [1, tau].
        last (`int`, *optional*): The last start, in [0, T - 1 - w]. Defaults to the last legal one, `T - 1 - w`.

    Raises:
        `ValueError`: For an argument out of its range; the message names it, its value and the range.

    Example:

    ```py
    >>> schedule = WindowSchedule(num_inference_steps=8, window_size=4, window_interval=2)
    >>> [schedule.schedule(iteration).start for iteration in range(10)]
    [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    ```
    """

    strategy: WindowStrategy = "progressive"
    num_inference_steps: int = 25
    window_size: int = 4
    window_interval: int = 25
    window_stride: int = 1
    seed: int = 0
    start: int = 0
    decay_rate: float = 0.1
    decay_start: int = 13
    min_interval: int = 1
    last: int | None = None

    def __post_init__(self) -> None:
        if self.strategy not in get_args(WindowStrategy):
            legal = ", ".join(map(repr, get_args(WindowStrategy)))
            raise ValueError(f"`strategy` must be one of {legal}, got {self.strategy!r}.")
        # In this order: the ranges of the later ones are made of the earlier ones.
        _check_int("num_inference_steps", self.num_inference_steps, 2)
        _check_int("window_size", self.window_size, 1, self.num_inference_steps - 1)
        _check_int("window_interval", self.window_interval, 1)
        _check_int("window_stride", self.window_stride, 1)
        if self.last is not None:
            _check_int("last", self.last, 0, self.num_inference_steps - 1 - self.window_size)
        _check_int("start", self.start, 0, self.last_start if self.strategy == "frozen" else 0)
        _check_int("decay_start", self.decay_start, 0)
        is_number = isinstance(self.decay_rate, numbers.Real) and not isinstance(self.decay_rate, bool)
        if not is_number or not 0 <= self.decay_rate < math.inf:
            raise ValueError(f"`decay_rate` must be a finite number >= 0, got {self.decay_rate!r}.")
        if self.strategy == "linear_decay":
            _check_int("min_interval", self.min_interval, 1, self.window_interval)

    def schedule(self, iteration: int) -> Window:
        """
        The window at a training iteration.

        Args:
            iteration (`int`): Iterations (batches of rollouts) before this one, >= 0.

        Returns:
            `Window`: Named tuple of `start` and `size`, in steps of the uncompressed denoising schedule.
        """
        _check_int("iteration", iteration, 0)
        if self.strategy == "frozen":
            return Window(self.start, self.window_size)
        if self.strategy == "random":
            # A string is hashed by SHA-512 there, not by `hash`: the same in every process and on every platform.
            generator = random.Random(f"{self.seed}/{iteration}")
            return Window(generator.randrange(self.last_start + 1), self.window_size)
        ends = list(accumulate(stay for _, stay in self.stays))
        place = bisect_right(ends, iteration % self.sweep_length)
        return Window(self.stays[place][0], self.window_size)

    @property
    def last_start(self) -> int:
        """The last start: `last`, or `T - 1 - w`, after which the window would hold the last step."""
        return self.num_inference_steps - 1 - self.window_size if self.last is None else self.last

    @cached_property
    def trained_steps(self) -> tuple[int, ...]:
        """The steps that some window holds, in order."""
        return tuple(sorted({start + i for start, _ in self.stays for i in range(self.window_size)}))

    @cached_property
    def stays(self) -> tuple[tuple[int, int], ...]:
        """The starts of one sweep in order, each with the number of iterations that the window stays there."""
        if self.strategy == "frozen":
            return ((self.start, 1),)
        if self.strategy == "random":
            return tuple((start, 1) for start in range(self.last_start + 1))  # each once, on average
        starts = [*range(0, self.last_start, self.window_stride), self.last_start]
        return tuple((start, self._stay(start)) for start in starts)

    @cached_property
    def sweep_length(self) -> int:
        """Iterations in one sweep over all starts; for `random` the number of starts, for `frozen` 1."""
        return sum(stay for _, stay in self.stays)

    def _stay(self, start: int) -> int:
        if self.strategy == "exp_decay":
            decay = math.exp(-self.decay_rate * max(0, start - self.decay_start))
            return max(1, math.ceil(self.window_interval * decay))  # 1 also where the exponential underflows to 0
        if self.strategy == "linear_decay":
            # In integers, rounding halves up: a stay must not depend on how a platform rounds floats.
            whole = max(1, self.last_start)
            decrease = (self.window_interval - self.min_interval) * start
            return (2 * (self.window_interval * whole - decrease) + whole) // (2 * whole)
        return self.window_interval


def _check_int(name: str, value: int, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        legal = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"`{name}` must be an integer {legal}, got {value!r}.")
