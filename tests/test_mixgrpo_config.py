"""The configuration: the paper's defaults, the batch arithmetic, and errors that say what to change."""

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path
from unittest.mock import MagicMock

import accelerate.utils
import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from transformers import TrainingArguments
from trl import TrlParser

from diffusers_mixgrpo import MixedODESDEScheduler, MixGRPOConfig, MixGRPOTrainer


def make(tmp_path, **kwargs) -> MixGRPOConfig:
    return MixGRPOConfig(**{"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, **kwargs})


def test_the_preset_is_the_papers_and_the_defaults_differ_where_documented(tmp_path):
    config = MixGRPOConfig.from_preset("mixgrpo", output_dir=str(tmp_path))
    published = {
        "num_inference_steps": 25,
        "window_size": 4,
        "window_interval": 25,
        "window_stride": 1,
        "window_strategy": "progressive",
        "eta": 0.7,
        "sde_type": "flow",
        "guidance_scale": 3.5,
        "num_generations": 12,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-5,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "epsilon": 1e-4,
        "advantage_clip": 5.0,
        "beta": 0.0,
        "height": 720,
        "width": 720,
        "shared_noise": True,
        "lr_scheduler_type": "constant",
        "scale_rewards": "group",
        "step_weighting": "none",
        "loss_type": "grpo",
        "window_last_start": None,
    }
    assert {name: getattr(config, name) for name in published} == published
    recommended = {"sde_type": "cps", "eta": 0.5, "scale_rewards": "batch", "step_weighting": "rectified"}
    recommended["lr_scheduler_type"] = "linear"
    default = make(tmp_path)
    recommended |= dict.fromkeys(("height", "width", "guidance_scale"))  # those of the pipeline
    assert {name: getattr(default, name) for name in published} == published | recommended
    assert config.optimizer_steps_per_iteration == 4
    assert config.prompts_per_iteration == 1
    schedule = config.window_schedule()
    assert [schedule.schedule(m) for m in (0, 24, 25)] == [(0, 4), (0, 4), (1, 4)]


@pytest.mark.parametrize(
    "batch, accumulation, per_generation, passes, group, steps, prompts",
    [
        (3, 1, 4, 1, 12, 4, 1),
        (32, 1, 4, 1, 8, 4, 16),
        (1, 12, 12, 1, 12, 1, 1),
        (4, 2, 4, 3, 8, 6, 2),
        (2, 8, 4, 2, 4, 1, 2),
    ],
)
def test_batch_arithmetic(tmp_path, batch, accumulation, per_generation, passes, group, steps, prompts):
    config = make(
        tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=passes,
        num_generations=group,
    )
    assert config.optimizer_steps_per_iteration == steps
    assert config.prompts_per_iteration == prompts


# ---- Bad values ----

NAN = math.nan
INF = math.inf
COUNTS = (
    "num_inference_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_logged_prompts",
    "num_logged_seeds",
    "max_nonfinite_steps",
    "window_interval",
    "window_stride",
    "window_min_interval",
)
OPTIONAL_COUNTS = (
    "max_sequence_length",
    "sample_batch_size",
    "decode_batch_size",
    "replay_batch_size",
    "eval_num_inference_steps",
    "height",
    "width",
    "eval_height",
    "eval_width",
    "replay_top_k",
)
NOT_POSITIVE = (0.0, -0.5, NAN, INF, -INF, True, "0.5")
NOT_A_SHARE = (0.0, -0.4, 1.5, NAN, INF, True, "0.4")
NOT_A_COUNT = (0, -2, 1.5, NAN, True, "3")

SWITCHES = (
    "shared_noise",
    "merge_lora",
    "offload_rewards",
    "offload_vae",
    "reuse_rollout_graph",
    "shuffle_dataset",
    "cache_prompt_embeds",
    "compile_repeated_blocks",
    "push_to_hub",
    "load_best_model_at_end",
)

# Argument -> values that it cannot have, each alone with the defaults of all others
BAD_VALUES = {
    "window_last_start": (-1, 1.5, 22, "half"),
    "loss_type": ("ppo", None),
    "step_weighting": ("flat", None),
    "kl_threshold": (0, -1.0),
    "kl_type": ("noise", None),
    "ema_decay": (0, 1, 1.0, -0.5, NAN, INF, True, "0.99"),
    **{name: (*NOT_A_COUNT, None) for name in COUNTS},
    **dict.fromkeys(OPTIONAL_COUNTS, NOT_A_COUNT),
    "num_generations": (1, 0, -12, 12.0, True, "12", None),
    "window_decay_start": (-1, 1.5, True, "13", None),
    "sde_type": ("langevin", "Flow", "", None, 1, True),
    "eta": (*NOT_POSITIVE, None),
    "ode_solver": ("rk4", "heun", "", None, 2),
    "solver_order": (0, 4, -1, 1.5, NAN, True, "2", None),
    "prefix_ratio": (*NOT_A_SHARE, None),
    "suffix_ratio": (*NOT_A_SHARE, None),
    "window_train_fraction": (*NOT_A_SHARE, None),
    "ode_cache": (
        "taylor",
        {},
        {"name": "TaylorCacheConfig"},
        {"threshold": 0.1},
        {"name": "FirstBlockCacheConfig", "treshold": 0.1},
        {"name": "FluxPipeline"},
        3,
    ),
    "window_strategy": ("zigzag", "Random", None, 0),
    "window_size": (0, -2, 25, 4.0, NAN, True, "4", None),
    "window_start": (-1, 1.5, NAN, True, "0", None, 2),
    "window_decay_rate": (-0.1, NAN, INF, True, "0.1", None),
    "multi_objective_aggregation": ("max", "mean", None, 1),
    "scale_rewards": ("prompt", "std", None, True),
    "advantage_clip": NOT_POSITIVE,
    "reward_timeout": NOT_POSITIVE,
    "max_reward_failure_rate": (-0.1, 1.5, NAN, INF, True, "0.5", None),
    "epsilon": (*NOT_POSITIVE, None),
    "epsilon_high": NOT_POSITIVE,
    "shift": NOT_POSITIVE,
    "beta": (-1.0, NAN, INF, True, "0.1", None),
    "guidance_scale": (NAN, INF, -INF, True, "3.5"),
    "negative_prompt": (7, True, ["ugly"]),
    "attention_backend": ("flesh", "", 7, True, False),
    "quantization": (
        "nf4",
        3,
        {},
        {"quant_backend": "torchao"},
        {"components_to_quantize": ["transformer"]},
        {"quant_backend": "torchao", "components_to_quantize": None},
        {"quant_backend": "torchao", "components_to_quantize": ["transformer"], "bits": 4},
    ),
    "remove_unused_columns": (True,),
    "auto_find_batch_size": (True,),
    "torch_compile": (True,),
    **dict.fromkeys(SWITCHES, ("no", 1, None, {})),
    "reward_weights": ("1", 1, [NAN], ["1"], [True]),
    "reward_init_kwargs": ("hpsv2", 3, "{", ["a"]),
    "model_init_kwargs": ("main", 3, "{"),
    "eval_seed": (-1, NAN, 1.5, True, "0", 2**32, None),
    "hacking_guard": ("on", "Warn", "", True, None),
    # Of TrainingArguments
    "seed": (-1, NAN, 1.5, True, "0", 2**32, None),
    "data_seed": (-1, NAN, "0", 2**32),
    "learning_rate": (NAN, INF, -1e-5, "1e-5", True, None, 1e9),
    "weight_decay": (NAN, INF, -1.0, "0", None),
    "adam_beta1": (1.0, -0.1, NAN, "0.9"),
    "adam_beta2": (1.0, -0.1, NAN, "0.9"),
    "adam_epsilon": (0.0, -1e-8, NAN, 1e-50, "1e-8"),
    "max_grad_norm": (-1.0, NAN, "1", None),
    "max_steps": (0, -2, 4.0, True, "4", None),
    "num_train_epochs": (0, -1.0, NAN, INF, "1", None),
    "warmup_steps": (-1, NAN, INF, "1", None),
    "logging_steps": (0, -1, 2.5, NAN, "1", None),
    "eval_steps": (-1, 2.5, NAN, "1"),
    "save_steps": (0, -1, 2.5, NAN, "1", None),
    "logging_images_steps": (0, -1, 2.5, NAN, INF, True, "1"),
    "save_total_limit": (0, -1, 1.5, "1"),
    "save_strategy": (False, "never", None, 3),
    "dataloader_num_workers": (-1, 1.5, NAN, True, "2", None),
    "optim": ("adamw", False, 3, None),
    "lr_scheduler_type": ("steps", False, 3, None),
    "lr_scheduler_kwargs": ("linear", 3),
    "accelerator_config": (True, 1, "no such file", b"1"),
    "report_to": ("wandb_", 3, [3]),
    "fp16": ("yes", 1),
    "log_level": ("loud", 3, None),
    "output_dir": ("", 3, b"out"),
}
PAIRS = [(name, value) for name, values in BAD_VALUES.items() for value in values]


@pytest.mark.parametrize(("name", "value"), PAIRS, ids=[f"{name}={value!r}" for name, value in PAIRS])
def test_bad_values(tmp_path, name, value):
    with pytest.raises(ValueError) as caught:
        make(tmp_path, **{name: value})
    message = str(caught.value)
    assert f"`{name}`" in message and " must " in message
    assert repr(value) in message.split("got ", 1)[1]


def test_the_table_covers_every_checked_argument():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(MixGRPOConfig)} - inherited
    assert own == set(BAD_VALUES) & own


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sde_type": "cps", "eta": 1},
        {"sde_type": "dance", "eta": 3.0},
        {"prefix_ratio": 1, "suffix_ratio": 1e-3},
        {"height": np.int64(64), "epsilon": np.float32(0.1)},
        {"ode_solver": "unipc", "solver_order": 3},
        {"guidance_scale": 0},
        {"window_strategy": "linear_decay", "window_min_interval": 25},
        {"attention_backend": "_NATIVE_CUDNN"},
        {"ode_cache": {"name": "FirstBlockCacheConfig", "threshold": 0.1}},
        {"logging_images_steps": 8.0},
        dict.fromkeys(
            (*OPTIONAL_COUNTS, "logging_images_steps", "epsilon_high", "advantage_clip", "shift", "reward_timeout")
        ),
    ],
)
def test_values_at_the_limits(tmp_path, kwargs):
    config = make(tmp_path, **kwargs)
    assert {name: getattr(config, name) for name in kwargs} == kwargs


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"sde_type": "cps", "eta": 1.2}, r"`eta` must be in \[0.01, 1\] for `sde_type='cps'`, got 1.2"),
        ({"num_generations": 1}, "of 2 or more, since advantages compare the images of one prompt, got 1"),
        (
            {"num_generations": 5},
            r"`num_generations` must divide the images .* 3 \* 4 = 12, .* got 5. .* num_generations=12",
        ),
        ({"gradient_accumulation_steps": 3}, r"`gradient_accumulation_steps` must divide .* 4 \* 1 = 4, .* got 3"),
        ({"gradient_accumulation_steps": 8}, r"Use gradient_accumulation_steps=4 for one optimizer step"),
        ({"max_steps": 10}, "`max_steps` must be a multiple of 4, the optimizer steps .*, got 10. Use 8 or 12."),
        ({"max_steps": 3}, "multiple of 4, .* got 3. Use 4."),
        (
            {"window_size": 25},
            r"first 24 of num_inference_steps=25 .* window_size=25.*Choose window_size in \[1, 24\]",
        ),
        (
            {"window_size": 4, "window_start": 21, "window_strategy": "frozen"},
            r"got window_start=21 and window_size=4.*Choose window_size in \[1, 3\]",
        ),
        ({"window_start": 2}, "`window_start` must be 0 with window_strategy='progressive', .* got 2"),
        (
            {"window_strategy": "linear_decay", "window_min_interval": 30},
            "`window_min_interval` must be at most window_interval=25, got 30",
        ),
        ({"beta": 0.1, "replay_top_k": 2}, "`replay_top_k` .* KL term needs, got beta=0.1"),
        ({"beta": 0.1, "reuse_rollout_graph": True}, "`reuse_rollout_graph` .* KL term needs, got beta=0.1"),
        (
            {"accelerator_config": {"even_batch": True}},
            "`even_batch` must be a key of `accelerator_config`",
        ),
        ({"optim": "galore_adamw"}, "`optim` must be an installed optimizer .* got 'galore_adamw'"),
        ({"fp16": True}, "`fp16` must be False on a CPU"),
        ({"metric_for_best_model": "loss"}, "`metric_for_best_model` must be .* got 'loss'. Use 'reward'"),
        (
            {"metric_for_best_model": "eval_ema_rewards/redness/mean"},
            "`metric_for_best_model` must .* without `ema_decay`, .* Set `ema_decay`, or use 'rewards/redness/mean'",
        ),
        ({"dataloader_persistent_workers": True}, "`dataloader_persistent_workers` must .* dataloader_num_workers=0"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "`lr_scheduler_kwargs` must .*cycles"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": NAN}},
            "`lr_scheduler_kwargs` .* finite",
        ),
        ({"reuse_rollout_graph": True}, "got steps_per_generation=4 and num_iterations=1.*train_batch_size=12"),
        ({"attention_backend": "flesh"}, "`attention_backend` must be one of flash, .*sage.*, or None, got 'flesh'"),
        ({"torch_compile": True}, "use compile_repeated_blocks=True"),
        ({"ode_cache": {"name": "Taylor"}}, "with a 'name' among .*TaylorSeerCacheConfig.*, got .*For example"),
        (
            {"ode_cache": {"name": "FirstBlockCacheConfig", "treshold": 0.1}},
            "`ode_cache` must hold arguments of FirstBlockCacheConfig, got .*treshold",
        ),
    ],
)
def test_errors_say_what_to_change(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **kwargs)


