"""The table of what each field of [`MixGRPOConfig`] must be. What two fields must be together is checked there."""

import dataclasses
import functools
import math
import multiprocessing
from typing import get_args

from diffusers.models.attention_dispatch import AttentionBackendName
from transformers import SchedulerType, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import FSDPOption
from transformers.training_args import trainer_log_levels

from . import argument_rules as must_be
from .core.advantages import AGGREGATIONS, SCALINGS
from .core.objectives import KL_TYPES, LOSS_TYPES
from .core.step_weights import STEP_WEIGHTINGS
from .core.window_schedule import WindowStrategy
from .scheduling_mixed_ode_sde import SCHEDULER_RULES


@functools.cache
def config_rules(cls: type[TrainingArguments]) -> dict[str, must_be.Rule]:
    """What each field of `MixGRPOConfig`, or of a subclass, must be. One not named here follows its annotation."""
    integer = must_be.integer
    number = must_be.number
    optional = must_be.optional
    only = must_be.only
    count = integer(1)
    share = number(0, 1, above=True)
    image_side = integer(1, 2**14)
    # NumPy's generators and torch's all take these.
    seed = integer(0, 2**32 - 1)
    # A fraction of the run if below 1, steps otherwise
    interval = must_be.Rule(
        "a number in (0, 1) or an integer of 1 or more",
        lambda value: number(0, above=True).holds(value) and (value < 1 or value == int(value)),
    )
    # Closer to 0 it would be lost beside the 1 of a ratio in float32.
    clip_range = number(2**-23, 1000)
    decay = must_be.Rule("a number in (0, 1)", lambda value: number(0, 1, above=True).holds(value) and value < 1)
    settings_file = must_be.any_of(must_be.MAPPING, must_be.FILE)
    no_compile = "it would compile the model for training and not for sampling, and their log-probs would differ"
    no_compile += " by rounding; use compile_repeated_blocks=True"
    # Older versions of transformers do not have these, nor some of those without effect.
    newer = {
        "activation_checkpointing_kwargs": optional(must_be.MAPPING),
        "dataloader_multiprocessing_context": optional(must_be.choice(multiprocessing.get_all_start_methods())),
    }
    fields = {field.name for field in dataclasses.fields(cls)}
    return must_be.rules_of(
        cls,
        **{name: rule for name, rule in (newer | _without_effect()).items() if name in fields},
        # The sampler
        height=optional(image_side),
        width=optional(image_side),
        num_inference_steps=integer(2, 1000),
        guidance_scale=optional(number(0, 1000)),
        max_sequence_length=optional(count),
        shift=optional(SCHEDULER_RULES["shift"]),
        **{name: SCHEDULER_RULES[name] for name in ("sde_type", "eta", "ode_solver", "solver_order")},
        **{name: SCHEDULER_RULES[name] for name in ("prefix_ratio", "suffix_ratio")},
        sample_batch_size=optional(count),
        ode_cache=optional(must_be.MAPPING),
        decode_batch_size=optional(count),
        # The window
        window_strategy=must_be.choice(get_args(WindowStrategy)),
        window_interval=count,
        window_stride=count,
        window_decay_rate=number(0),
        window_decay_start=integer(0),
        window_min_interval=count,
        window_last_start=optional(
            must_be.Rule(
                "a share in (0, 1) or an integer of 0 or more",
                lambda value: number(0).holds(value) and (value < 1 or value == int(value)),
            )
        ),
        window_train_fraction=share,
        # The rewards
        reward_weights=optional(must_be.list_of(number(-1e6, 1e6))),
        multi_objective_aggregation=must_be.choice(AGGREGATIONS),
        scale_rewards=must_be.choice(SCALINGS),
        advantage_clip=optional(number(0, 1e6, above=True)),
        reward_init_kwargs=optional(must_be.MAPPING),
        reward_timeout=optional(number(1e-3, 1e6)),
        max_reward_failure_rate=number(0, 1),
        # The objective
        num_generations=must_be.Rule(
            "an integer of 2 or more, since advantages compare the images of one prompt", integer(2).holds
        ),
        steps_per_generation=count,
        num_iterations=count,
        epsilon=clip_range,
        epsilon_high=optional(clip_range),
        loss_type=must_be.choice(LOSS_TYPES),
        step_weighting=must_be.choice(STEP_WEIGHTINGS),
        kl_threshold=number(0, 1e6, above=True),
        beta=number(0, 1e6),
        kl_type=must_be.choice(KL_TYPES),
        replay_top_k=optional(count),
        replay_batch_size=optional(count),
        max_nonfinite_steps=count,
        ema_decay=optional(decay),
        # Data, evaluation and logging
        eval_num_inference_steps=optional(integer(1, 1000)),
        eval_height=optional(image_side),
        eval_width=optional(image_side),
        eval_seed=seed,
        hacking_guard=must_be.choice(("off", "warn", "stop")),
        logging_images_steps=optional(interval),
        num_logged_prompts=count,
        num_logged_seeds=count,
        model_init_kwargs=optional(must_be.MAPPING),
        # Speed and memory
        attention_backend=optional(_attention_backend()),
        quantization=optional(must_be.MAPPING),
        # Of TrainingArguments: data
        output_dir=optional(must_be.PATH),
        seed=seed,
        data_seed=optional(seed),
        per_device_train_batch_size=count,
        per_device_eval_batch_size=count,
        gradient_accumulation_steps=count,
        dataloader_num_workers=integer(0, 1024),
        dataloader_prefetch_factor=optional(count),
        remove_unused_columns=only(False, "True would remove 'prompt' and the columns that reward functions need"),
        auto_find_batch_size=only(
            False,
            "another batch size would break up the groups of `num_generations` images; set `sample_batch_size`, "
            "`decode_batch_size` and `replay_batch_size`, which limit memory use without changing the result",
        ),
        # The optimizer
        learning_rate=number(0, 100),
        lr_scheduler_type=must_be.choice(member.value for member in SchedulerType),
        lr_scheduler_kwargs=optional(must_be.MAPPING),
        warmup_steps=number(0),
        weight_decay=number(0, 1e3),
        adam_beta1=number(0, 1 - 2**-24),
        adam_beta2=number(0, 1 - 2**-24),
        # Squares of smaller gradients vanish in float32, and a step that is divided by epsilon alone would be large.
        adam_epsilon=number(2**-63, 1),
        max_grad_norm=must_be.any_of(
            number(0), must_be.Rule("inf", lambda value: isinstance(value, float) and value == math.inf)
        ),
        max_steps=must_be.any_of(only(-1), count),
        num_train_epochs=number(0, above=True),
        # Intervals
        logging_steps=interval,
        eval_steps=optional(must_be.any_of(interval, number(0, 0))),
        eval_delay=number(0),
        save_steps=interval,
        save_total_limit=optional(count),
        # What has no meaning here, or breaks the training
        torch_compile=only(False, no_compile),
        torch_compile_mode=only(None, no_compile),
        torch_compile_backend=only(None, no_compile),
        enable_jit_checkpoint=only(False, "a checkpoint is saved on SIGTERM already, and is exact"),
        # Reports and processes
        report_to=_reports(),
        log_level=must_be.choice(trainer_log_levels),
        log_level_replica=must_be.choice(trainer_log_levels),
        debug=_debug_options(),
        resume_from_checkpoint=optional(must_be.any_of(must_be.PATH, must_be.SWITCH)),
        gradient_checkpointing_kwargs=optional(must_be.MAPPING),
        accelerator_config=optional(must_be.any_of(settings_file, must_be.rule_of(AcceleratorConfig))),
        fsdp=optional(
            must_be.any_of(must_be.SWITCH, must_be.TEXT, must_be.list_of(must_be.rule_of(FSDPOption | str)))
        ),
        fsdp_config=optional(settings_file),
        deepspeed=optional(settings_file),
        ddp_backend=optional(must_be.choice(["nccl", "mpi", "xccl", "hccl", "cncl", "mccl", "gloo"])),
        ddp_bucket_cap_mb=optional(count),
        ddp_timeout=count,
    )


