"""A short script, and the demo, print no warning that can be avoided."""

import subprocess
import sys

import pytest


SCRIPT = """
from datasets import Dataset
from peft import LoraConfig
from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, toy

args = MixGRPOConfig(
    "out", height=64, width=64, max_sequence_length=12, num_inference_steps=4, window_size=2, num_generations=4,
    per_device_train_batch_size=4, steps_per_generation=2, max_steps=2, report_to="none"
)
data = Dataset.from_dict({"prompt": toy.prompts("train", 8)})
trainer = MixGRPOTrainer(toy.path(), toy.toy_reward, args, train_dataset=data, peft_config=LoraConfig(r=4))
trainer.train()
"""
DEMO = "train --max_steps 4 --num_eval_prompts 2 --per_device_train_batch_size 8 --steps_per_generation 2"
# transformers says so when diffusers imports these classes, unless torchvision is installed.
UNAVOIDABLE = ("`CLIPImageProcessor` requires torchvision", "`SiglipImageProcessor` requires torchvision")


@pytest.mark.parametrize(
    "command", [["-c", SCRIPT], pytest.param(["-m", "diffusers_mixgrpo", *DEMO.split()], marks=pytest.mark.slow)]
)
def test_nothing_but_progress_bars_is_printed(tmp_path, command):
    command = [sys.executable, "-W", "default", *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    lines = [line.strip() for line in done.stderr.replace("\r", "\n").replace("\x1b[A", "").splitlines()]
    assert done.returncode == 0, done.stderr
    bars = [line for line in lines if "%|" in line]
    others = [line for line in lines if line and line not in bars and not any(text in line for text in UNAVOIDABLE)]
    assert others == []
    assert any(bar.startswith("Loading pipeline components") for bar in bars)
    assert not any("Loading weights" in bar for bar in bars)  # a bar within a bar
