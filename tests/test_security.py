"""Secrets are written nowhere, and files that are loaded run no code."""

import copy
import logging
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from helpers import PROMPTS, assert_same, make_trainer, redness, small_config, trained

from diffusers_mixgrpo import MixGRPOConfig


sys.path.append(str(Path(__file__).parents[1] / "examples"))

import report  # noqa: E402


SECRET = "SENTINEL"
CONSTANT = (
    "class Constant:\n"
    "    def __init__(self, api_key, nested):\n        self.key = api_key\n"
    "    def __call__(self, prompts, images, **columns):\n        return [float(i) for i in range(len(images))]\n"
)


def secret_arguments(reward="mine:Constant"):
    """Arguments with a secret in each place that may hold one."""
    return {
        "hub_token": f"{SECRET}-hub",
        "model_init_kwargs": {"token": f"{SECRET}-model", "proxies": {"http": f"http://a:{SECRET}@b"}},
        "reward_init_kwargs": {reward: {"api_key": f"{SECRET}-key", "nested": [{"headers": {"X-A": SECRET}}]}},
    }


def test_secrets_are_written_nowhere(tmp_path, pipeline_folder, monkeypatch, caplog, capfd):
    """Neither into files, pushed ones included, nor into logs; but they reach what they are for."""
    uploads = []

    class Hub:
        def create_repo(self, name, token=None, **kwargs):
            return type("Url", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, repo_id, folder_path, token=None, **kwargs):
            uploads.append(token)
            assert_no_secret(folder_path)

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr("transformers.trainer.PushInProgress.is_done", lambda self: True)
    caplog.set_level(logging.DEBUG)
    (tmp_path / "mine.py").write_text(CONSTANT)
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(
        tmp_path / "output",
        pipe=pipeline_folder,
        rewards=["mine:Constant"],
        push_to_hub=True,
        hub_strategy="every_save",
        save_strategy="steps",
        save_steps=2,
        report_to="tensorboard" if "tensorboard" in sys.modules else "none",
        **secret_arguments(),
    )
    assert trainer.reward_funcs[0].key == f"{SECRET}-key" and trainer.args.model_init_kwargs["token"] is not None
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    trainer.push_to_hub()
    script = type("Script", (), {})()
    script.api_key = f"{SECRET}-script"
    summary = report.write_summary(trainer, script, {}, {}, seconds=1.0)
    print(trainer.args, repr(trainer.args), summary, trainer.state.log_history)
    assert_no_secret(tmp_path / "output")
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err + caplog.text
    assert len(uploads) >= 3 and set(uploads) == {f"{SECRET}-hub"}
    for name in ("", "checkpoint-2"):
        saved = torch.load(tmp_path / "output" / name / "training_args.bin", weights_only=False)
        assert isinstance(saved, MixGRPOConfig) and saved.hub_token is None and saved.max_steps == 4


def assert_no_secret(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert len(files) > 2 and [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_copies_keep_secrets_and_pickles_do_not(tmp_path):
    settings = small_config(tmp_path, **secret_arguments())
    for same in (copy.copy(settings), copy.deepcopy(settings)):
        assert same.hub_token == f"{SECRET}-hub" and same.model_init_kwargs == settings.model_init_kwargs
    pickled = pickle.loads(pickle.dumps(settings))
    assert pickled.model_init_kwargs == {"token": None, "proxies": {"http": None}} and pickled.hub_token is None
    assert pickled.learning_rate == settings.learning_rate and pickled.max_steps == settings.max_steps
    assert SECRET not in settings.to_json_string() + str(settings.to_sanitized_dict()) + repr(settings)
    assert settings.model_init_kwargs["token"] == f"{SECRET}-model"


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_runs_no_code(tmp_path, make, lora):
    trainer = make(lora=lora, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "output" / "checkpoint-2"
    weights = checkpoint if lora else checkpoint / "transformer"
    (name,) = [path.name for path in weights.glob("*.safetensors")]
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.is_dir()  # so that this test can fail
    marker.rmdir()
    for file in [*(checkpoint / name for name in FILES), weights / name.replace("safetensors", "bin"), weights / name]:
        original = file.read_bytes() if file.exists() else None
        if file.suffix == ".bin" and original is None:
            (weights / name).rename(weights / "aside")  # or the other file would not be looked at
        torch.save({"a": Malicious(marker)}, file)
        with pytest.raises(Exception) if file.name != "training_args.bin" else _nothing():
            make_trainer(tmp_path / "output", lora=lora, max_steps=4).train(resume_from_checkpoint=str(checkpoint))
        assert not marker.exists(), file
        if (weights / "aside").exists():
            (weights / "aside").rename(weights / name)
            file.unlink()
        else:
            file.write_bytes(original)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


# ---- Interruptions and several runs ----


@pytest.mark.parametrize("at", [2, 3])
def test_interrupted_and_trained_again(make, tmp_path, at, caplog):
    """Before its first update the trainer is as new; afterwards it says what it goes on with."""
    calls = []

    def interrupt(prompts, images, **columns):
        calls.append(len(images))
        if len(calls) == at:
            raise KeyboardInterrupt
        return redness(prompts, images)

    trainer = make_trainer(tmp_path / "a", rewards=interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    caplog.clear()
    trainer.train()
    assert trainer.state.global_step == 4
    straight = make_trainer(tmp_path / "b")
    straight.train()
    warned = "has trained for 2 steps already" in caplog.text
    assert warned == (at == 3)
    if at == 2:
        assert_same(trained(trainer), trained(straight))


def test_two_trainers_on_two_pipelines(tmp_path):
    """Made at once and run one after the other, they do what each does alone."""
    changes = {
        "per_device_train_batch_size": 2,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "seed": 3,
    }
    alone = make_trainer(tmp_path / "a")
    alone.train()
    alone_too = make_trainer(tmp_path / "b", **changes)
    alone_too.train()
    first = make_trainer(tmp_path / "c")
    second = make_trainer(tmp_path / "d", **changes)
    first.train()
    second.train()
    assert_same(trained(first), trained(alone))
    assert_same(trained(second), trained(alone_too))


def test_two_trainers_on_one_pipeline(make):
    first = make(lora=False)
    second = make()
    with pytest.raises(ValueError, match=r"must have the active LoRAs \[\] .* got \['default'\]"):
        first.train()
    second.train()
    assert second.state.global_step == 4


def test_a_full_disk_costs_a_grid_and_not_the_run(make, tmp_path, caplog):
    images = tmp_path / "output" / "images"
    images.mkdir(parents=True)
    (images / "step_000000.png").symlink_to("/dev/full")
    trainer = make(logging_images_steps=2, train_dataset=PROMPTS)
    trainer.train()
    assert trainer.state.global_step == 4 and "step_000000.png could not be written" in caplog.text
    assert (images / "step_000002.png").exists()


# ---- Pipelines ----


@pytest.mark.parametrize(
    "part", ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler"]
)
def test_a_pipeline_without_a_part(make, tiny_pipe, part):
    setattr(tiny_pipe, part, None)
    with pytest.raises(ValueError, match=f"`model` must be a pipeline with all of its parts, got None as its {part}"):
        make()


@pytest.mark.parametrize("kind", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload(make, tiny_pipe, kind):
    getattr(tiny_pipe, kind)(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"without CPU offload.*Call `pipe.remove_all_hooks\(\)` first"):
        make()
    tiny_pipe.remove_all_hooks()
    trainer = make(max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_group_offload(make, tiny_pipe):
    tiny_pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="without CPU offload, got group offloading.*Load the pipeline again"):
        make()
