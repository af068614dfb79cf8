"""Random configurations and schedulers: each one works, or an error names an argument to change."""

import copy
import dataclasses
import itertools
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from helpers import PROMPTS, make_trainer, redness, small_config, trained
from transformers import TrainingArguments

from diffusers_mixgrpo import MixedODESDEScheduler, MixGRPOConfig


NAN = math.nan
INF = math.inf

# What an argument may get by mistake, whatever its type. No integers in between: they would be large and legal.
WRONG: tuple[Any, ...] = (None, True, False, 0, 1, -1, 1.5, NAN, INF, -INF, 1e30, 1e-30, 5e-324, 10**400, 2**64)
WRONG += ("", "1", "no", "0.5", "all", b"1", {}, {"a": 1}, [], [1], (1, 2), object(), 1j, np.int64(1), np.float32(0.5))
WRONG += (np.float32("nan"), np.ones(2), np.True_, torch.ones(()), "{", "[1]", math.sin)

COUNT = (1, 2, 3, 4, np.int64(2))
OPTIONAL_COUNT = (None, *COUNT)
POSITIVE = (1e-3, 0.1, 0.5, 1, 2.0, 100, np.float32(0.25))
SHARE = (1, 0.5, 1e-3, 1e-9)
SWITCH = (True, False)
BETA = (0, 0.5, 0.9, 0.999, 1, 1.0)

