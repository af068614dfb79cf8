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
            out, for FSDP1, and for float16 with DeepSpeed.
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
    if settings.sharding == "DeepSpeed" and settings.fp16:
        raise ValueError(
            "`fp16` must be False with DeepSpeed, got True: the gradients of float16 weights overflow. Use bf16=True."
        )


def use_autocast_in_deepspeed(settings: MixGRPOConfig) -> None:
    """
    In bfloat16, let DeepSpeed compute under autocast, and add up gradients in float32, as without it.

    DeepSpeed keeps bfloat16 weights, and float32 copies of the trained ones in its optimizer. By itself it runs the
    model without autocast, even inside one, so that the float32 states of the sampler would not fit the weights.
    """
    plugin = settings.deepspeed_plugin
    config = {} if plugin is None else plugin.deepspeed_config
    if config.get("bf16", {}).get("enabled"):
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


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