ONE_UPDATE = {"steps_per_generation": 1, "per_device_train_batch_size": 12}


@pytest.mark.parametrize("name", ["merge_lora", "reuse_rollout_graph"])
@pytest.mark.parametrize(
    ("variable", "sharding"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_options_that_sharding_excludes(tmp_path, monkeypatch, name, variable, sharding):
    assert getattr(make(tmp_path, **{name: True}, **ONE_UPDATE), name)
    monkeypatch.setenv(variable, "true")
    if sharding == "DeepSpeed":  # its package need not be installed to find the conflict
        monkeypatch.setattr(accelerate.utils, "DeepSpeedPlugin", MagicMock())
    assert make(tmp_path, **ONE_UPDATE).sharding == sharding
    with pytest.raises(ValueError, match=f"`{name}` must be False with {sharding}, .* got True. Leave it"):
        make(tmp_path, **{name: True}, **ONE_UPDATE)


@pytest.mark.parametrize(
    ("variable", "sharding"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_no_moving_average_of_sharded_weights(tmp_path, monkeypatch, variable, sharding):
    assert make(tmp_path, ema_decay=0.5).ema_decay == 0.5
    monkeypatch.setenv(variable, "true")
    if sharding == "DeepSpeed":
        monkeypatch.setattr(accelerate.utils, "DeepSpeedPlugin", MagicMock())
    with pytest.raises(ValueError, match=f"`ema_decay` must be None with {sharding}, .* got 0.5. Leave it out, or"):
        make(tmp_path, ema_decay=0.5)


# ---- Bad values in the trainer: before anything large is loaded ----


class CountedReward:
    """A reward that counts its instances, for one that loads a model."""

    instances = 0

    def __init__(self) -> None:
        CountedReward.instances += 1

    def __call__(self, prompts, images, **columns):
        return [0.0] * len(images)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Fails a test that constructs a reward or touches the pipeline's files."""

    def touched(*args, **kwargs):
        raise AssertionError("the pipeline was touched")

    for function in ("load_config", "from_pretrained"):
        monkeypatch.setattr(DiffusionPipeline, function, touched)
    monkeypatch.setattr(CountedReward, "instances", 0)
    yield
    assert CountedReward.instances == 0


REWARD = f"{__name__}:CountedReward"


def train(config, model="owner/name", rewards=REWARD, **kwargs):
    kwargs = {"train_dataset": [{"prompt": "a cat"}]} | kwargs
    return MixGRPOTrainer(model, rewards, config, **kwargs)


@pytest.mark.parametrize(
    "name, value",
    [(name, values[0]) for name, values in BAD_VALUES.items()],
)
def test_a_script_fails_before_anything_is_loaded(tmp_path, nothing_is_loaded, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        train(make(tmp_path, **{name: value}))


@pytest.mark.parametrize("model", ["owner/name", "~/some/folder", Path("folder")])
def test_merge_lora_without_a_lora_is_refused_before_anything_is_loaded(tmp_path, nothing_is_loaded, model):
    config = make(tmp_path, merge_lora=True)
    with pytest.raises(ValueError, match="`merge_lora` must be False without a LoRA, got True. Pass a `peft_config`"):
        train(config, model)


@pytest.mark.parametrize(
    "config, kwargs, error, message",
    [
        ({}, {"train_dataset": []}, ValueError, "`train_dataset` must have at least one row"),
        ({}, {"train_dataset": [{"text": "a cat"}]}, ValueError, "`train_dataset` must have a column 'prompt'"),
        ({}, {"eval_dataset": {"a": iter([])}}, TypeError, r"`eval_dataset\['a'\]` must have a length"),
        ({"reward_weights": [1.0, 2.0]}, {}, ValueError, "`reward_weights` .* got 2 weights for 1 reward"),
        ({"reward_weights": [0.0]}, {}, ValueError, r"`reward_weights` must be finite and not all 0, got \[0.0\]"),
        (
            {"reward_init_kwargs": {"hpsv2": {}}},
            {},
            ValueError,
            "`reward_init_kwargs` must be for rewards .* got hpsv2",
        ),
        (
            {},
            {"eval_reward_funcs": ["hpsv2", REWARD]},
            ValueError,
            "`eval_reward_funcs` must have other names than `reward_funcs`, got .*:CountedReward in both",
        ),
        ({}, {"eval_reward_funcs": [3]}, TypeError, "`eval_reward_funcs` must be names or callables .* got 3"),
        ({}, {"rewards": []}, ValueError, "`reward_funcs` must have at least one reward, got an empty list. Pass a"),
        ({"eval_strategy": "steps"}, {}, ValueError, "`eval_strategy` must be 'no' without an `eval_dataset`, got"),
        ({"eval_on_start": True}, {}, ValueError, "`eval_on_start` must be False without an `eval_dataset`, got True"),
        ({}, {"model": torch.nn.Linear(1, 1)}, TypeError, r"`model` must be .* \(FluxPipeline, .*\), got Linear"),
    ],
)
def test_arguments_of_the_trainer_are_checked_before_anything_is_loaded(
    tmp_path, nothing_is_loaded, config, kwargs, error, message
):
    with pytest.raises(error, match=message):
        train(make(tmp_path, **config), **kwargs)


def test_a_source_that_cannot_be_used_is_found_before_the_rewards_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(CountedReward, "instances", 0)
    with pytest.raises(FileNotFoundError, match="`model` must be a folder or a Hub repository"):
        train(make(tmp_path), model="./no/such/folder")
    assert CountedReward.instances == 0


def test_the_reward_and_the_pipeline_would_have_been_loaded(tmp_path, pipeline_folder, monkeypatch):
    # The other half of the tests above: with good arguments both are reached.
    monkeypatch.setattr(CountedReward, "instances", 0)
    trainer = train(make(tmp_path, height=32, width=32), model=pipeline_folder)
    assert CountedReward.instances == 1 and trainer.pipe.transformer is trainer.model


# ---- Other ways to make a configuration ----


def test_all_steps_except_the_last(tmp_path):
    for size in (-1, "all"):
        config = make(tmp_path, window_size=size)
        assert config.window_schedule().schedule(7) == (0, 24)
    config = make(tmp_path, window_size=-1, window_start=5, window_strategy="frozen")
    assert config.window_schedule().schedule(7) == (5, 19)


def test_the_best_model_is_that_of_the_highest_reward(tmp_path):
    config = make(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4, save_steps=4)
    assert config.metric_for_best_model == "reward" and config.greater_is_better
    config = make(tmp_path, eval_strategy="steps", eval_steps=4)
    assert config.metric_for_best_model == "reward" and config.greater_is_better
    assert make(tmp_path).metric_for_best_model is None


def test_from_the_command_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("eta: 0.3\nreward_weights: [1.0, 0.5]\nmodel_init_kwargs:\n  revision: main\n")
    arguments = ["--config", str(file), "--output_dir", str(tmp_path), "--window_size", "3", "--use_cpu"]
    arguments += ["--shift", "3", "--no_shared_noise", "--window_strategy", "random", "--report_to", "none"]
    (config,) = TrlParser(MixGRPOConfig).parse_args_and_config(arguments)
    assert (config.eta, config.window_size, config.shift, config.shared_noise) == (0.3, 3, 3.0, False)
    assert config.reward_weights == [1.0, 0.5] and config.model_init_kwargs == {"revision": "main"}
    assert config.bf16 is False  # no GPU here


def test_every_argument_is_documented_and_has_help():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    text = inspect.getdoc(MixGRPOConfig)  # without the indentation, which Python 3.13 leaves out
    for field in dataclasses.fields(MixGRPOConfig):
        if field.name not in inherited:
            assert f"\n    {field.name} (" in text, field.name
            assert field.metadata["help"].count("%") == field.metadata["help"].count("%%") * 2


def test_quantization_is_json_on_the_command_line(tmp_path):
    settings = '{"quant_backend": "torchao", "components_to_quantize": ["transformer"]}'
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--quantization", settings]
    (config,) = TrlParser(MixGRPOConfig).parse_args_and_config([*arguments, "--attention_backend", "_native_cudnn"])
    assert config.quantization == json.loads(settings) and config.attention_backend == "_native_cudnn"


def test_the_recipes_of_the_documentation_are_configurations(tmp_path):
    documents = Path(__file__).parents[1] / "docs"
    text = (documents / "performance.md").read_text() + (documents / "recipes.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    cache, options, common, *recipes = blocks
    assert len(recipes) == 4 and "pretrained_model_name_or_path" in common
    names = {field.name for field in dataclasses.fields(MixGRPOConfig)}
    of_the_script = {"pretrained_model_name_or_path", "reward_funcs", "dataset_name", "lora_rank", "lora_alpha"}
    for recipe in [common | cache, common | options, *(common | recipe for recipe in recipes)]:
        assert set(recipe) <= names | of_the_script
        config = make(tmp_path, **{key: value for key, value in recipe.items() if key in names - {"output_dir"}})
        elements = config.height * config.width // 4
        assert 10 < config.epsilon * elements < 16  # nats


@pytest.mark.parametrize(
    ("name", "window", "trained", "nfe"),
    [
        ("mixgrpo", (0, 4), 4, 25),
        ("mixgrpo-flash", (0, 4), 4, 4 + 9),  # ceil(0.4 * 21) steps after the window
        ("mixgrpo-flash-star", (0, 4), 4, 4 + 5),
        ("flow-grpo", (0, 24), 24, 25),
        ("dancegrpo", (0, 24), 14, 25),
    ],
)
def test_presets(tmp_path, name, window, trained, nfe):
    config = MixGRPOConfig.from_preset(name, output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    assert config.window_schedule().schedule(0) == window
    assert int(config.window_train_fraction * window[1]) == trained
    assert config.optimizer_steps_per_iteration == 4 and config.max_steps == 300 * 4
    scheduler = MixedODESDEScheduler(shift=config.shift, **config.scheduler_arguments())
    scheduler.set_timesteps(config.num_inference_steps)
    assert len(scheduler.timesteps) == nfe


def test_the_windows_of_the_presets_move_as_published(tmp_path):
    def starts(name, **overrides):
        config = MixGRPOConfig.from_preset(name, output_dir=str(tmp_path), report_to="none", use_cpu=True, **overrides)
        return [config.window_schedule().schedule(iteration).start for iteration in range(60)]

    assert starts("mixgrpo") == [0] * 25 + [1] * 25 + [2] * 10
    assert starts("mixgrpo-flash") == [0] * 20 + [1] * 20 + [2] * 20
    assert set(starts("mixgrpo-flash-star")) == set(starts("dancegrpo")) == {0}
    assert starts("mixgrpo", window_interval=30)[29:31] == [0, 1]


def test_what_a_preset_leaves_to_pipelines_of_other_models(tmp_path):
    def left(changes=None, **overrides):
        config = MixGRPOConfig.from_preset("mixgrpo", output_dir=str(tmp_path), use_cpu=True, **overrides)
        for name, value in (changes or {}).items():
            setattr(config, name, value)
        other = config.for_other_models()
        same = {field.name for field in dataclasses.fields(config)} - {"height", "width", "shift", "guidance_scale"}
        assert all(getattr(other, name) == getattr(config, name) for name in same)
        return other.height, other.width, other.shift, other.guidance_scale

    assert left() == (None, None, None, None)
    assert left(shift=3.0, guidance_scale=3.5) == (None, None, 3.0, 3.5)  # as passed
    assert left(height=512, guidance_scale=7.0) == (512, None, None, 7.0)
    assert left({"shift": 2.0}) == (None, None, 2.0, None)
    plain = make(tmp_path, height=720, shift=3.0, guidance_scale=3.5).for_other_models()
    assert (plain.height, plain.shift, plain.guidance_scale) == (720, 3.0, 3.5)


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="`name` must be one of .*'mixgrpo-flash-star'.*got 'ppo'"):
        MixGRPOConfig.from_preset("ppo")


def test_an_unknown_argument_of_a_preset():
    with pytest.raises(ValueError, match="`window_sise` must be an argument of MixGRPOConfig.* mean `window_size`?"):
        MixGRPOConfig.from_preset("mixgrpo", window_sise=2)


def test_window_last_start(tmp_path):
    assert make(tmp_path).window_schedule().last_start == 20
    for given, last in ((0.5, 12), (0.99, 20), (0, 0), (7, 7), (20, 20)):
        assert make(tmp_path, window_last_start=given).window_schedule().last_start == last
    with pytest.raises(ValueError, match="`window_start` must be at most window_last_start=3, got 4"):
        make(tmp_path, window_strategy="frozen", window_start=4, window_last_start=3)
    make(tmp_path, window_size=-1, window_strategy="frozen", window_last_start=0.5)
