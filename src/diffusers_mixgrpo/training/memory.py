"""Memory: how much tensors hold at their peak, and how many transitions fit into a forward and backward pass."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import Trainer
from transformers.utils import logging

from ..mixgrpo_config import MixGRPOConfig
from .engine import Engine, Rollout


logger = logging.get_logger(__name__)


# ---- The search for a batch size ----


def find_pass_size(
    engine: Engine, rollout: Rollout, images: Tensor, optimizer: torch.optim.Optimizer | None, reserve: int = 0
) -> int:
    """
    How many transitions go through one forward and backward pass of training.

    Args:
        engine ([`Engine`]): The engine. Its weights, gradients and random states are left as they were.
        rollout ([`Rollout`]): The images of an iteration.
        images (`torch.LongTensor` of shape `(b,)`): Those of the first training batch, on the CPU.
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer, if it exists. Until its first step, the memory
            of its state is kept free.
        reserve (`int`, defaults to 0): More bytes to keep free.

    Returns:
        `int`: `replay_batch_size` if it is set, the result of [`find_replay_batch_size`] where [`has_to_search`], or
        all transitions of the training batch. Always all of them with `reuse_rollout_graph`.
    """
    settings = engine.settings
    images, steps = engine.transitions_of(rollout, images)
    if settings.reuse_rollout_graph:
        return len(images)  # the graph exists already, and going through it in parts would cost more
    if not has_to_search(engine):
        return settings.replay_batch_size or len(images)

    def run_pass(size: int) -> None:
        # Not through DDP, so that each rank finds its own size and none waits for another
        engine.objective(rollout, images[:size], steps[:size]).losses.sum().backward()

    trained = engine.trained_parameters
    size = find_replay_batch_size(
        run_pass,
        len(images),
        trained,
        reserve=reserve + optimizer_memory_to_come(settings, optimizer, trained),
        accumulates=settings.gradient_accumulation_steps > 1,
    )
    if size < len(images):
        logger.warning(
            f"The {len(images)} transitions of a training batch do not fit into memory at once, but {size} do. "
            f"Gradients do not depend on it. Set `replay_batch_size={size}` to skip the search."
        )
    return size


def has_to_search(engine: Engine) -> bool:
    """
    Whether to search for the number of transitions per pass.

    Only where running out of memory is an error that can be caught: a process that runs out of CPU memory is killed.
    FSDP and DeepSpeed need all ranks to run the same number of passes. With `reuse_rollout_graph` there is no replay.
    """
    settings = engine.settings
    if settings.replay_batch_size is not None or settings.reuse_rollout_graph:
        return False
    return settings.device.type != "cpu" and not engine.is_sharded


def find_replay_batch_size(
    run_pass: Callable[[int], object],
    transitions: int,
    parameters: Sequence[nn.Parameter],
    reserve: int = 0,
    accumulates: bool = False,
) -> int:
    """
    The first of `N`, `N / 2`, `N / 4`, ..., rounded up, whose forward and backward pass fits into memory.

    Gradients and random states are afterwards what they were.

    Args:
        run_pass (`Callable`): `run_pass(n)` runs a forward and backward pass of `n` transitions.
        transitions (`int`): The number of all transitions, `N`.
        parameters (`Sequence[torch.nn.Parameter]`): The weights that get gradients, on the device in question.
        reserve (`int`, defaults to 0): Bytes to keep free.
        accumulates (`bool`, defaults to `False`): Whether even a pass of all transitions adds to gradients that exist
            already and take memory. Of several passes, all except the first do.

    Returns:
        `int`: Between 1 and `N`, found with at most `log2(N) + 1` passes.

    Raises:
        `torch.OutOfMemoryError`: If not even one transition fits.

    Example:

    ```py
    >>> find_replay_batch_size(lambda n: model(batch[:n]).sum().backward(), len(batch), list(model.parameters()))
    6
    ```
    """
    device = parameters[0].device
    size = transitions
    gradients = [parameter.grad for parameter in parameters]

    def probe(size: int) -> int:
        held = torch.empty(reserve, dtype=torch.uint8, device=device)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if accumulates or size < transitions else None
        run_pass(size)
        del held
        return size

    def halve() -> int:
        nonlocal size
        if size == 1:
            raise torch.OutOfMemoryError(
                "Not even one transition (one image at one window step) fits into memory with its backward pass. Use "
                "gradient_checkpointing=True, a LoRA (`peft_config`), bf16=True or smaller images."
            )
        size = (size + 1) // 2
        return size

    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            return find_executable_batch_size(probe, transitions, halve)()
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        clear_device_cache()


# ---- The optimizer's state ----


def optimizer_memory_to_come(
    settings: MixGRPOConfig, optimizer: torch.optim.Optimizer | None, trained: Sequence[nn.Parameter]
) -> int:
    """Bytes of the optimizer's state that its first step will take; 0 after that step, or if they are not known."""
    if getattr(optimizer, "state", None):
        return 0
    return optimizer_memory(settings, optimizer, trained) or 0


