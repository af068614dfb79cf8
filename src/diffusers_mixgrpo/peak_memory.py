"""[`PeakMemory`]: how much tensors hold at their most, on any device."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Most `bytes` that tensors made inside hold at one time: on CUDA by its allocator, else by their storages."""

    def __init__(self, device: torch.device, active: bool = True):
        super().__init__()
        self.cuda, self.active = device if device.type == "cuda" else None, active
        self.live = self.bytes = 0
        self.known: set[int] = set()

    def __enter__(self):
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self.live = torch.cuda.memory_allocated(self.cuda)
        elif self.active:
            super().__enter__()
        return self

    def __exit__(self, *error):
        if self.cuda is not None:
            self.bytes = torch.cuda.max_memory_allocated(self.cuda) - self.live
        elif self.active:
            super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(output) if isinstance(t, Tensor)):
            if storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes()).atexit = False
        self.bytes = max(self.bytes, self.live)
        return output

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size
