"""Every field of the installed TrainingArguments: what it does here, or that it is refused."""

import dataclasses
import math

import pytest
from accelerate import ParallelismConfig
from helpers import PROMPTS, logged, small_config
from transformers import TrainingArguments


# Would be passed over in silence -> a value that is refused
WITHOUT_EFFECT = {
    # Of language models
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "neftune_noise_alpha": 5.0,
    "include_num_input_tokens_seen": "all",
    "average_tokens_across_devices": False,
    # Of supervised training
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    # Of predictions
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "do_predict": True,
    # Of precision and memory
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "torch_empty_cache_steps": 4,
}
# Would break the training, or change what it computes without a word -> a value that is refused
BREAKS = {
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "auto_find_batch_size": True,
    "remove_unused_columns": True,
    "enable_jit_checkpoint": True,
    "parallelism_config": ParallelismConfig(),
    "accelerator_config": {"split_batches": True},
    "optim_target_modules": ["to_q"],
    "debug": "tpu_metrics_debug",
    "metric_for_best_model": "eval_loss",
}
# Do what their documentation says
WORK = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm
bf16 fp16 tf32 activation_checkpointing gradient_checkpointing logging_strategy logging_steps logging_first_step
log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit
push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb
ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed skip_memory_metrics
""".split()
# Ask for what happens anyway, or are for scripts and launchers: the Trainer does not read them
HARMLESS = ["dataloader_drop_last", "do_train", "do_eval", "resume_from_checkpoint", "local_rank"]

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
REFUSED = {name: value for name, value in (WITHOUT_EFFECT | BREAKS).items() if name in FIELDS}


def test_every_field_is_decided():
    decided = [*WITHOUT_EFFECT, *BREAKS, *WORK, *HARMLESS]
    assert len(decided) == len(set(decided))
    assert FIELDS - set(decided) == set()


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_without_effect_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"`{name}`.* must .*, got ") as caught:
        small_config(tmp_path, **{name: REFUSED[name]})
    assert name in BREAKS or ", since " in str(caught.value)


@pytest.mark.parametrize("name", [name for name in WITHOUT_EFFECT if name in FIELDS])
def test_the_default_is_not_refused(tmp_path, name):
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    default = fields[name].default
    default = fields[name].default_factory() if default is dataclasses.MISSING else default
    assert getattr(small_config(tmp_path, **{name: default}), name) == default


def test_the_kinds_of_gradient_checkpointing(tmp_path):
    kwargs = '{"use_reentrant": true}'
    with pytest.raises(
        ValueError, match="must have use_reentrant=False, .* got {'use_reentrant': True}. Leave it out"
    ):
        small_config(tmp_path, gradient_checkpointing_kwargs=kwargs)
    config = small_config(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}


# ---- Learning rates that follow an evaluation ----

PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1}}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": PROMPTS[:2]}


def test_the_learning_rate_falls_when_the_reward_does(make):
    """A reward that falls with each evaluation: the learning rate falls from the second on. Its own mode is "min"."""
    values = iter(range(1000, 0, -1))

    def falling(prompts, images, **columns):
        return [float(next(values)) for _ in images]

    trainer = make(rewards=falling, max_steps=8, **PLATEAU, **EVALUATED)
    trainer.train()
    assert logged(trainer, "learning_rate")[0] == 1e-3
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.1**3)


def test_the_learning_rate_stays_while_the_reward_rises(make):
    values = iter(range(1000))

    def rising(prompts, images, **columns):
        return [float(next(values)) for _ in images]

    trainer = make(rewards=rising, max_steps=8, **PLATEAU, **EVALUATED)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    assert len(logged(trainer, "eval_reward")) == 4


@pytest.mark.parametrize(("greater", "mode"), [(None, "max"), (True, "max"), (False, "min")])
def test_the_direction_of_the_metric(tmp_path, greater, mode):
    config = small_config(tmp_path, eval_strategy="steps", eval_steps=2, greater_is_better=greater, **PLATEAU)
    assert config.lr_scheduler_kwargs == {"mode": mode, "patience": 0, "factor": 0.1}
    own = {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"mode": "min"}}
    config = small_config(tmp_path, eval_strategy="steps", eval_steps=2, greater_is_better=greater, **own)
    assert config.lr_scheduler_kwargs == {"mode": "min"}


def test_no_learning_rate_that_follows_a_loss(tmp_path):
    with pytest.raises(ValueError, match="`metric_for_best_model` must be a metric of the evaluation, .* no loss"):
        small_config(tmp_path, eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_loss", **PLATEAU)


def test_no_evaluation_to_follow(tmp_path):
    with pytest.raises(ValueError, match="`eval_strategy` must be 'steps' or 'epoch' with .*reduce_lr_on_plateau"):
        small_config(tmp_path, **PLATEAU)


# ---- Metrics that no evaluation has ----


@pytest.mark.parametrize(
    ("metric", "datasets"),
    [
        ("rewards/nope/mean", PROMPTS[:2]),
        ("my_reward", PROMPTS[:2]),
        ("eval_rewards/redness/median", PROMPTS[:2]),
        ("a_reward", PROMPTS[:2]),
        ("c_reward", {"a": PROMPTS[:1], "b": PROMPTS[:1]}),
        ("rewards/redness/mean", {"a": PROMPTS[:1], "b": PROMPTS[:1]}),
    ],
)
def test_a_metric_that_no_evaluation_has(make, metric, datasets):
    with pytest.raises(ValueError, match=f"`metric_for_best_model` must be one of .*reward.*, got '{metric}'"):
        make(metric_for_best_model=metric, eval_strategy="steps", eval_steps=2, eval_dataset=datasets)


@pytest.mark.parametrize(
    ("metric", "datasets"),
    [
        ("rewards/redness/mean", PROMPTS[:2]),
        ("eval_reward", PROMPTS[:2]),
        ("ema_reward", PROMPTS[:2]),
        ("b_rewards/redness/mean", {"a": PROMPTS[:1], "b": PROMPTS[:1]}),
        ("eval_reward", {"a": PROMPTS[:1], "b": PROMPTS[:1]}),
    ],
)
def test_a_metric_that_the_evaluation_has(make, metric, datasets):
    trainer = make(
        metric_for_best_model=metric,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        eval_dataset=datasets,
        ema_decay=0.5,
    )
    trainer.train()
    assert math.isfinite(trainer.state.best_metric)


# ---- Methods of the Trainer ----


def test_what_to_use_instead_of_predict(make):
    with pytest.raises(NotImplementedError, match=r"`predict` .*trainer.sample_images\(prompts\).*evaluate"):
        make().predict(PROMPTS)


def test_what_to_use_instead_of_a_hyperparameter_search(make):
    with pytest.raises(NotImplementedError, match="`hyperparameter_search` .*new pipeline.*eval_reward"):
        make().hyperparameter_search(n_trials=2)