# Values that are legal, or nearly: small enough to train
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "height": (16, 32, 8, 30, None),
    "width": (16, 32, 8, 30),
    "num_inference_steps": (2, 3, 4, 5, 6),
    "guidance_scale": (None, 0, 1, 3.5, 1000.0, -1.0, 1e5),
    "max_sequence_length": (None, 1, 8, 512, 513),
    "negative_prompt": (None, "blurry"),
    "shift": (None, 1, 3.0, 0.1, 0.01, 100, 1000),
    "sde_type": ("flow", "dance", "cps", "dpm", "sde"),
    "eta": (0.7, 1, 0.01, 1e-3, 1e-6, 1.5, 3, 10.0, 1e9),
    "ode_solver": ("euler", "dpmsolver++", "unipc", "heun"),
    "solver_order": (1, 2, 3, 4),
    "prefix_ratio": SHARE,
    "suffix_ratio": SHARE,
    "shared_noise": SWITCH,
    "sample_batch_size": OPTIONAL_COUNT,
    "ode_cache": (
        None,
        "FirstBlockCacheConfig",
        {"name": "FirstBlockCacheConfig", "threshold": 0.1},
        {"name": "FirstBlockCacheConfig", "threshold": "0.1"},
        '{"name": "FirstBlockCacheConfig", "threshold": 0.1}',
        {"name": "TaylorSeerCacheConfig", "cache_interval": 2, "disable_cache_before_step": 1, "use_lite_mode": True},
        {"name": "TaylorSeerCacheConfig", "cache_interval": 0, "disable_cache_before_step": 1, "use_lite_mode": True},
        {"name": "TaylorSeerCacheConfig", "cache_interval": None},
    ),
    "merge_lora": SWITCH,
    "decode_batch_size": OPTIONAL_COUNT,
    "window_strategy": ("progressive", "random", "frozen", "linear_decay", "exp_decay", "linear"),
    "window_size": (1, 2, 3, 4, -1, "all"),
    "window_start": (0, 1, 2),
    "window_last_start": (None, 0, 1, 2, 0.3, 0.9, 1.5, -1, 100),
    "loss_type": ("grpo", "grpo_guard", "dppo", "ppo"),
    "step_weighting": ("none", "rectified", "noise", "flat"),
    "kl_threshold": (1e-5, 1e-3, 1, 0, -1.0),
    "kl_type": ("transition", "velocity", "both"),
    "window_interval": COUNT,
    "window_stride": COUNT,
    "window_decay_rate": (0, 0.1, 1000, 1e300),
    "window_decay_start": (0, 1, 13),
    "window_min_interval": COUNT,
    "window_train_fraction": SHARE,
    "reward_weights": (None, [1], [0.0], [-1.0], [1.0, 2.0], [NAN], ["1"], [1e300], [5e-324], [True]),
    "multi_objective_aggregation": ("normalize_then_sum", "sum_then_normalize", "mean"),
    "scale_rewards": ("group", "batch", "none", "std"),
    "advantage_clip": (None, *POSITIVE, 1e-9, 1e9),
    "reward_init_kwargs": (None, {"a": {}}, '{"a": {}}'),
    "reward_timeout": (None, 10, 60.0, 1e9, 1e100),
    "offload_rewards": SWITCH,
    "max_reward_failure_rate": (0, 0.5, 1),
    "num_generations": (2, 4, 8, 3),
    "steps_per_generation": COUNT,
    "num_iterations": COUNT,
    "epsilon": (1e-4, 1e-2, 1, 10.0, 1e-9, 1e38, 1e300),
    "epsilon_high": (None, 1e-2, 1, 10.0, 1e-9, 1e38, 1e300),
    "beta": (0, 0.1, 10, 1e4, 1e20, 1e38),
    "replay_top_k": (None, 1, 2, 100),
    "reuse_rollout_graph": SWITCH,
    "replay_batch_size": OPTIONAL_COUNT,
    "max_nonfinite_steps": COUNT,
    "ema_decay": (None, 0, 0.5, 0.9999, 1),
    "shuffle_dataset": SWITCH,
    "cache_prompt_embeds": (False,),
    "eval_num_inference_steps": (None, 1, 2, 5),
    "eval_height": (None, 32, 64, 33),
    "eval_width": (None, 48, 2**20),
    "eval_seed": (0, 1, 2**32 - 1, 2**63),
    "hacking_guard": ("off", "warn", "stop", "on"),
    "logging_images_steps": (None, 1, 2, 0.5, 0, 1.5),
    "num_logged_prompts": COUNT,
    "num_logged_seeds": COUNT,
    "model_init_kwargs": (None, {"revision": "main"}, '{"revision": "main"}'),
    "attention_backend": (None, "native", "NATIVE", "flash", "flesh"),
    "compile_repeated_blocks": (False,),
    "quantization": (None, {"quant_backend": "torchao"}),
    "offload_vae": SWITCH,
    # Of TrainingArguments
    "seed": (0, 42, 2**32 - 1, 2**32, np.int64(3)),
    "data_seed": (None, 0, 42, 2**32 - 1),
    "per_device_train_batch_size": (1, 2, 4, 8),
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "dataloader_num_workers": (0,),
    "dataloader_prefetch_factor": (None, 1, 2),
    "dataloader_persistent_workers": SWITCH,
    "dataloader_pin_memory": SWITCH,
    "dataloader_drop_last": SWITCH,
    "learning_rate": (0, 1e-5, 1e-3, 1.0, 1e3, 1e20, 1e38),
    "weight_decay": (0, 1e-4, 0.1, 10, 1e6, 1e38),
    "adam_beta1": BETA,
    "adam_beta2": BETA,
    "adam_epsilon": (1e-8, 1e-3, 0, 1e-30, 1e-50),
    "max_grad_norm": (0, 1, 1e-9, 1e9, INF),
    "max_steps": (-1, 1, 2, 3, 4),
    "num_train_epochs": (1, 0.5, 2),
    "logging_steps": (1, 2, 0.5, 1e-9, 2.5),
    "eval_steps": (None, 1, 2, 0.5, 0, 2.5),
    "save_steps": (1, 2, 0.5, 2.5),
    "save_total_limit": (None, 1, 2),
    "save_strategy": ("no", "steps", "epoch", "best"),
    "eval_strategy": ("no", "steps", "epoch"),
    "logging_strategy": ("no", "steps", "epoch"),
    "logging_first_step": SWITCH,
    "eval_on_start": SWITCH,
    "eval_delay": (0, 1, 2.5),
    "load_best_model_at_end": SWITCH,
    "metric_for_best_model": (None, "reward", "loss", "rewards/redness/mean"),
    "greater_is_better": (None, True, False),
    "save_only_model": SWITCH,
    "warmup_steps": (0, 1, 0.5, 10),
    "lr_scheduler_type": ("constant", "linear", "cosine", "cosine_with_min_lr", "reduce_lr_on_plateau", "polynomial"),
    "lr_scheduler_kwargs": (None, {}, {"min_lr": 0.0}, {"num_cycles": 2}, '{"num_cycles": 2}', {"power": NAN}),
    "optim": ("adamw_torch", "sgd", "adafactor", "adamw_torch_fused", "adamw_bnb_8bit", "lion_8bit", "galore_adamw"),
    "optim_args": (None, "momentum=0.9", "momentum"),
    "bf16": (None, True, False),
    "fp16": SWITCH,
    "activation_checkpointing": (None, True, False),
    "gradient_checkpointing": (None, True, False),
    "gradient_checkpointing_kwargs": (None, {"use_reentrant": False}, '{"use_reentrant": false}'),
    "label_smoothing_factor": (0, 0.1),
    "neftune_noise_alpha": (None, 0.1),
    "include_num_input_tokens_seen": (False, "no", "all", "non_padding", True),
    "torch_empty_cache_steps": (None, 1),
    "torch_compile": SWITCH,
    "torch_compile_mode": (None, "default"),
    "auto_find_batch_size": SWITCH,
    "remove_unused_columns": (False,),
    "report_to": ("none", [], ["none"], "wandb_", "comet_ml"),
    "run_name": (None, "a"),
    "logging_nan_inf_filter": SWITCH,
    "ignore_data_skip": SWITCH,
    "use_liger_kernel": SWITCH,
    "accelerator_config": (None, {"even_batches": True}, {"split_batches": True}, {"even_batch": True}),
    "debug": ("", [], "overflow"),
    "log_level": ("passive", "warning", "loud"),
    "ddp_timeout": (1800,),
}

