"""
Checkpoints that are whole or not there. Run as a script, this file is a run that is killed at each point of a save.

The killed processes are forks of one, since starting Python and loading the libraries takes longer than all else.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, logged, make_trainer, trained
from safetensors.torch import load_file
from transformers import TrainerCallback

from diffusers_mixgrpo.training.checkpoints import (
    clean_up,
    find_checkpoint,
    is_whole,
    newest_checkpoint,
    publish,
    staging_folder,
)


TESTS = Path(__file__).parents[1]


def write(folder: Path, step: int, text: str = "state") -> Path:
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_text(text)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


@pytest.fixture
def make(tmp_path):
    """Trainers of pipelines of their own, which are alike, with one output folder."""
    return lambda **kwargs: make_trainer(tmp_path / "output", **kwargs)


# ---- Folders ----


def test_publishing(tmp_path):
    final = tmp_path / "checkpoint-2"
    write(Path(staging_folder(final)), 2, "first")
    publish(final)
    write(Path(staging_folder(final)), 2, "second")
    publish(final)
    assert (final / "weights.bin").read_text() == "second"
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_a_replaced_checkpoint_comes_back(tmp_path):
    write(tmp_path / "_replaced" / "checkpoint-2", 2)
    write(tmp_path / "_saving" / "checkpoint-2", 2)
    clean_up(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-2"] and is_whole(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("state", [None, "", '{"global_step": 4', "[]"])
def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog, state):
    write(tmp_path / "checkpoint-2", 2)
    broken = write(tmp_path / "checkpoint-10", 10)
    (broken / "trainer_state.json").unlink()
    if state is not None:
        (broken / "trainer_state.json").write_text(state)
    assert newest_checkpoint(tmp_path) == find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-2")
    assert f"{broken} is not a whole checkpoint" in caplog.text
    with pytest.raises(FileNotFoundError, match="must be the folder of a whole checkpoint, got .*checkpoint-2'"):
        find_checkpoint(str(broken), tmp_path)


def test_names_of_a_checkpoint(tmp_path):
    folder = str(write(tmp_path / "checkpoint-2", 2))
    for given in (True, "True", "true", folder, Path(folder)):
        assert find_checkpoint(given, tmp_path) == folder
    for given in (None, False, "False"):
        assert find_checkpoint(given, tmp_path) is None
    with pytest.raises(FileNotFoundError, match="`resume_from_checkpoint` must be None if there is no whole"):
        find_checkpoint("True", tmp_path / "elsewhere")


# ---- Runs ----


def test_a_finished_run_takes_no_step(make, caplog):
    first = make(max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    again = make(max_steps=2)
    for parameter in again.pipe.transformer.parameters():
        parameter.data += parameter.requires_grad * 0.1
    result = again.train(resume_from_checkpoint="True")
    assert result.global_step == again.state.global_step == 2
    assert "The run is finished: 2 of 2 optimizer steps are done" in caplog.text
    assert_same(trained(again), trained(first))


def test_a_finished_run_of_epochs_takes_no_step(make):
    epochs = {"max_steps": -1, "num_train_epochs": 1}
    first = make(**epochs, save_strategy="epoch")
    first.train()
    again = make(**epochs)
    assert again.train(resume_from_checkpoint=True).global_step == first.state.global_step
    assert_same(trained(again), trained(first))


class FailAt(TrainerCallback):
    """Raises at an event of one step."""

    def __init__(self, event: str, step: int, error: BaseException):
        self.step = step
        self.error = error
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


INSIDE = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "max_steps": 8}


@pytest.mark.parametrize("lora, beta", [(True, 0.1), (False, 0)])
def test_resuming_inside_an_iteration_is_exact(make, tmp_path, lora, beta):
    """At the first and the last step of an iteration. Its images are not sampled again."""
    straight = make(lora=lora, beta=beta, **INSIDE)
    straight.train()
    for step in (5, 7):
        fails = FailAt("on_step_begin", step, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt) as caught:
            make(lora=lora, beta=beta, callbacks=[fails], **INSIDE).train()
        assert f"checkpoint-{step}" in caught.value.__notes__[0]
        resumed = make(lora=lora, beta=beta, **INSIDE)
        resumed.train(resume_from_checkpoint=True)
        assert_same(trained(resumed), trained(straight))
        assert logged(resumed, "reward") == logged(straight, "reward")
        shutil.rmtree(tmp_path / "output")


def test_another_plan_does_not_use_the_images(make, caplog):
    with pytest.raises(KeyboardInterrupt):
        make(callbacks=[FailAt("on_step_begin", 5, KeyboardInterrupt())], **INSIDE).train()
    make(seed=7, **INSIDE).train(resume_from_checkpoint=True)
    assert "resuming inside iteration 1 without its images" in caplog.text


def test_a_failure_before_the_first_step_leaves_the_checkpoint_alone(make, tmp_path):
    """The rescue save must not write over the checkpoint that the run resumes from."""
    make(max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "output" / "checkpoint-2"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for event in ("on_train_begin", "on_step_begin"):
        fails = FailAt(event, 2, RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            make(callbacks=[fails]).train(resume_from_checkpoint=True)
    trainer = make()
    trainer.create_optimizer = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train(resume_from_checkpoint=True)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in (tmp_path / "output").glob("*checkpoint*")] == ["checkpoint-2"]


def test_a_step_that_is_not_finished_is_not_saved(make, tmp_path):
    """Between the optimizer's step and its count the weights belong to no step."""
    fails = FailAt("on_optimizer_step", 3, MemoryError())
    with pytest.raises(MemoryError) as caught:
        make(callbacks=[fails], save_strategy="steps", save_steps=2).train()
    assert caught.value.__notes__ == [
        "The weights after 3 optimizer steps could not be saved: optimizer step 4 was not finished."
    ]
    assert [path.name for path in (tmp_path / "output").glob("checkpoint*")] == ["checkpoint-2"]


