"""The configuration: the paper's defaults, the batch arithmetic, and errors that say what to change."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from trl import TrlParser

from diffusers_mixgrpo import MixedODESDEScheduler, MixGRPOConfig


def make(tmp_path, **kwargs) -> MixGRPOConfig:
    return MixGRPOConfig(**{"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, **kwargs})


def test_the_defaults_are_the_papers(tmp_path):
    config = make(tmp_path)
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
    }
    assert {name: getattr(config, name) for name in published} == published
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


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_generations": 5}, r"3 \* 4 = 12 images per device, which is not a multiple of num_generations=5"),
        ({"num_generations": 1}, "`num_generations` must be 2 or more, got 1"),
        ({"gradient_accumulation_steps": 3}, r"4 training batches, .* multiple of gradient_accumulation_steps=3"),
        ({"gradient_accumulation_steps": 8}, r"Use gradient_accumulation_steps=4 for one optimizer step"),
        ({"max_steps": 10}, "`max_steps=10` ends inside an iteration, which has 4 optimizer steps here. Use 8 or 12,"),
        ({"max_steps": 3}, "Use 4, or another multiple of 4"),
        (
            {"window_size": 25},
            r"first 24 of num_inference_steps=25 .* window_size=25. Choose window_size from 1 to 24",
        ),
        ({"window_size": 0}, "window_size=0"),
        ({"window_size": 4, "window_start": 21, "window_strategy": "frozen"}, "Choose window_size from 1 to 3"),
        ({"window_start": -1, "window_strategy": "frozen"}, "window_start=-1"),
        ({"window_start": 2}, "`window_start=2` is the place of a window that stays there"),
        ({"window_strategy": "zigzag"}, "zigzag"),
        ({"window_interval": 0}, "window_interval"),
        ({"window_train_fraction": 0.0}, "`window_train_fraction` must be greater than 0 and at most 1, got 0.0"),
        ({"epsilon": 0.0}, "`epsilon` must be greater than 0, got 0.0"),
        ({"beta": -1.0}, "`beta` must be 0 or more, got -1.0"),
        ({"replay_batch_size": 0}, "`replay_batch_size` must be 1 or more, or None, got 0"),
        ({"sample_batch_size": -2}, "`sample_batch_size` must be 1 or more"),
        ({"scale_rewards": "prompt"}, "`scale_rewards` must be one of group, batch, none, got 'prompt'"),
        ({"multi_objective_aggregation": "max"}, "`multi_objective_aggregation` must be one of"),
        ({"max_reward_failure_rate": 1.5}, "`max_reward_failure_rate` must be from 0 to 1, got 1.5"),
        ({"auto_find_batch_size": True}, "`auto_find_batch_size=True` is not supported"),
        ({"remove_unused_columns": True}, "`remove_unused_columns=True` would take away 'prompt'"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be 1 or more"),
        ({"shift": 0.0}, "`shift` must be greater than 0"),
        ({"attention_backend": "flesh"}, "`attention_backend` must be one of flash, .*sage.*, or None, got 'flesh'"),
        ({"quantization": "nf4"}, "`quantization` must be a dict, .* got 'nf4'"),
        ({"torch_compile": True}, "`torch_compile=True` .* Use compile_repeated_blocks=True"),
    ],
)
def test_errors(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **kwargs)


def test_all_steps_but_the_last(tmp_path):
    for size in (-1, "all"):
        config = make(tmp_path, window_size=size)
        assert config.window_schedule().schedule(7) == (0, 24)
    config = make(tmp_path, window_size=-1, window_start=5, window_strategy="frozen")
    assert config.window_schedule().schedule(7) == (5, 19)


def test_the_best_model_is_that_of_the_highest_reward(tmp_path):
    config = make(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4, save_steps=4)
    assert config.metric_for_best_model == "reward" and config.greater_is_better


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
    for field in dataclasses.fields(MixGRPOConfig):
        if field.name not in inherited:
            assert f"        {field.name} (" in MixGRPOConfig.__doc__, field.name
            assert field.metadata["help"].count("%") == field.metadata["help"].count("%%") * 2


def test_quantization_is_json_on_the_command_line(tmp_path):
    settings = '{"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}}'
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", "--quantization", settings]
    (config,) = TrlParser(MixGRPOConfig).parse_args_and_config([*arguments, "--attention_backend", "_native_cudnn"])
    assert config.quantization == json.loads(settings) and config.attention_backend == "_native_cudnn"


def test_the_recipes_of_the_documentation_are_configurations(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    cache, options, common, *recipes = blocks
    assert len(recipes) == 4 and "pretrained_model_name_or_path" in common
    names = {field.name for field in dataclasses.fields(MixGRPOConfig)}
    of_the_script = {"pretrained_model_name_or_path", "reward_funcs", "dataset_name", "lora_rank", "lora_alpha"}
    for recipe in [cache, options, *(common | recipe for recipe in recipes)]:
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
    names = ("sde_type", "eta", "ode_solver", "solver_order", "prefix_ratio", "suffix_ratio", "shift")
    options = {name: getattr(config, name) for name in names}
    scheduler = MixedODESDEScheduler(window_start=window[0], window_size=window[1], **options)
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


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="'mixgrpo-flash-star'.*got 'ppo'"):
        MixGRPOConfig.from_preset("ppo")
