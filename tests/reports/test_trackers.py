"""
The real trackers: scalars, hyperparameters, and images with their prompts and scores arrive, and no secret does.

Trackers that are not installed are skipped; `pip install -e .[trackers]` installs those of an extra.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import PROMPTS, make_trainer
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from diffusers_mixgrpo.reports.trackers import ReadableConfig


SECRET = "SENTINEL"
STEPS = [0, 2, 4]  # of the grids


@pytest.fixture
def train(tmp_path, tiny_pipe, monkeypatch):
    """A run with an evaluation before it, which logs to a tracker and writes into `tmp_path` only."""
    monkeypatch.chdir(tmp_path)

    def train(tracker: str, **changes):
        settings = {
            "report_to": tracker,
            "logging_images_steps": 0.5,
            "num_logged_prompts": 2,
            "hub_token": f"{SECRET}-hub",
            "model_init_kwargs": {"token": f"{SECRET}-model"},
        }
        trainer = make_trainer(tmp_path / "output", tiny_pipe, eval_dataset=PROMPTS[1:], **(settings | changes))
        trainer.evaluate()
        trainer.train()
        return trainer

    yield train
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def is_the_grid(image, step, folder):
    """Whether an image is the grid of a step that the run has saved."""
    with Image.open(folder / "output" / "images" / f"step_{step:06d}.png") as saved:
        return np.array_equal(np.asarray(saved), np.asarray(image.convert("RGB")))


def test_tensorboard(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("tensorboard")
    assert not (tmp_path / "runs").exists()  # where the evaluation before training would open its writer
    (folder,) = (tmp_path / "output" / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 3]
    assert [event.step for event in events.Scalars("eval/reward")] == [0]
    texts = {name: events.Tensors(f"{name}/text_summary") for name in ("args", "model_config", "samples")}
    arguments, config = (json.loads(texts[name][0].tensor_proto.string_val[0]) for name in ("args", "model_config"))
    assert arguments["learning_rate"] == 1e-3 and config["attention_head_dim"] == 16
    assert [event.step for event in texts["samples"]] == STEPS
    table = texts["samples"][0].tensor_proto.string_val[0].decode()
    assert "two dogs" in table and "redness" in table
    images = events.Images("samples")
    assert [event.step for event in images] == STEPS
    for event in images:
        (tmp_path / "grid.png").write_bytes(event.encoded_image_string)
        assert is_the_grid(Image.open(tmp_path / "grid.png"), event.step, tmp_path)


def test_mlflow(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    train("mlflow")
    run = mlflow.last_active_run()
    assert run.data.params["learning_rate"] == "0.001" and run.data.params["attention_head_dim"] == "16"
    assert {"reward", "eval_reward", "loss"} <= run.data.metrics.keys()
    (folder,) = tmp_path.glob("mlruns/*/*/artifacts")
    images = sorted(folder.glob("images/samples+step+*.png"))
    assert [int(path.name.split("+")[2]) for path in images] == STEPS
    assert all(is_the_grid(Image.open(path), step, tmp_path) for path, step in zip(images, STEPS, strict=True))
    assert "two dogs" in (folder / "samples" / "step_000002.md").read_text()


def test_wandb(train, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    # All of `WANDB_LOG_MODEL` asks for the model's configuration, too.
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    train("wandb", save_strategy="steps", save_steps=4)
    try:
        run = wandb.run
        assert run.config["learning_rate"] == 1e-3 and run.config["attention_head_dim"] == 16
        assert run.config["peft_config"]["default"]["r"] == 4
        summary = run.summary
        assert summary["eval/reward"] < 0 and summary["train/global_step"] == 4
        assert len(summary["samples/images"]["filenames"]) == 4
        captions = summary["samples/images"]["captions"]
        assert captions[0].startswith("two dogs (seed 0): redness -0.") and len(set(captions)) == 4
        media = Path(run.dir, "media", "images", "samples")
        assert len(list(media.glob("images_*.png"))) == 4 * len(STEPS)
        grids = {json.dumps(np.asarray(Image.open(path)).shape) for path in media.glob("grid_*.png")}
        assert len(list(media.glob("grid_*.png"))) == len(STEPS) and len(grids) == 1
        assert is_the_grid(Image.open(Path(run.dir, summary["samples/grid"]["path"])), 4, tmp_path)
    finally:
        wandb.finish()


def test_trackio(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    train("trackio", project="images", run_name="one").evaluate()  # which opens the run again
    trackio.finish()
    (run,) = SQLiteStorage.get_runs("images")
    config = SQLiteStorage.get_run_config("images", run)
    assert config["learning_rate"] == 1e-3 and config["attention_head_dim"] == 16
    logs = SQLiteStorage.get_logs("images", run)
    assert [log["train/global_step"] for log in logs if "train/reward" in log] == [1, 3]
    samples = [log for log in logs if "samples/grid" in log]
    assert [log["train/global_step"] for log in samples] == STEPS
    assert len([log for log in logs if "eval/reward" in log]) == 2
    for log in samples:
        path = tmp_path / "trackio" / "media" / log["samples/grid"]["file_path"]
        assert is_the_grid(Image.open(path), log["train/global_step"], tmp_path)
        rows = log["samples/table"]["_value"]
        assert [row["prompt"] for row in rows] == ["two dogs", "two dogs", "sea", "sea"]
        assert all(float(row["redness"]) < 0 for row in rows)


# The others change modules when they are imported, so each has a process of its own.
OTHERS = {
    "swanlab": {"SWANLAB_MODE": "offline"},
    "dvclive": {"DVC_NO_ANALYTICS": "1"},
    "clearml": {"CLEARML_OFFLINE_MODE": "1"},
    "comet_ml": {"COMET_API_KEY": "none", "COMET_START_ONLINE": "0", "COMET_MODE": "create"},
}
SCRIPT = """
import sys
from helpers import PROMPTS, make_trainer