def test_a_full_disk_does_not_hide_the_error(make, tmp_path, monkeypatch):
    trainer = make(callbacks=[FailAt("on_step_begin", 3, RuntimeError("the first error"))])

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(RuntimeError, match="the first error") as caught:
        trainer.train()
    assert "after 3 optimizer steps could not be saved: OSError(28, 'No space left" in caught.value.__notes__[0]
    assert not list((tmp_path / "output").rglob("*.safetensors"))


def test_the_last_checkpoint_goes_after_the_new_one_stands(make, tmp_path, monkeypatch):
    from diffusers_mixgrpo.training import saving

    seen = []

    def rotate(output_dir, **kwargs):
        seen.append(sorted(name for name in os.listdir(output_dir) if is_whole(Path(output_dir, name))))
        rotate_checkpoints(output_dir, **kwargs)

    rotate_checkpoints = saving.rotate_checkpoints
    monkeypatch.setattr(saving, "rotate_checkpoints", rotate)
    make(save_strategy="steps", save_steps=2, save_total_limit=1).train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert [path.name for path in (tmp_path / "output").glob("checkpoint*")] == ["checkpoint-4"]


# ---- Kills ----


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_each_point_of_a_save(tmp_path):
    """LoRA and full fine-tuning; the output folder holds an older checkpoint of the same name, or none."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, points in json.loads((tmp_path / "killed.json").read_text()).items():
        assert len(points) > 15, name
        for point in points:
            assert point["found"] in ([4] if point["was_replacing"] else [2, 4]), (name, point)
            assert point["same"], (name, point)
        assert {point["found"] for point in points} >= {4}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_killed_at_each_point_of_a_save(tmp_path, rank):
    """One launch for each point, until one is not killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    for at in itertools.count():
        output = tmp_path / str(at)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
        killing = {"KILLED_RANK": str(rank), "KILLED_AT": str(at)}
        done = subprocess.run([*command, str(output)], env=environment | killing, capture_output=True, timeout=120)
        clean_up(output)
        found = Path(find_checkpoint(True, output))
        assert contents(found)["trainer_state.json"] in ([2, 4] if done.returncode else [4])
        assert "optimizer.pt" in contents(found) and "pytorch_lora_weights.safetensors" in contents(found)
        if found.name == "checkpoint-4" and (rank == 0 or done.returncode == 0):
            # Whole also in what the second process wrote. If that one is killed, the first saves without it.
            assert {"rng_state_0.pth", "rng_state_1.pth"} <= contents(found).keys()
        if done.returncode == 0:
            break
    assert at > (15 if rank == 0 else 2)