def _without_effect() -> dict[str, must_be.Rule]:
    """Of `TrainingArguments`: what would be passed over in silence, and why. Each may only be its default."""
    only = must_be.only
    no_tokens = "the model has no tokens"
    no_kernels = "the kernels are for language models"
    no_labels = "rows are prompts, which have no labels"
    no_predictions = "an evaluation returns rewards, not predictions"
    no_lengths = "prompts are padded to one length, and their order is that of `shuffle_dataset`"
    precision = "evaluations have the precision of training: use bf16=True or fp16=True"
    return {
        # Of language models
        "use_liger_kernel": only(False, no_kernels),
        "liger_kernel_config": only(None, no_kernels),
        "use_cache": only(False, no_tokens),
        "neftune_noise_alpha": only(None, no_tokens),
        "include_num_input_tokens_seen": must_be.any_of(only(False, no_tokens), must_be.choice(["no"])),
        "average_tokens_across_devices": only(True, no_tokens),
        # Of supervised training
        "label_smoothing_factor": must_be.Rule(f"0, since {no_labels}", must_be.number(0, 0).holds),
        "label_names": only(None, no_labels),
        "train_sampling_strategy": only("random", no_lengths + " (False for the dataset's own)"),
        "length_column_name": only("length", no_lengths),
        # Of predictions
        "prediction_loss_only": only(False, no_predictions),
        "eval_do_concat_batches": only(True, no_predictions),
        "eval_use_gather_object": only(False, no_predictions),
        "eval_accumulation_steps": only(None, no_predictions),
        "include_for_metrics": only([], no_predictions),
        "batch_eval_metrics": only(False, no_predictions),
        "do_predict": only(False, f"{no_predictions}: use trainer.sample_images(prompts) for images"),
        # Of precision, memory and processes
        "bf16_full_eval": only(False, precision),
        "fp16_full_eval": only(False, precision),
        "torch_empty_cache_steps": only(
            None, "training does not empty the cache: set `sample_batch_size` and `replay_batch_size` to save memory"
        ),
        "parallelism_config": only(
            None, "tensor, context and sequence parallelism are not supported: use `fsdp` or `deepspeed` to shard"
        ),
    }


def _attention_backend() -> must_be.Rule:
    names = [backend.value for backend in AttentionBackendName]
    legal = f"one of {', '.join(names)}"
    return must_be.Rule(legal, lambda value: isinstance(value, str) and value.lower() in names)


def _reports() -> must_be.Rule:
    names = ["none", "all", *get_available_reporting_integrations()]
    one = must_be.Rule(f"one of the installed {', '.join(names)}", must_be.choice(names).holds)
    return must_be.optional(must_be.any_of(one, must_be.list_of(one)))


def _debug_options() -> must_be.Rule:
    option = must_be.choice([DebugOption.UNDERFLOW_OVERFLOW.value])  # the other one is of a loop that is not run
    words = must_be.Rule(
        f"words that are each {option.legal}",
        lambda value: isinstance(value, str) and all(option.holds(word) for word in value.split()),
    )
    return must_be.optional(must_be.any_of(words, must_be.list_of(option)))
