"""What a run writes in its folder, while it trains and when it is resumed."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import PROMPTS, assert_same, logged, make_trainer, trained
from PIL import Image
from transformers import TrainerCallback

from diffusers_mixgrpo.reports.run_folder import RunFolder


def test_of_a_local_base_only_the_name_is_written(tmp_path, pipeline_folder):
    folder = tmp_path / "output"
    make_trainer(folder, pipe=pipeline_folder, max_steps=2).train()
    text = (folder / "run.json").read_text()
    assert strict(text)["base_model"] == Path(pipeline_folder).name and str(pipeline_folder) not in text


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def strict(text):
    """JSON as other languages read it: without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def files(folder):
    return sorted(path.name for path in (folder / "images").iterdir())


def halves(prompts, images, **columns):
    """A second reward, which cannot score every other image."""
    return [None if i % 2 else 0.5 for i in range(len(images))]


def test_the_files_of_a_run(make, tmp_path):
    folder = tmp_path / "output"
    trainer = make(
        logging_images_steps=2,
        num_logged_prompts=3,
        eval_dataset=PROMPTS,
        reward_weights=[1.0],
        eval_reward_funcs=[halves],
        hub_token="SENTINEL",
    )
    before = trainer.evaluate()
    assert not folder.exists() or not (folder / "history.jsonl").exists()
    trainer.train()

    entries = history(folder)
    assert {name: entries[0][name] for name in before} == before and entries[0]["step"] == 0
    assert entries[1:] == json.loads(json.dumps(trainer.state.log_history))
    after = trainer.evaluate()
    assert history(folder)[-1]["eval_reward"] == after["eval_reward"]

    run = strict((folder / "run.json").read_text())
    assert run["pipeline"] == "FluxPipeline" and run["family"] == "flux" and run["base_model"] is None
    assert run["reward_names"] == ["redness"] and run["reward_weights"] == [1.0]
    assert run["eval_reward_names"] == ["halves"] and run["is_lora"] and run["lora_rank"] == 4
    assert run["settings"]["num_generations"] == 4
    assert not [path for path in folder.rglob("*") if path.is_file() and b"SENTINEL" in path.read_bytes()]
    assert run["num_processes"] == 1 and run["started"].endswith("+00:00")
    assert run["versions"]["torch"] == torch.__version__

    names = [f"step_{step:06d}" for step in (0, 2, 4)]
    assert files(folder) == sorted(name + end for name in names for end in ("", ".json", ".png"))
    for name in names:
        record = strict((folder / "images" / f"{name}.json").read_text())
        assert record["step"] == int(name[-6:])
        assert [(s["prompt"], s["seed"]) for s in record["samples"]] == [
            (PROMPTS[i]["prompt"], i + 5 * j) for i in range(3) for j in range(2)
        ]
        assert all(sample["rewards"].keys() == {"redness", "halves"} for sample in record["samples"])
        assert all(sample["reward"] == sample["rewards"]["redness"] for sample in record["samples"])
        shown = [path["file"] for path in record["samples"]]
        for group in record["groups"]:
            shown += [image["file"] for image in group["images"]]
        assert sorted(shown) == sorted(f"{name}/{path.name}" for path in (folder / "images" / name).iterdir())
        for file in shown:
            with Image.open(folder / "images" / file) as image:
                assert image.format == "WEBP" and image.size == (32, 32)
        with Image.open(folder / "images" / f"{name}.png") as grid:
            assert grid.format == "PNG" and min(grid.size) > 400


def test_not_scored_is_null(make, tmp_path):
    make(logging_images_steps=4, rewards=[halves], max_reward_failure_rate=1.0).train()
    record = strict((tmp_path / "output" / "images" / "step_000000.json").read_text())
    assert [sample["reward"] for sample in record["samples"]] == [0.5, None] * 4
    assert [sample["rewards"] for sample in record["samples"][:2]] == [{"halves": 0.5}, {"halves": None}]


