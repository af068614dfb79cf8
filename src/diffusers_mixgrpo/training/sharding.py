"""Whether a launch trains with the processes and the sharding that it asks for, which accelerate may leave out."""

import os

from accelerate.utils import DistributedType
from transformers.utils import logging

from ..mixgrpo_config import MixGRPOConfig


logger = logging.get_logger(__name__)


def check_launch(settings: MixGRPOConfig) -> None:
    """
    Refuse a launch that would train without the processes or the sharding that it asks for.

    Raises:
        `ValueError`: If there are several processes that would not train together, if FSDP or DeepSpeed would be left
            out, for FSDP1, and for half precision with DeepSpeed.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and settings.world_size == 1:
        raise ValueError(
            f"`use_cpu` must be True for several processes without GPUs, got {settings.use_cpu} with {processes} "
            "processes: each would train a model of its own and write it to the same `output_dir`. Set it, or with "
            "DeepSpeed `ddp_backend='gloo'`, or start one process."
        )
    if processes == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        # accelerate sets the first in each launch, and the second in one for several processes.
        if settings.world_size == 1 and "WORLD_SIZE" not in os.environ:
            logger.warning(
                "`accelerate launch` was asked for several processes, but started this one alone, since it found "
                "fewer than two GPUs. For several on a CPU: `torchrun --nproc_per_node 2 script.py`, use_cpu=True."
            )
    if settings.sharding == "FSDP":
        _check_fsdp(settings)
    if settings.sharding == "DeepSpeed" and settings.use_cpu:
        raise ValueError(
            "`use_cpu` must be False with DeepSpeed, got True: accelerate would train without DeepSpeed. For DeepSpeed"
            " on a CPU set the environment variable DS_ACCELERATOR=cpu and `ddp_backend='gloo'`."
        )
    if settings.sharding == "DeepSpeed" and (settings.bf16 or settings.fp16):
        name = "bf16" if settings.bf16 else "fp16"
        raise ValueError(
            f"`{name}` must be False with DeepSpeed, got True: DeepSpeed casts the weights instead of using autocast, "
            f"and the float32 states of the sampler do not fit them. Set {name}=False, or use FSDP2 or DDP."
        )


def _check_fsdp(settings: MixGRPOConfig) -> None:
    kind = settings.distributed_state.distributed_type
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            f"`fsdp` must be off without GPUs and outside `accelerate launch` and `torchrun`, got it with {kind.value}"
            " processes: accelerate would train without sharding. Leave FSDP out, or start the script with one of "
            "them."
        )
    if settings.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version` must be 2, got {settings.fsdp_version}: FSDP1 is deprecated, and its flat parameters do "
            "not give the weights that diffusers loads. Use `accelerate launch --use_fsdp --fsdp_version 2`."
        )