def contents(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's files hold, without what depends on the time or a random order."""
    found: dict[str, Any] = {}
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        if path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            found[name] = torch.load(path, weights_only=not name.startswith("rng_state"))
        elif path.name == "trainer_state.json":
            found[name] = json.loads(path.read_text())["global_step"]
    return found


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second) if not hasattr(first, "shape") else bool((first == second).all())


class Killer:
    """Kills its process at the `at`-th point of a save: before a file is opened or moved, in it, or after it."""

    def __init__(self, at: int, folder: Path, path_of_name: Path):
        self.left = at
        self.folder = str(folder)
        self.path_of_name = path_of_name

    def install(self) -> None:
        import safetensors.torch

        sys.addaudithook(self.hear)
        torch.save = self.around(torch.save, 1)
        safetensors.torch.save_file = self.around(safetensors.torch.save_file, 1)

    def hear(self, event: str, arguments: tuple) -> None:
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax")):
            return
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and self.folder in str(arguments[0]):
            self.point(f"{event} {Path(arguments[0]).name}")

    def around(self, save: Any, position: int) -> Any:
        def saves(*args, **kwargs):
            path = Path(args[position])
            self.point(f"before {path.name}")
            save(*args, **kwargs)
            if self.left == 0:
                os.truncate(path, path.stat().st_size // 2)
            self.point(f"in {path.name}")
            self.point(f"after {path.name}")

        return saves

    def point(self, name: str) -> None:
        self.left -= 1
        if self.left < 0:
            self.path_of_name.write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)


def one_of_two_processes(output: Path) -> None:
    """A run with saves after 2 and 4 steps; the given rank is killed at the given point of the second."""
    trainer = make_trainer(output, save_strategy="steps", save_steps=2, save_total_limit=1)
    save = trainer._save_checkpoint

    def save_and_be_killed(model, trial):
        if trainer.state.global_step == 4 and os.environ["RANK"] == os.environ["KILLED_RANK"]:
            Killer(int(os.environ["KILLED_AT"]), output, output.with_suffix(".killed")).install()
        save(model, trial)

    trainer._save_checkpoint = save_and_be_killed
    trainer.train()
    os._exit(0)  # without the files of an ordered end, where the hook would kill


def main(folder: Path) -> None:
    results = {}
    for lora, was_replacing in ((True, False), (False, False), (True, True)):
        name = f"{'lora' if lora else 'full'}{'_replacing' * was_replacing}"
        results[name] = kill_at_each_point(folder / name, lora, was_replacing)
    (folder / "killed.json").write_text(json.dumps(results))


def kill_at_each_point(folder: Path, lora: bool, was_replacing: bool) -> list[dict[str, Any]]:
    output = folder / "output"
    points: list[dict[str, Any]] = []
    trainer = make_trainer(output, lora=lora, save_strategy="steps", save_steps=2, save_total_limit=1)
    save = trainer._save_checkpoint

    def save_and_be_killed(model, trial):
        if trainer.state.global_step == 4:
            if was_replacing:
                save(model, trial)
            shutil.copytree(output, folder / "before")
            state = random.getstate()
            for at in itertools.count():
                if (child := os.fork()) == 0:
                    random.setstate(state)  # Python seeds a fork anew
                    Killer(at, output, folder / "name").install()
                    save(model, trial)
                    os._exit(0)
                if os.waitpid(child, 0)[1] == 0:
                    break
                shutil.copytree(output, folder / f"killed-{at}")
                points.append({"name": (folder / "name").read_text(), "was_replacing": was_replacing})
                shutil.rmtree(output)
                shutil.copytree(folder / "before", output)
        save(model, trial)

    trainer._save_checkpoint = save_and_be_killed
    trainer.train()
    whole = {4: contents(output / "checkpoint-4")}
    if not was_replacing:
        whole[2] = contents(folder / "before" / "checkpoint-2")
    for at, point in enumerate(points):
        clean_up(folder / f"killed-{at}")
        found = Path(find_checkpoint(True, folder / f"killed-{at}"))
        point["found"] = int(found.name.split("-")[1])
        point["same"] = equal(contents(found), whole[point["found"]])
    return points


if __name__ == "__main__":
    (one_of_two_processes if "RANK" in os.environ else main)(Path(sys.argv[1]))
