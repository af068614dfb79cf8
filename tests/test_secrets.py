"""Secrets are written nowhere."""

import copy
import logging
import pickle
import sys
from pathlib import Path

import torch
from helpers import make_trainer, small_config
from hub_server import hub  # noqa: F401  # a fixture

from diffusers_mixgrpo import MixGRPOConfig
from diffusers_mixgrpo.commands.summary import write_summary


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


def test_secrets_are_written_nowhere(tmp_path, pipeline_folder, hub, monkeypatch, caplog, capfd):  # noqa: F811
    """Neither into files, pushed ones included, nor into logs; but they reach what they are for."""
    secret = f"{SECRET}-hub"
    monkeypatch.setattr("hub_server.WRITE", secret)
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
    summary = write_summary(trainer, script, {}, {}, seconds=1.0)
    print(trainer.args, repr(trainer.args), summary, trainer.state.log_history)
    assert_no_secret(tmp_path / "output")
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err + caplog.text
    assert len(hub.commits) >= 2 and {t for _, path, t in hub.requests if "/commit/" in path} == {secret}
    assert not any(SECRET.encode() in data for data in hub.files["someone/output"].values())
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