FLAG = (True, False)
SCHEDULER_VALUES: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000, 1, 2, 10, 10_000, 10**9),
    "shift": (1, 3.0, 0.1, 0.01, 100, 1000, 1e30),
    "use_dynamic_shifting": FLAG,
    "base_shift": (0.5, None, 0, -1, 4, 100),
    "max_shift": (1.15, None, 0, -1, 4, 100),
    "base_image_seq_len": (256, 1, 4096, 4097),
    "max_image_seq_len": (4096, 256, 255, 1),
    "invert_sigmas": FLAG,
    "shift_terminal": (None, 0.1, 0, 0.02, 0.99, 1, -0.5),
    "use_karras_sigmas": FLAG,
    "use_exponential_sigmas": FLAG,
    "use_beta_sigmas": FLAG,
    "time_shift_type": ("exponential", "linear", "quadratic"),
    "stochastic_sampling": FLAG,
    "use_flow_sigmas": (False, "unipc", "dpmsolver", True, "euler"),
    "sde_type": PLAUSIBLE["sde_type"],
    "eta": PLAUSIBLE["eta"],
    "window_start": (0, 1, 2, 100),
    "window_size": (0, 1, 2, "all", 100),
    "ode_solver": PLAUSIBLE["ode_solver"],
    "solver_order": PLAUSIBLE["solver_order"],
    "solver_type": ("midpoint", "heun", "euler"),
    "suffix_ratio": SHARE,
    "prefix_ratio": SHARE,
}


