"""
[`FaultBoard`]: what ranks tell each other when one of them has failed, and collectives would wait for it forever.

It uses the key-value store that the ranks met at. A store needs no second rank to answer, so a rank that writes its
error there does not wait, and the others find it when a collective has failed.
"""

import time
import traceback

import torch.distributed as dist
from accelerate import PartialState


PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.1


class RankError(RuntimeError):
    """Another rank has failed; the message is that rank's error."""


class FaultBoard:
    """One run's faults. With one process, nothing is ever published."""

    def __init__(self) -> None:
        state = PartialState()
        self.rank = state.process_index
        self._store: dist.Store | None = None
        if state.num_processes > 1:
            self._store = dist.PrefixStore("mixgrpo_faults", dist.distributed_c10d._get_default_store())

    def report(self, error: BaseException, where: str) -> str | None:
        """
        Publish this rank's error unless another rank was first.

        Args:
            error (`BaseException`): The error.
            where (`str`): What the rank was doing, for the message.

        Returns:
            `str`, *optional*: The first error, if it is another rank's.
        """
        if self._store is None:
            return None
        if is_collective_error(error):
            # It comes moments after another rank's error, which is the one to show.
            self.wait_for("first")
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno}) {where}"
        first = self._store.compare_set("first", "", f"{self.rank}|{text}").decode()
        rank, _, message = first.partition("|")
        return None if int(rank) == self.rank else f"Rank {rank} stopped with {message}"

    def announce(self, name: str) -> None:
        """Tell the other ranks that something is done."""
        if self._store is not None:
            self._store.set(name, "done")

    def wait_for(self, name: str) -> bool:
        """Whether a rank announces it within some seconds, or has done so."""
        if self._store is None:
            return False
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._store.check([name]):
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)
        return True


def is_collective_error(error: BaseException) -> bool:
    """Whether an error comes from a collective, whose other ranks are gone."""
    return isinstance(error, dist.DistError) or "onnection" in str(error) and "peer" in str(error)
