"""A fault on one of two processes: both stop soon, with the first one's error, and what can be saved is saved."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from diffusers_mixgrpo.training import faults
from diffusers_mixgrpo.training.checkpoints import is_whole
from diffusers_mixgrpo.training.faults import FaultBoard, is_collective_error


TESTS = Path(__file__).parents[1]
# After 3 optimizer steps, inside the second iteration; a fault while images are sampled comes after 2 or 4 steps
STEPS = {"backward": 3, "gradient": 3, "callback": 3, "exit": 3, "kill": 3, "terminate": 3, "interrupt": 3}
STEPS |= {"terminate_all": 3}
STEPS |= {"reward": 2, "data": 2, "sampling": 2, "evaluation": 2}
MESSAGES = {"reward": "must return one score per image, got 3 scores for 4", "exit": "SystemExit: 5", "kill": ""}
MESSAGES |= {"terminate": "", "interrupt": "KeyboardInterrupt", "terminate_all": ""}


# ---- The board ----


def boards(count: int) -> list[FaultBoard]:
    """The boards of several ranks, in one process."""
    store = dist.HashStore()
    made = []
    for rank in range(count):
        board = FaultBoard()
        board.rank, board._store = rank, store
        made.append(board)
    return made


def error(text: str) -> Exception:
    try:
        raise ValueError(text)
    except ValueError as caught:
        return caught


def test_the_first_error_is_shown():
    first, second = boards(2)
    assert second.report(error("a reward is broken"), "after 3 steps") is None
    shown = first.report(error("another"), "after 3 steps")
    assert shown.startswith("Rank 1 stopped with ValueError: a reward is broken (")
    assert "test_faults.py" in shown and shown.endswith("after 3 steps")


def test_an_error_of_a_collective_waits_for_its_cause():
    first, second = boards(2)
    collective = error("Connection closed by peer [127.0.0.1]:18090")
    assert is_collective_error(collective) and not is_collective_error(error("a peer review"))
    timer = threading.Timer(0.5, second.report, (error("the cause"), ""))
    timer.start()
    assert "Rank 1 stopped with ValueError: the cause" in first.report(collective, "")
    timer.join()


def test_what_ranks_announce(monkeypatch):
    monkeypatch.setattr(faults, "PATIENCE_SECONDS", 0.3)
    first, second = boards(2)
    assert not second.wait_for("published")
    first.announce("published")
    assert second.wait_for("published")


def test_one_process_has_nobody_to_tell():
    board = FaultBoard()
    assert board.report(error("Connection closed by peer"), "") is None
    board.announce("published")
    assert not board.wait_for("published")


# ---- Two processes ----


def launch(folder: Path, fault: str) -> tuple[subprocess.CompletedProcess, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([*command, str(folder), fault], env=environment, capture_output=True, text=True, timeout=280)
    began = folder / "began"
    return done, time.time() - began.stat().st_mtime if began.exists() else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("fault", STEPS)
def test_a_fault_on_one_process(tmp_path, fault):
    done, seconds = launch(tmp_path, fault)
    assert done.returncode != 0
    assert seconds < 60, done.stderr[-3000:]
    message = MESSAGES.get(fault, f"the {fault} is broken")
    assert message in done.stderr
    if fault in ("data", "sampling", "evaluation", "backward", "gradient", "callback"):
        assert f"Rank 1 stopped with ValueError: {message}" in done.stderr  # in the other rank's error
    checkpoint = tmp_path / "output" / f"checkpoint-{STEPS[fault]}"
    assert is_whole(checkpoint), (sorted(tmp_path.rglob("*")), done.stderr[-3000:])
    if fault == "kill":
        return  # its own images are lost
    resumed, _ = launch(tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    ends = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("output", "straight")]
    assert ends[0] == ends[1]


def main(folder: Path, fault: str) -> None:
    from helpers import PROMPTS, logged, make_trainer, redness, trained
    from transformers import TrainerCallback

    rank = int(os.environ["RANK"])
    is_faulty = (rank == 1 or fault == "terminate_all") and fault != "resume"

    def strike(name):
        if is_faulty and fault == name:
            (folder / "began").touch()
            raise ValueError(f"the {name} is broken")

    class Prompts(list):
        def __getitem__(self, index):
            if trainer and trainer.state.global_step == 2 and trainer.is_in_train:
                strike("data")
            return super().__getitem__(index)

    def reward(prompts, images, **columns):
        if is_faulty and fault == "reward" and trainer.state.global_step == 2:
            (folder / "began").touch()
            return [0.0] * 3
        return redness(prompts, images)

    reward.__name__ = "redness"

    class Strike(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not is_faulty or state.global_step != 3:
                return
            strike("callback")
            if fault in ("exit", "kill", "terminate", "terminate_all", "interrupt"):
                (folder / "began").touch()
            if fault == "exit":
                sys.exit(5)
            signals = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
            signals |= {"terminate_all": signal.SIGTERM}
            if fault in signals:
                os.kill(os.getpid(), signals[fault])

    batches = {"per_device_train_batch_size": 2, "steps_per_generation": 2, "max_steps": 6}
    evaluates = {"eval_strategy": "steps", "eval_steps": 2} if fault == "evaluation" else {}

    def make(name):
        return make_trainer(
            folder / name,
            rewards=reward,
            train_dataset=Prompts(PROMPTS),
            eval_dataset=PROMPTS[:2],
            callbacks=[Strike()],
            **batches,
            **evaluates,
        )

    trainer = None
    trainer = make("output")

    def hook(module, args, output):
        import torch

        if not trainer.is_in_train:
            return
        if trainer.state.global_step == 3 and torch.is_grad_enabled():
            strike("backward")
            if is_faulty and fault == "gradient":
                output.register_hook(lambda gradient: strike("gradient"))
        if trainer.state.global_step == 2 and not torch.is_grad_enabled():
            strike("sampling")
            strike("evaluation")

    trainer.pipe.transformer.proj_out.register_forward_hook(hook)
    trainer.train(resume_from_checkpoint=True if fault == "resume" else None)
    for name in ("output", "straight"):
        if name == "straight":
            trainer = make("straight")
            trainer.train()
        if rank == 0:
            sums = {name: w.double().abs().sum().item() for name, w in trained(trainer).items()}
            (folder / f"{name}.json").write_text(json.dumps([sums, logged(trainer, "reward")]))
    trainer.accelerator.end_training()  # or one rank may abort when another is gone


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
