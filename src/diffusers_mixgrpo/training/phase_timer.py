"""[`PhaseTimer`]: how long each phase of an iteration takes."""

import contextlib
import time
from collections.abc import Iterator

import torch


class PhaseTimer:
    """
    Adds up seconds by phase. The time of a phase inside another one counts only for the inner one.

    Args:
        device (`torch.device`): On CUDA, a phase ends when the device has done its work.

    Attributes:
        seconds (`dict[str, float]`): Seconds by phase since the last [`pop`].
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time counts for `name`."""
        start = time.perf_counter()
        self._running.append(name)
        try:
            yield
            self._wait()
        finally:
            seconds = time.perf_counter() - start
            self._running.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if self._running:
                outer = self._running[-1]
                self.seconds[outer] = self.seconds.get(outer, 0.0) - seconds

    def pop(self) -> dict[str, float]:
        """The seconds so far; counting starts again at 0."""
        seconds = self.seconds
        self.seconds = {}
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
