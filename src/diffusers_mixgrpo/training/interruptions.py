"""[`Interruptions`]: SIGTERM and Ctrl-C as exceptions that never come in the middle of an optimizer step."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnAllRanks(SystemExit):
    """A signal that all ranks have agreed to stop for."""


class Interruptions:
    """
    A context in which SIGINT raises `KeyboardInterrupt` and SIGTERM raises `SystemExit(143)`, or, while they are held
    back, as soon as they are released.

    Outside the main thread, and for a signal that has a handler other than Python's own, it changes nothing.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._is_holding = False
        self._is_dropping = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruptions":
        self._received = None
        self._is_holding = False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def hold(self) -> None:
        """Keep signals back until [`release`]."""
        self._is_holding = True

    def release(self) -> None:
        """Raise the exception of a signal that was kept back, and of later ones immediately."""
        self._is_holding = False
        if self._received is not None:
            number = self._received
            self._received = None
            raise _exception(number)

    @contextlib.contextmanager
    def dropped(self) -> Iterator[None]:
        """A context in which signals have no effect, kept ones either: the program is stopping already, and saves."""
        self._received = None
        self._is_dropping = True
        try:
            yield
        finally:
            self._is_dropping = False
            self._is_holding = False

    @property
    def is_pending(self) -> bool:
        """Whether a signal is kept back."""
        return self._received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._is_dropping:
            return
        if self._is_holding:
            self._received = number
        else:
            raise _exception(number)


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
