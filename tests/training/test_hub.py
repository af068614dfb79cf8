"""Pushes with the real client to a small Hub on loopback: what arrives, and what lies on the disk when they fail."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from helpers import PROMPTS, make_trainer
from hub_server import READ, WRITE, hub  # noqa: F401  # a fixture
from peft import LoraConfig

from diffusers_mixgrpo import MixGRPOTrainer


NAME = "someone/output"


def kept(folder: Path) -> dict[str, bytes]:
    """What a push has: all but checkpoints and unfinished files."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(folder)): path for path in paths}
    return {n: p.read_bytes() for n, p in names.items() if not n.startswith(("_", "checkpoint-")) and ".part" not in n}


def images_of(pipe: FluxPipeline, trainer: MixGRPOTrainer) -> list[np.ndarray]:
    """The stock pipeline's images of the prompts, with the seeds of evaluations."""
    images = []
    for i, row in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(trainer.args.eval_seed + i)
        image = pipe(row["prompt"], **trainer.engine.policy.call_arguments, generator=generator).images[0]
        images.append(np.asarray(image, dtype=int))
    return images


def test_a_push_arrives_byte_for_byte_and_a_stock_pipeline_loads_it(tmp_path, hub, pipeline_folder):  # noqa: F811
    lora = LoraConfig(r=4, lora_alpha=64, init_lora_weights=False)  # it changes images from the start
    trainer = make_trainer(tmp_path / "output", lora=lora, max_steps=2, push_to_hub=True, hub_token=WRITE)
    assert trainer.hub_model_id == NAME and hub.files[NAME] == {}
    trainer.train()
    images = tmp_path / "output" / "images"
    images.mkdir(exist_ok=True)
    (images / "step_000002.png").write_bytes(b"a grid")
    (images / "step_000004.png.part").write_bytes(b"half")
    trainer.push_to_hub()
    assert hub.files[NAME] == kept(tmp_path / "output")
    assert {"README.md", "pytorch_lora_weights.safetensors", "images/step_000002.png"} <= hub.files[NAME].keys()
    assert len(hub.commits) == 1 and hub.commits[0][0] == "End of training"
    assert not any(WRITE.encode() in data for data in hub.files[NAME].values())
    assert 'load_lora_weights("someone/output"' in hub.files[NAME]["README.md"].decode()
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    plain = images_of(pipe, trainer)
    pipe.load_lora_weights(NAME, weight_name="pytorch_lora_weights.safetensors")
    loaded = images_of(pipe, trainer)
    trained = [np.asarray(image, dtype=int) for image in trainer.sample_images([p["prompt"] for p in PROMPTS])]
    # The trainer's VAE has another memory format, whose convolutions round otherwise: at most by a step of 255.
    assert max(np.abs(a - b).max() for a, b in zip(loaded, trained, strict=True)) <= 1
    assert max(np.abs(a - b).max() for a, b in zip(plain, trained, strict=True)) > 20


@pytest.mark.parametrize(
    "part, fault", [("/create", 500), ("/create", 401), ("/preupload", 403), ("/commit", 500), ("/lfs/", "drop")]
)
def test_a_push_that_fails_loses_nothing(tmp_path, hub, part, fault):  # noqa: F811
    trainer = make_trainer(tmp_path / "output", max_steps=2)
    trainer.train()
    hub.faults[part] = fault
    with pytest.raises(
        RuntimeError, match="The results could not be pushed to .*output: .*They are all saved in"
    ) as caught:
        trainer.push_to_hub()
    files = kept(tmp_path / "output")
    assert {"README.md", "pytorch_lora_weights.safetensors", "training_args.bin"} <= files.keys()
    assert hub.commits == []
    hub.faults.clear()
    command = shlex.split(str(caught.value).splitlines()[-1])
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITE, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command[0] = str(Path(sys.executable).with_name("hf"))
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.files[NAME] == files


@pytest.mark.parametrize("token, name", [("hf_wrong", None), (READ, None), (WRITE, "another/red"), (WRITE, "a/b/c")])
def test_what_the_hub_refuses_is_refused_before_anything_is_loaded(tmp_path, hub, token, name):  # noqa: F811
    with pytest.raises(ValueError, match="`hub_model_id` must be a "):
        make_trainer(tmp_path / "output", pipe="nowhere/nothing", push_to_hub=True, hub_token=token, hub_model_id=name)


@pytest.mark.parametrize("fault", [500, "drop"])
def test_a_hub_that_cannot_be_reached_does_not_prevent_training(tmp_path, hub, caplog, fault):  # noqa: F811
    hub.faults["/api/"] = fault
    changes = {"push_to_hub": True, "hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path / "output", **changes)
    trainer.train()
    assert "The Hub cannot be reached" in caplog.text and "could not be pushed" in caplog.text
    assert trainer.state.global_step == 4 and (tmp_path / "output" / "checkpoint-4").is_dir()
    hub.faults.clear()
    trainer.push_to_hub()
    assert hub.files[NAME] == kept(tmp_path / "output")


def test_an_old_average_is_removed_and_other_weights_stay(tmp_path, hub):  # noqa: F811
    make_trainer(tmp_path / "output", ema_decay=0.9).save_model()
    (tmp_path / "output" / "transformer").mkdir()
    (tmp_path / "output" / "transformer" / "config.json").write_text("{}")
    trainer = make_trainer(tmp_path / "output", lora=LoraConfig(r=2))
    trainer.push_to_hub()
    assert not (tmp_path / "output" / "ema").exists()
    assert (tmp_path / "output" / "transformer" / "config.json").exists()
    assert not any(name.startswith(("ema", "transformer")) for name in hub.files[NAME])
