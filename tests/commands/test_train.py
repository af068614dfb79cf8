"""The training command as users run it, by its flags, and what it leaves and pushes."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from helpers import PROMPTS, make_trainer, redness
from hub_server import hub  # noqa: F401  # a fixture
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, RewardError, commands, toy
from diffusers_mixgrpo.commands import train
from diffusers_mixgrpo.commands.before_after import (
    FIRST,
    MOST_GAINED,
    MOST_LOST,
    RANDOM,
    choose_examples,
    draw_before_after,
    evaluate,
    sample_examples,
)
from diffusers_mixgrpo.commands.command_line import TOY_CONFIGURATION, read_yaml
from diffusers_mixgrpo.commands.summary import check_reload


COMMANDS = Path(commands.__file__).parent
SMALL = "--height 32 --width 32 --num_inference_steps 4 --window_size 2 --max_sequence_length 12 --num_generations 4"
SMALL += " --per_device_train_batch_size 4 --steps_per_generation 2 --max_steps 4 --logging_steps 1 --epsilon 1e-2"
SMALL += " --save_strategy no --report_to none --use_cpu --learning_rate 1e-3 --lora_rank 4"


@pytest.fixture
def main(monkeypatch):
    """The command in this process, which is faster than in a process of its own."""

    def main(folder: Path, flags: str) -> None:
        monkeypatch.chdir(folder)
        train.main(flags.split())

    return main


@pytest.fixture
def workplace(tmp_path):
    """A folder with a module of rewards and a file of prompts."""
    (tmp_path / "my_rewards.py").write_text(
        "import numpy as np\n"
        "def redness(prompts, images, **columns):\n"
        "    return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]\n"
        "def raises(prompts, images, **columns):\n"
        "    raise KeyError('no such model')\n"
        "def too_few(prompts, images, **columns):\n"
        "    return [1.0]\n"
    )
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n\na house\na cat\na tree\n")
    return tmp_path


def is_drawn(file: Path) -> bool:
    return bool(np.asarray(Image.open(file)).std() > 10)


def largest_difference(first: Image.Image, second: Image.Image) -> int:
    """Of pixel values, of 255."""
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


# ---- The command line ----


def test_the_window_of_the_demo_slides():
    settings = read_yaml(TOY_CONFIGURATION)
    fields = {name: value for name, value in settings.items() if name in MixGRPOConfig.__dataclass_fields__}
    config = MixGRPOConfig(**fields)
    schedule = config.window_schedule()
    iterations = config.max_steps // config.optimizer_steps_per_iteration
    assert {schedule.schedule(i).start for i in range(iterations)} == {0, 1, 2, 3, 4}
    assert iterations == schedule.sweep_length  # one sweep


def test_the_demo_at_a_small_size(tmp_path):
    """The one test in a process of its own."""
    output = tmp_path / "demo"
    flags = "--max_steps 8 --num_eval_prompts 16 --logging_images_steps 4 --per_device_train_batch_size 4"
    command = [sys.executable, "-m", "diffusers_mixgrpo", "train", *flags.split(), "--output_dir", str(output)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((output / "summary.json").read_text())
    for key in ("reward_before", "reward_after", "reward_before_se", "strict_before", "strict_after", "seconds"):
        assert summary[key] >= 0, key
    assert summary["optimizer_steps"] == 8 and summary["iterations"] == 2 and summary["eval_prompts"] == 16
    assert 0 < summary["nfe_rollout_computed"] <= summary["nfe_rollout"] == 10
    assert summary["configuration"]["training"]["num_generations"] == 8
    assert summary["reload_max_difference"] <= 8
    assert is_drawn(output / "reward_curve.png") and is_drawn(output / "before_after.png")
    assert len(list((output / "images").glob("*.png"))) == 3  # the last one is that of the trained weights
    assert "pytorch_lora_weights.safetensors" in os.listdir(output)
    for text in ("Held-out reward: ", "Images that match the prompt exactly: ", "Reload check: ", "before_after.png"):
        assert text in result.stdout


def test_a_lora_of_another_pipeline(main, workplace, pipeline_folder, capsys):
    flags = f"--pretrained_model_name_or_path {pipeline_folder} --reward_funcs my_rewards:redness"
    main(workplace, f"{flags} --dataset_name prompts.txt --num_eval_prompts 1 --output_dir out {SMALL}")
    summary = json.loads((workplace / "out" / "summary.json").read_text())
    assert summary["optimizer_steps"] == 4 and summary["eval_prompts"] == 1
    assert "reload_max_difference" not in summary and "strict_before" not in summary
    assert "Held-out reward: " in capsys.readouterr().out
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(str(workplace / "out"))
    assert pipe.get_active_adapters()
    assert "load_lora_weights" in (workplace / "out" / "README.md").read_text()


def test_all_results_are_pushed_in_one_commit(main, workplace, pipeline_folder, hub):  # noqa: F811
    flags = f"--pretrained_model_name_or_path {pipeline_folder} --reward_funcs my_rewards:redness --push_to_hub"
    main(workplace, f"{flags} --dataset_name prompts.txt --num_eval_prompts 1 --output_dir out {SMALL}")
    assert [message for message, _ in hub.commits] == ["End of training"]
    files = hub.files["someone/out"]
    names = ["README.md", "pytorch_lora_weights.safetensors", "run.json", "history.jsonl", "summary.json"]
    names += ["report.html", "reward_curve.png", "before_after.png"]
    for name in names:
        assert files[name] == (workplace / "out" / name).read_bytes(), name
    widget = ModelCard(files["README.md"].decode()).data.widget
    assert widget and all(Image.open(io.BytesIO(files[entry["output"]["url"]])).size == (32, 32) for entry in widget)


def test_rewards_for_evaluations_reach_the_trainer(main, workplace, pipeline_folder):
    flags = f"--pretrained_model_name_or_path {pipeline_folder} --reward_funcs my_rewards:redness {SMALL}"
    flags += " --dataset_name prompts.txt --eval_reward_funcs my_rewards:raises my_rewards:redness"
    with pytest.raises(
        ValueError, match="`eval_reward_funcs` must have other names .* got my_rewards:redness in both"
    ):
        main(workplace, flags)


def test_all_weights_and_a_configuration_file(main, workplace, pipeline_folder):
    """Without held-out prompts there is nothing to compare."""
    (workplace / "run.yaml").write_text(
        f"pretrained_model_name_or_path: {pipeline_folder}\nreward_funcs: [my_rewards:redness]\n"
        "dataset_name: prompts.txt\nnum_eval_prompts: 0\noutput_dir: out\n"
    )
    main(workplace, f"--config run.yaml {SMALL.replace('--lora_rank 4', '--lora_rank 0')}")
    assert (workplace / "out" / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert is_drawn(workplace / "out" / "reward_curve.png")
    assert not (workplace / "out" / "before_after.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--reward_funcs my_rewards:gone --dataset_name prompts.txt", "my_rewards:gone"),
        ("--reward_funcs my_rewards:raises --dataset_name prompts.txt --num_eval_prompts 0", "no such model"),
        ("--reward_funcs my_rewards:too_few --dataset_name prompts.txt --num_eval_prompts 0", "too_few"),
        ("--reward_funcs my_rewards:redness --dataset_name gone.txt", "`dataset_name` must be a file, got 'gone.txt'"),
        ("--reward_funcs my_rewards:redness --dataset_name prompts.txt --num_eval_prompts 4", "`num_eval_prompts`"),
        ("--reward_funcs my_rewards:redness --dataset_name prompts.txt --num_generations 3", "num_generations"),
        ("--reward_funcs my_rewards:redness --dataset_name prompts.txt --height 34 --num_eval_prompts 0", "`height`"),
        ("--reward_funcs my_rewards:redness --pretrained_model_name_or_path gone/at/all", "gone/at/all"),
    ],
)
def test_mistakes_are_named(main, workplace, pipeline_folder, flags, message):
    with pytest.raises((ValueError, FileNotFoundError, RewardError), match=message):
        main(workplace, f"--pretrained_model_name_or_path {pipeline_folder} --output_dir out {SMALL} {flags}")
    assert not (workplace / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "yaml", "message"),
    [
        ("--lora_rank -1", "", "`lora_rank` must be an integer of 0 or more, got -1"),
        ("", "lora_rank: 4.5", "`lora_rank` must be an integer of 0 or more, got 4.5"),
        ("--lora_alpha 0", "", "`lora_alpha` must be an integer of 1 or more, got 0"),
        ("--num_eval_prompts -3", "", "`num_eval_prompts` must be an integer of 0 or more, or None, got -3"),
        ("", "dry_run: 1", "`dry_run` must be True or False, got 1"),
        ("", "num_generation: 4", "`num_generation` must be an argument, got .* Did you mean `num_generations`?"),
        ("--num_generation 4", "", "`num_generation` must be an argument, got .* Did you mean `num_generations`?"),
        ("--num_gen=4", "", "`num_gen` must be an argument"),
        ("", "shared_noise: 2", "`shared_noise` must be True or False, got 2"),
        ("--config gone.yaml", None, "`config` must be a file, got 'gone.yaml'"),
        ("--config", None, "`config` must be a file, got ''"),
    ],
)
def test_arguments_that_cannot_work_are_named_before_anything_is_loaded(main, tmp_path, flags, yaml, message):
    if yaml is not None:
        (tmp_path / "run.yaml").write_text(f"{yaml}\nuse_cpu: true\n")
        flags += " --config run.yaml"
    with pytest.raises(ValueError, match=message):
        main(tmp_path, f"--pretrained_model_name_or_path gone {flags}")


def test_both_forms_of_a_flag(main, workplace, pipeline_folder, capsys):
    (workplace / "run.yaml").write_text("env: {MY_VARIABLE: '1'}\nnum_eval_prompts: 0\n")
    flags = "--reward_funcs my_rewards:redness --dataset_name prompts.txt --dry-run --no_shared_noise --eta=0.5"
    main(workplace, f"--config=run.yaml --pretrained_model_name_or_path={pipeline_folder} {SMALL} {flags}")
    assert "8 images of 2 prompts per device" in capsys.readouterr().out


def test_a_dry_run_reports_and_stops(main, workplace, pipeline_folder, capsys):
    flags = "--reward_funcs my_rewards:redness --dataset_name prompts.txt --num_eval_prompts 0 --dry_run"
    main(workplace, f"--pretrained_model_name_or_path {pipeline_folder} --output_dir out {SMALL} {flags}")
    output = capsys.readouterr().out
    assert "8 images of 2 prompts per device, 2 optimizer steps per iteration" in output
    assert "ratio" in output and "Memory" in output
    assert not (workplace / "out" / "pytorch_lora_weights.safetensors").exists()


def test_the_recipe_stays_short():
    assert len((COMMANDS / "train.py").read_text().splitlines()) < 160


def test_train_and_held_out_prompts_are_disjoint():
    assert not set(toy.prompts("train")) & set(toy.prompts("test"))


# ---- The images from before and after training ----


def test_chosen_prompts_follow_the_rule():
    before = [0.5] * 12
    after = [0.5, 0.9, 0.1, 0.6, 0.8, 0.3, math.nan, 0.4, 0.7, 0.5, 0.5, 0.5]
    groups = choose_examples(before, after)
    assert groups[MOST_GAINED] == [1, 4]
    assert groups[MOST_LOST] == [2, 5]
    assert len(groups[RANDOM]) == 4 and not set(groups[RANDOM]) & {1, 4, 2, 5}
    assert choose_examples(before, after) == groups


def test_only_a_gain_is_called_a_gain():
    """With few prompts, or without a loss, groups are smaller; every prompt can be drawn."""
    groups = choose_examples([0.1, 0.2, 0.3], [0.4, 0.2, math.nan])
    assert groups[MOST_GAINED] == [0] and groups[MOST_LOST] == []
    assert sorted(groups[RANDOM]) == [1, 2]
    assert choose_examples([], []) == {MOST_GAINED: [], MOST_LOST: [], RANDOM: []}


def train_visibly(trainer: MixGRPOTrainer) -> None:
    """Stands in for training: a large random change of the trained weights."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.engine.trained_parameters:
        parameter.data += torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("lora", [True, False])