token = open("token").read()  # trackers save the command line and the script
trainer = make_trainer(
    "output",
    report_to=sys.argv[1],
    eval_dataset=PROMPTS[1:],
    logging_images_steps=0.5,
    hub_token=token,
    model_init_kwargs={"token": token},
)
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tracker", OTHERS)
def test_other_trackers(tmp_path, tracker):
    pytest.importorskip(tracker)
    folders = {
        "SWANLAB_LOG_DIR": tmp_path / "swanlab",
        "CLEARML_CACHE_DIR": tmp_path / "clearml",
        "COMET_OFFLINE_DIRECTORY": tmp_path,
        "HOME": tmp_path,
    }
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {name: str(path) for name, path in folders.items()} | OTHERS[tracker]
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    (tmp_path / "token").write_text(f"{SECRET}-token")
    command = [sys.executable, "script.py", tracker]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "could not log images" not in result.stderr
    for path in tmp_path.rglob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(f"{path}.files")
    (tmp_path / "token").unlink()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    own = {path: content for path, content in files.items() if tmp_path / "output" not in path.parents}
    pictures = [path for path, content in own.items() if content[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")]
    assert len(pictures) >= len(STEPS)
    for word in ("reward_std", "learning_rate"):
        assert any(word.encode() in content or word in str(path) for path, content in own.items()), word
    assert not [path for path, content in files.items() if SECRET.encode() in content]


def test_a_tracker_that_fails_costs_a_warning_and_not_the_run(make, tmp_path, caplog):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    class WithoutNetwork(SummaryWriter):
        def add_image(self, *args, **kwargs):
            raise ConnectionError("no route to host")

    trainer = make(logging_images_steps=4, callbacks=[TensorBoardCallback(WithoutNetwork(tmp_path / "events"))])
    trainer.train()
    assert trainer.state.global_step == 4
    assert "Step 0: TensorBoardCallback could not log images: ConnectionError('no route to host')" in caplog.text


def test_callbacks_that_are_no_trackers_get_nothing(make):
    make(logging_images_steps=4, callbacks=[TrainerCallback()]).train()


def test_the_models_configuration_keeps_its_content(make, tiny_pipe, tmp_path):
    before = dict(tiny_pipe.transformer.config)
    make()
    config = tiny_pipe.transformer.config
    assert isinstance(config, ReadableConfig) and config.to_dict() == dict(config) == before
    assert json.loads(config.to_json_string()) == json.loads(json.dumps(before))
    tiny_pipe.transformer.save_config(tmp_path / "saved")
    assert tiny_pipe.transformer.from_config(tmp_path / "saved").config["num_layers"] == 1