def test_numbers_that_json_does_not_have_are_null(make, tmp_path):
    trainer = make()
    trainer.train()
    trainer.log({"good": 1.5, "bad": math.nan, "worse": -math.inf})
    entry = strict((tmp_path / "output" / "history.jsonl").read_text().splitlines()[-1])
    assert entry == {"good": 1.5, "bad": None, "worse": None, "epoch": 1.0, "step": 4}


class Stop(TrainerCallback):
    """Stops after some steps, as a user would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [2, 3])  # at the end of an iteration, and inside of one
def test_a_resumed_run_continues_the_files(make, tmp_path, step):
    settings = {"max_steps": 6, "logging_images_steps": 2, "num_logged_prompts": 1, "num_logged_seeds": 1}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    expected = history(tmp_path / "whole")
    folder = tmp_path / "output"
    stopped = make(pipe=None, callbacks=[Stop(step)], **settings)
    stopped.evaluate(PROMPTS[:2])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    # A newer part of the run, which was written after the checkpoint, and a line that was cut
    with open(folder / "history.jsonl", "a") as file:
        file.write('{"reward": 1.0, "step": 5}\n{"reward": 0.')
    (folder / "images" / "step_000005.png").write_text("later")
    (folder / "images" / "mine.png").write_text("mine")
    resumed = make(pipe=None, **settings)
    resumed.train(resume_from_checkpoint=True)

    entries = history(folder)
    assert "eval_reward" in entries[0] and entries[0]["step"] == 0  # the evaluation before training stays
    assert [entry["step"] for entry in entries[1:]] == [entry["step"] for entry in expected]
    assert [entry.get("reward") for entry in entries[1:]] == [entry.get("reward") for entry in expected]
    assert files(folder) == sorted([*files(tmp_path / "whole"), "mine.png"])
    for name in ("step_000004.json", "step_000006.json"):
        record = (folder / "images" / name).read_text()
        assert record == (tmp_path / "whole" / "images" / name).read_text()
    assert_same(trained(resumed), trained(whole))


def test_a_resumed_run_without_files_has_the_log_of_its_checkpoint(make, tmp_path):
    make(save_strategy="steps", save_steps=2, max_steps=2).train()
    (tmp_path / "output" / "history.jsonl").unlink()
    make(pipe=None, max_steps=4).train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in history(tmp_path / "output")] == [1, 2, 3, 4, 4]


def test_a_new_run_in_the_folder_replaces_the_files(make, tmp_path):
    make(pipe=None, logging_images_steps=2, max_steps=4).train()
    make(pipe=None, logging_images_steps=2, max_steps=2).train()
    assert [entry["step"] for entry in history(tmp_path / "output")] == [1, 2, 2]
    assert [name for name in files(tmp_path / "output") if name.endswith(".png")] == [
        "step_000000.png",
        "step_000002.png",
    ]


def test_a_trainer_that_only_evaluates_leaves_the_files_alone(make, tmp_path):
    make().train()
    before = {path: path.read_bytes() for path in (tmp_path / "output").iterdir() if path.is_file()}
    make(pipe=None).evaluate(PROMPTS)
    assert before == {path: path.read_bytes() for path in (tmp_path / "output").iterdir() if path.is_file()}


def test_a_full_disk_costs_the_files_and_not_the_run(make, tmp_path, caplog):
    folder = tmp_path / "output"
    (folder / "images").mkdir(parents=True)
    trainer = make(logging_images_steps=2)
    (callback,) = [part for part in trainer.callback_handler.callbacks if isinstance(part, RunFolder)]

    class FillTheDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                (folder / "history.jsonl").unlink()
                (folder / "history.jsonl").symlink_to("/dev/full")
                (folder / "images" / "step_000002.png").symlink_to("/dev/full")

    trainer.add_callback(FillTheDisk())
    trainer.train()
    assert trainer.state.global_step == 4 and len(logged(trainer, "reward")) == 2
    assert "Step 1: the log could not be written" in caplog.text
    assert "The images of step 2 could not be written" in caplog.text
    assert (folder / "images" / "step_000004.json").exists()
    assert not (folder / "images" / "step_000002.json").exists()
