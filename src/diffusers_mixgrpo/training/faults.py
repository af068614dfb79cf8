"""
[`FaultBoard`]: what ranks tell each other when one of them has failed, and collectives would wait for it forever.

It uses the key-value store that the ranks met at. A store needs no second rank to answer, so a rank that writes its
error there does not wait, and the others find it when a collective has failed.
"""

import time
import traceback

import torch.distributed as dist
from accelerate import PartialState


_POLL_SECONDS = 0.1


class RankError(RuntimeError):
    """Another rank has failed; the message is that rank's error."""


class FaultBoard:
    """
    One run's faults. With one process, nothing is ever published.

    Args:
        patience (`float`, defaults to 15.0): Seconds to wait for what other ranks publish after a fault.
    """

    def __init__(self, patience: float = 15.0) -> None:
        self.patience = patience
        state = PartialState()
        self.rank = state.process_index
        self.num_ranks = state.num_processes
        self._store: dist.Store | None = None
        if self.num_ranks > 1:
            # Kept here, since a rank that fails leaves its process group and still needs the store.
            self._store = dist.PrefixStore("mixgrpo_faults", dist.distributed_c10d._get_default_store())

    def report(self, error: BaseException, where: str) -> str | None:
        """
        Publish this rank's error unless another rank was first, and leave the process group, so that no rank waits.

        Args:
            error (`BaseException`): The error.
            where (`str`): What the rank was doing, for the message.

        Returns:
            `str`, *optional*: The first error, if it is another rank's.
        """
        if self._store is None:
            return None
        # A collective fails moments after another rank's error, which is the one to show.
        if is_collective_error(error):
            self._wait_for("first", 3.0)
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno}) {where}"
        first = self._store.compare_set("first", "", f"{self.rank}|{text}").decode()
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()  # closes its connections, which ends the others' waiting
        rank, _, message = first.partition("|")
        return None if int(rank) == self.rank else f"Rank {rank} stopped with {message}"

    def announce(self, name: str, value: str = "") -> None:
        """Publish a value under a name."""
        if self._store is not None:
            self._store.set(name, value)

    def wait_for(self, name: str) -> str | None:
        """The value that a rank publishes under a name, or `None` if it does not come."""
        if self._store is None or not self._wait_for(name, self.patience):
            return None
        return self._store.get(name).decode()

    def _wait_for(self, name: str, seconds: float) -> bool:
        assert self._store is not None
        end = time.monotonic() + seconds
        while not self._store.check([name]):
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)
        return True


def is_collective_error(error: BaseException) -> bool:
    """Whether an error comes from a collective, whose other ranks are gone."""
    return isinstance(error, dist.DistError) or "onnection" in str(error) and "peer" in str(error)
