"""[`Progress`]: bars for what takes long between two optimizer steps."""

import contextlib
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm


DELAY = 2.0  # seconds before a bar appears, so that short work shows none


class Progress:
    """
    Shows bars below the Trainer's own, which disappear when their work is done.

    There are none outside a terminal, where a bar would be a line of text for each of its states.

    Args:
        is_shown (`bool`): Whether this process shows bars: the first one, unless `disable_tqdm` is set.
    """

    def __init__(self, is_shown: bool) -> None:
        self.is_shown = is_shown

    @contextlib.contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[], object]]:
        """
        A context for work of `total` steps.

        Yields:
            `Callable`: To be called after each step.
        """
        with tqdm(
            desc=title,
            total=total,
            leave=False,
            delay=DELAY,
            dynamic_ncols=True,
            disable=None if self.is_shown else True,  # None: outside a terminal
        ) as bar:
            yield bar.update