def draw(kind: str, case: int, plausible: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """One to three arguments with values, each from both tables alike; the same in every run."""
    generator = random.Random(f"{kind}/{case}")
    names = generator.sample(list(plausible), generator.choice((1, 2, 3)))
    return {name: generator.choice(plausible[name] if generator.random() < 0.6 else WRONG) for name in names}


def names_one(error: Exception, changes: dict[str, Any]) -> bool:
    """Whether the error is of a kind that says what to change, and names one of the changed arguments."""
    if not isinstance(error, (ValueError, TypeError)):
        return False
    return any(re.search(rf"\b{name}\b", str(error)) for name in changes)


def refused(error: Exception, changes: dict[str, Any]) -> str:
    return "refused by name" if names_one(error, changes) else f"died: {type(error).__name__}: {str(error)[:150]}"


class Outcomes:
    """What became of each case."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def add(self, kind: str, case: int, changes: dict[str, Any], outcome: str) -> None:
        self.of[f"{kind} {case}: {str(changes)[:200]}"] = outcome

    def check(self, least: dict[str, int]) -> None:
        """Nothing but `least`, and of each as many as there: with all refused, or none, the test would say nothing."""
        counts = Counter(outcome.split(":")[0] for outcome in self.of.values())
        bad = [f"{case}\n    {outcome}" for case, outcome in self.of.items() if outcome.split(":")[0] not in least]
        assert not bad, f"{dict(counts)}\n" + "\n".join(bad)
        assert all(counts[outcome] >= count for outcome, count in least.items()), dict(counts)


# ---- Configurations ----


def train(folder: Path, pipe: FluxPipeline, changes: dict[str, Any]) -> str:
    """The outcome of an iteration with an accepted configuration."""
    pipe = FluxPipeline(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"max_steps": 2, "eval_strategy": "no"} | changes
    is_short = kwargs["max_steps"] == -1 and "num_train_epochs" not in changes
    kwargs |= {"num_train_epochs": 1} if is_short else {}
    kwargs |= {"compile_repeated_blocks": False}  # which would take minutes
    try:
        trainer = make_trainer(folder, pipe=pipe, rewards=redness, eval_dataset=PROMPTS[:2], **kwargs)
        trainer.train()
        trainer.evaluate()
    except Exception as error:
        # Some values only the pipeline can refuse, such as a size that its VAE cannot encode.
        return "refused later" if names_one(error, changes) else refused(error, changes)
    is_finite = all(bool(weight.isfinite().all()) for weight in trained(trainer).values())
    return "trained" if is_finite else "NaN weights"


def try_configurations(folder: Path, pipe: FluxPipeline, count: int, most_trained: int) -> Outcomes:
    outcomes = Outcomes()
    accepted = []
    for case in range(count):
        changes = draw("config", case, PLAUSIBLE)
        try:
            small_config(folder, **({"max_steps": 2} | copy.deepcopy(changes)))
        except Exception as error:
            outcomes.add("config", case, changes, refused(error, changes))
        else:
            outcomes.add("config", case, changes, "accepted")
            accepted.append((case, changes))
    for case, changes in itertools.islice(accepted, most_trained):
        outcomes.add("config", case, changes, train(folder / str(case), pipe, changes))
    return outcomes


def test_a_configuration_works_or_names_an_argument(tmp_path, shared_pipe):
    outcomes = try_configurations(tmp_path, shared_pipe, count=200, most_trained=12)
    outcomes.check({"trained": 10, "accepted": 30, "refused by name": 60, "refused later": 0})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_accepted_configuration_trains(tmp_path, shared_pipe):
    outcomes = try_configurations(tmp_path, shared_pipe, count=1000, most_trained=1000)
    outcomes.check({"trained": 250, "refused by name": 400, "refused later": 0})


def test_the_values_cover_every_argument():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(MixGRPOConfig)} - inherited
    assert own <= set(PLAUSIBLE)
    assert set(PLAUSIBLE) - own <= inherited
    arguments = {name for name in MixedODESDEScheduler().config if not name.startswith("_")}
    assert set(SCHEDULER_VALUES) == arguments


# ---- Schedulers ----


def run(scheduler: MixedODESDEScheduler, case: int) -> str:
    """The outcome of a run with a velocity that points from the sample to a fixed image."""
    generator = torch.Generator().manual_seed(case)
    latents = torch.randn((2, 4, 3), generator=generator)
    image = torch.randn((2, 4, 3), generator=generator)
    steps = (3, 5, 8, 25)[case % 4]
    config = scheduler.config
    if config.window_size != "all" and config.window_start + config.window_size > steps - 1:
        steps = config.window_start + config.window_size + 1
    scheduler.set_timesteps(steps, mu=1.15)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = (latents - image) / scheduler.sigmas[index].clamp(min=0.01)
        output = scheduler.step(velocity.clamp(-10, 10), timestep, latents, generator=generator)
        latents = output.prev_sample
        if output.log_prob is not None and not output.log_prob.isfinite().all():
            return "NaN log-probs"
        if not latents.isfinite().all():
            return "NaN latents"
    return "ran" if latents.abs().max() < 1e4 else f"unbounded: {latents.abs().max():.0e}"


def try_schedulers(count: int) -> Outcomes:
    outcomes = Outcomes()
    for case in range(count):
        changes = draw("scheduler", case, SCHEDULER_VALUES)
        try:
            # As a pipeline does: it computes `mu` from all four
            config = MixedODESDEScheduler(**changes).config
            slope = (config.max_shift or 0) - (config.base_shift or 0)
            assert math.isfinite(slope / (config.max_image_seq_len - config.base_image_seq_len))
            outcome = run(MixedODESDEScheduler(**changes), case)
        except Exception as error:
            outcome = refused(error, changes)
        outcomes.add("scheduler", case, changes, outcome)
    return outcomes


def test_a_scheduler_works_or_names_an_argument():
    try_schedulers(300).check({"ran": 60, "refused by name": 120})


@pytest.mark.slow
def test_a_thousand_schedulers_work_or_name_an_argument():
    try_schedulers(1000).check({"ran": 250, "refused by name": 450})