def test_images_are_those_that_the_evaluation_scored(tmp_path, tiny_pipe, lora):
    prompts = [{"prompt": f"{row['prompt']} {noun}"} for noun in ("cat", "sea") for row in PROMPTS]
    trainer = make_trainer(tmp_path, pipe=tiny_pipe, lora=lora, eval_dataset=prompts, per_device_eval_batch_size=4)
    before = evaluate(trainer)
    images_before = trainer.sample_images([row["prompt"] for row in prompts])
    train_visibly(trainer)
    after = evaluate(trainer)
    examples = sample_examples(trainer, before, after)

    groups = choose_examples(before.scores, after.scores) if lora else {FIRST: list(range(8))}
    chosen = [(group, index) for group, indices in groups.items() for index in indices]
    assert [(example.group, example.index) for example in examples] == chosen and len(chosen) >= 6
    assert np.mean(before.scores) == pytest.approx(before.metrics["eval_reward"])
    changes = []
    for example in examples:
        assert example.prompt == prompts[example.index]["prompt"]
        assert largest_difference(example.before, images_before[example.index]) <= 1
        for image, score in ((example.before, example.score_before), (example.after, example.score_after)):
            assert redness([example.prompt], [image]) == pytest.approx([score], abs=1 / 255)
        changes.append(largest_difference(example.before, example.after))
    assert max(changes) > 10  # or the images from before could be those from after
    draw_before_after(examples, str(tmp_path))
    assert is_drawn(tmp_path / "before_after.png")


def test_another_lora_does_not_pass_the_reload_check(tmp_path):
    """The LoRA file holds other weights than the policy."""
    trainer = make_trainer(
        tmp_path,
        pipe=toy.load(),
        eval_dataset=[{"prompt": text} for text in toy.prompts("test", 2)],
        train_dataset=[{"prompt": text} for text in toy.prompts("train", 2)],
        rewards=toy.toy_reward,
        height=64,
        width=64,
    )
    evaluation = evaluate(trainer)
    trainer.save_model()
    examples = sample_examples(trainer, evaluation, evaluation)
    assert check_reload(trainer, toy.path(), examples) <= 8
    train_visibly(trainer)
    with pytest.raises(RuntimeError, match="must give the images of the trained policy"):
        check_reload(trainer, toy.path(), sample_examples(trainer, evaluation, evaluation))