def optimizer_memory(
    settings: MixGRPOConfig, optimizer: torch.optim.Optimizer | None, trained: Sequence[nn.Parameter]
) -> int | None:
    """
    Bytes of the optimizer's state, measured by a step with one small weight. `None` if that is not possible.

    Args:
        settings ([`MixGRPOConfig`]): The configuration, which says how to make the optimizer if there is none yet.
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer.
        trained (`Sequence[torch.nn.Parameter]`): The trained weights.
    """
    if settings.optim_target_modules:
        return None  # optimizers such as GaLore treat each layer in its own way
    largest = max(trained, key=lambda p: p.numel())
    probe = nn.Parameter(largest.detach().new_zeros([min(256, size) for size in largest.shape]))
    probe.grad = torch.zeros_like(probe)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
    try:
        kind: Any
        if optimizer is None:
            kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(settings)
        else:
            kind = type(optimizer)
            accepted = inspect.signature(kind).parameters
            kwargs = {name: value for name, value in optimizer.defaults.items() if name in accepted}
        alone = kind([probe], **kwargs)
        alone.step()
    except Exception:  # an optimizer may need anything that a lone weight does not have
        return None
    state = [value for value in tree_leaves(dict(alone.state)) if isinstance(value, Tensor) and value.numel() > 1]
    return round(sum(s.nbytes for s in state) / probe.nbytes * sum(p.nbytes for p in trained))


# ---- Measuring ----


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold. A quantized tensor of torchao holds less than its own `nbytes` says."""
    return sum(part.nbytes for tensor in tensors for part in _inner_tensors(tensor))


def _inner_tensors(tensor: Tensor) -> list[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


class PeakMemory(TorchDispatchMode):
    """
    A context that measures the peak memory of the tensors made inside.

    Args:
        device (`torch.device`): On CUDA its allocator is asked; elsewhere the tensors' storages are counted.
        active (`bool`, defaults to `True`): Whether to count storages, which takes time. CUDA is always measured.

    Attributes:
        bytes (`int`): The peak.
    """

    def __init__(self, device: torch.device, active: bool = True) -> None:
        super().__init__()
        self.cuda = device if device.type == "cuda" else None
        self.active = active
        self.bytes = 0
        self._live = 0
        self._known: set[int] = set()

    def __enter__(self) -> "PeakMemory":
        if self.cuda is not None:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self._live = torch.cuda.memory_allocated(self.cuda)
        elif self.active:
            super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.cuda is not None:
            self.bytes = torch.cuda.max_memory_allocated(self.cuda) - self._live
        elif self.active:
            super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(output) if isinstance(t, Tensor)):
            if storage._cdata not in inputs | self._known:
                self._known.add(storage._cdata)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes()).atexit = False
        self.bytes = max(self.bytes, self._live)
        return output

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
