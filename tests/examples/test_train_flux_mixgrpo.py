"""The main job as users run it: by its command line, in a process of its own."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image

from diffusers_mixgrpo import RewardError, toy


SCRIPT = Path(__file__).parents[1] / "examples" / "train_flux_mixgrpo.py"
SMALL = "--height 32 --width 32 --num_inference_steps 4 --window_size 2 --max_sequence_length 12 --num_generations 4"
SMALL += " --per_device_train_batch_size 4 --steps_per_generation 2 --max_steps 4 --logging_steps 1 --epsilon 1e-2"
SMALL += " --save_strategy no --report_to none --use_cpu --learning_rate 1e-3 --lora_rank 4"


def run(folder: Path, flags: str) -> str:
    """The script in a process of its own; returns what it printed."""
    command = [sys.executable, str(SCRIPT), *flags.split()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture
def main(monkeypatch):
    """The script in this process, which is quicker: for its mistakes."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = importlib.import_module(SCRIPT.stem)

    def main(folder: Path, flags: str) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
        script.main()

    return main


@pytest.fixture
def workplace(tmp_path):
    """A folder with a reward of one's own and a file of prompts."""
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


def test_the_demo_in_small(tmp_path):
    output = tmp_path / "demo"
    fewer = "--max_steps 8 --num_eval_prompts 16 --logging_images_steps 4 --per_device_train_batch_size 4"
    said = run(tmp_path, f"{fewer} --output_dir {output}")
    summary = json.loads((output / "summary.json").read_text())
    for key in ("reward_before", "reward_after", "reward_before_se", "strict_before", "strict_after", "seconds"):
        assert summary[key] >= 0, key
    assert summary["optimizer_steps"] == 8 and summary["iterations"] == 2 and summary["eval_prompts"] == 16
    assert 0 < summary["nfe_rollout_computed"] <= summary["nfe_rollout"] == 10
    assert summary["configuration"]["training"]["num_generations"] == 8
    for name in ("reward_curve.png", "before_after.png"):
        assert np.asarray(Image.open(output / name)).std() > 10, name
    assert len(list((output / "images").glob("*.png"))) == 2
    assert "pytorch_lora_weights.safetensors" in os.listdir(output)
    assert "Held-out reward" in said and "drew the same pictures" in said and "before_after.png" in said


def test_ones_own_pipeline_reward_and_prompts(workplace, pipeline_folder):
    flags = f"--pretrained_model_name_or_path {pipeline_folder} --reward_funcs my_rewards:redness"
    run(workplace, f"{flags} --dataset_name prompts.txt --num_eval_prompts 1 --output_dir out {SMALL}")
    summary = json.loads((workplace / "out" / "summary.json").read_text())
    assert summary["optimizer_steps"] == 4 and summary["eval_prompts"] == 1
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(str(workplace / "out"))
    assert pipe.get_active_adapters()
    assert "load_lora_weights" in (workplace / "out" / "README.md").read_text()


def test_all_weights_and_a_configuration_file(workplace, pipeline_folder):
    (workplace / "run.yaml").write_text(
        f"pretrained_model_name_or_path: {pipeline_folder}\nreward_funcs: [my_rewards:redness]\n"
        "dataset_name: prompts.txt\nnum_eval_prompts: 0\noutput_dir: out\n"
    )
    run(workplace, f"--config run.yaml {SMALL.replace('--lora_rank 4', '--lora_rank 0')}")
    assert (workplace / "out" / "transformer" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--reward_funcs my_rewards:gone --dataset_name prompts.txt", "my_rewards:gone"),
        ("--reward_funcs my_rewards:raises --dataset_name prompts.txt --num_eval_prompts 0", "no such model"),
        ("--reward_funcs my_rewards:too_few --dataset_name prompts.txt --num_eval_prompts 0", "too_few"),
        ("--reward_funcs my_rewards:redness --dataset_name gone.txt", "gone.txt"),
        ("--reward_funcs my_rewards:redness --dataset_name prompts.txt --num_eval_prompts 4", "num_eval_prompts"),
        ("--reward_funcs my_rewards:redness --dataset_name prompts.txt --num_generations 3", "num_generations"),
        ("--reward_funcs my_rewards:redness --dataset_name prompts.txt --height 34 --num_eval_prompts 0", "`height`"),
    ],
)
def test_mistakes_are_named(main, workplace, pipeline_folder, flags, said):
    with pytest.raises((ValueError, FileNotFoundError, RewardError), match=said):
        main(workplace, f"--pretrained_model_name_or_path {pipeline_folder} --output_dir out {SMALL} {flags}")
    assert not (workplace / "out" / "summary.json").exists()


def test_a_dry_run_tells_and_stops(main, workplace, pipeline_folder, capsys):
    flags = "--reward_funcs my_rewards:redness --dataset_name prompts.txt --num_eval_prompts 0 --dry_run"
    main(workplace, f"--pretrained_model_name_or_path {pipeline_folder} --output_dir out {SMALL} {flags}")
    told = capsys.readouterr().out
    assert "8 images of 2 prompts per device, 2 optimizer steps per iteration" in told
    assert "ratio" in told and "Memory" in told
    assert not (workplace / "out" / "pytorch_lora_weights.safetensors").exists()


def test_a_missing_pipeline_is_named(main, workplace):
    flags = f"--reward_funcs my_rewards:redness --dataset_name prompts.txt --output_dir out {SMALL}"
    with pytest.raises(FileNotFoundError, match="gone/at/all"):
        main(workplace, f"--pretrained_model_name_or_path gone/at/all {flags}")


def test_the_recipe_stays_a_recipe():
    assert len(SCRIPT.read_text().splitlines()) < 150


def test_train_and_held_out_prompts_are_disjoint():
    assert not set(toy.prompts("train")) & set(toy.prompts("test"))
