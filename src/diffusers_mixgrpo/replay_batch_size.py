"""How many transitions go through one forward and backward pass of training: all of a batch, or as many as fit."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.utils import logging


logger = logging.get_logger(__name__)


def replay_batch_size(trainer: Any, images: Tensor, steps: Tensor) -> int:
    """
    Transitions per forward and backward pass in training, from those of the first training batch of a run.

    Args:
        trainer ([`MixGRPOTrainer`]): In training, with a rollout. It is left as it was.
        images, steps (`torch.LongTensor` of shape `(N,)`): All transitions of the batch, by image and window step.

    Returns:
        `int`: What [`MixGRPOConfig`] says. Where it says nothing, what [`find_replay_batch_size`] finds, or `N` where
        [`has_to_search`] is `False`. Always `N` with `reuse_rollout_graph`.
    """
    if trainer.args.reuse_rollout_graph:
        return len(images)  # the graph is there already, and going through it in parts would cost more
    if not has_to_search(trainer):
        return trainer.args.replay_batch_size or len(images)

    def run_pass(size: int) -> None:
        # Not through DDP, so that each rank finds its own size and none waits for another
        trainer._compute_losses(trainer._inference_model, images[:size], steps[:size], False).sum().backward()

    trained = [p for p in trainer.pipe.transformer.parameters() if p.requires_grad]
    metrics, trainer._metrics = trainer._metrics, defaultdict(list)
    try:
        size = find_replay_batch_size(
            run_pass,
            len(images),
            trained,
            reserve=optimizer_memory_to_come(trainer, trained),
            accumulates=trainer.args.gradient_accumulation_steps > 1,
        )
    finally:
        trainer._metrics = metrics
    if size < len(images):
        logger.warning(
            f"The {len(images)} transitions of a training batch do not fit into memory at once, {size} do and will be "
            f"taken. Gradients do not depend on it. Set `replay_batch_size={size}` to do without the search."
        )
    return size


def has_to_search(trainer: Any) -> bool:
    """
    Whether `replay_batch_size` is left to be found: where running out of memory is an error that one can catch.

    A process that runs out of CPU memory is killed. FSDP and DeepSpeed need all ranks to run as many passes. With
    `reuse_rollout_graph` there is nothing to replay.
    """
    args, sharded = trainer.args, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return args.replay_batch_size is None and args.device.type != "cpu" and not (sharded or args.reuse_rollout_graph)


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
        run_pass (`Callable`): `run_pass(n)` goes forward and backward through `n` transitions.
        transitions (`int`): All of them, `N`.
        parameters (`Sequence[torch.nn.Parameter]`): What gets gradients, on the device to be filled.
        reserve (`int`, defaults to 0): Bytes to leave free for what is not there yet.
        accumulates (`bool`, defaults to `False`): Whether even a pass through all of them finds gradients to add to,
            which take memory from its beginning. Of several passes all but the first do.

    Returns:
        `int`: Between 1 and `N`, found with `log2(N) + 1` passes at most.

    Raises:
        `torch.OutOfMemoryError`: If not even one transition fits.

    Example:

    ```py
    >>> find_replay_batch_size(lambda n: model(batch[:n]).sum().backward(), len(batch), list(model.parameters()))
    6
    ```
    """
    device, size = parameters[0].device, transitions
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
                "gradient_checkpointing=True, a LoRA (`peft_config`), bf16=True or smaller pictures."
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


def optimizer_memory_to_come(trainer: Any, trained: list[nn.Parameter]) -> int:
    """Bytes of the optimizer's state if it has none yet, as before its first step; 0 too if that is not known."""
    return 0 if getattr(trainer.optimizer, "state", None) else optimizer_memory(trainer, trained) or 0


def optimizer_memory(trainer: Any, trained: list[nn.Parameter]) -> int | None:
    """Bytes of the optimizer's state, from what a step leaves behind for one small weight; `None` if that fails."""
    largest = max(trained, key=lambda p: p.numel())
    probe = nn.Parameter(largest.detach().new_zeros([min(256, size) for size in largest.shape]))
    probe.grad = torch.zeros_like(probe)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if trainer.args.optim_target_modules:
        return None  # GaLore and its like treat each layer in its own way
    try:
        if optimizer is None:
            kind, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args)
        else:
            kind = type(optimizer)
            kwargs = {k: v for k, v in optimizer.defaults.items() if k in inspect.signature(kind).parameters}
        alone = kind([probe], **kwargs)
        alone.step()
    except Exception:  # whatever an optimizer may ask for that a lone weight has not
        return None
    state = [value for value in tree_leaves(dict(alone.state)) if isinstance(value, Tensor) and value.numel() > 1]
    return round(sum(s.nbytes for s in state) / probe.nbytes * sum(p.nbytes for p in trained))
