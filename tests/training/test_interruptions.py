"""Signals: never in the middle of an optimizer step, and nothing is lost. The processes are real ones."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import SMALL, assert_same, logged, make_trainer, redness, trained
from transformers import TrainerCallback

from diffusers_mixgrpo.training.checkpoints import is_whole
from diffusers_mixgrpo.training.interruptions import Interruptions


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# ---- The handlers ----


def test_signals_are_exceptions():
    with Interruptions(), pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    with Interruptions(), pytest.raises(SystemExit) as caught:
        send(signal.SIGTERM)
    assert caught.value.code == 143


def test_signals_wait_while_they_are_held():
    with Interruptions() as interruptions:
        interruptions.hold()
        send(signal.SIGTERM)
        assert interruptions.is_pending
        with pytest.raises(SystemExit):
            interruptions.release()
        interruptions.release()  # once is enough
        interruptions.hold()
        send(signal.SIGTERM)
        with interruptions.dropped():
            interruptions.release()  # as saving does
            send(signal.SIGINT)
            send(signal.SIGTERM)
            interruptions.release()
        interruptions.release()


def test_other_handlers_stay():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with Interruptions():
            send(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruptions():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_changes_nothing(tmp_path):
    """Python lets only the main thread have handlers; training in another one must still work."""
    steps = []
    trainer = make_trainer(tmp_path, max_steps=2)
    thread = threading.Thread(target=lambda: steps.append(trainer.train().global_step))
    thread.start()
    thread.join()
    assert steps == [2]


# ---- Training ----


class SendAt(TrainerCallback):
    """Sends this process a signal at an event of one step."""

    def __init__(self, event: str, step: int, number: int):
        self.step = step
        self.number = number
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            send(self.number)


INSIDE = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "max_steps": 8}
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log", "on_save")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("straight"), save_strategy="steps", save_steps=4, **INSIDE)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "event, number", [*((event, signal.SIGTERM) for event in EVENTS), ("on_optimizer_step", signal.SIGINT)]
)
def test_a_signal_at_any_event_loses_nothing(straight, tmp_path, event, number):
    step = 4 if event == "on_save" else 5
    saves = {"save_strategy": "steps", "save_steps": 4}
    stopped = make_trainer(tmp_path, callbacks=[SendAt(event, step, number)], **saves, **INSIDE)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        stopped.train()
    # A step that has changed the weights is finished and counted, one that has not is dropped
    reached = step + (event == "on_optimizer_step")
    assert stopped.state.global_step == reached
    assert is_whole(tmp_path / f"checkpoint-{reached}")
    resumed = make_trainer(tmp_path, **saves, **INSIDE)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trained(resumed), trained(straight))
    assert logged(resumed, "reward") == logged(straight, "reward")
    assert logged(resumed, "grad_norm") == logged(straight, "grad_norm")


def test_a_signal_during_a_rollout(straight, tmp_path):
    calls = []

    def reward(prompts, images, **columns):
        calls.append(len(images))
        if len(calls) == 3:
            send(signal.SIGTERM)
        return redness(prompts, images)

    reward.__name__ = "redness"
    with pytest.raises(SystemExit):
        make_trainer(tmp_path, rewards=reward, save_strategy="no", **INSIDE).train()
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-4"]
    resumed = make_trainer(tmp_path, **INSIDE)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trained(resumed), trained(straight))


def test_a_signal_before_the_first_step(tmp_path):
    with pytest.raises(SystemExit):
        make_trainer(tmp_path, callbacks=[SendAt("on_step_begin", 0, signal.SIGTERM)]).train()
    assert not list(tmp_path.glob("checkpoint*"))


def test_impatient_signals_do_not_break_the_save(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[SendAt("on_step_begin", 3, signal.SIGINT)])
    write = trainer._write_checkpoint

    def interrupted_again(final):
        send(signal.SIGINT)
        write(final)
        send(signal.SIGTERM)

    trainer._write_checkpoint = interrupted_again
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert is_whole(tmp_path / "checkpoint-3")


def test_a_process_that_is_told_to_stop(tmp_path, pipeline_folder):
    """From outside, with the example script, as a cluster does it: it saves and exits with 143."""
    script = Path(__file__).parents[2] / "examples" / "train_flux_mixgrpo.py"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\nthe sea\n")
    changes = {"max_steps": 20, "report_to": "none", "reward_funcs": "jpeg_compressibility", "lora_rank": 4}
    changes |= {"output_dir": tmp_path / "out", "pretrained_model_name_or_path": pipeline_folder}
    changes |= {"dataset_name": prompts, "num_eval_prompts": 0, "logging_steps": 1}
    command = [sys.executable, str(script)]
    command += [f"--{name}={value}" for name, value in (SMALL | changes).items()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "'loss'" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 143, "".join(lines) + rest
    saved = list((tmp_path / "out").glob("checkpoint-*"))
    assert len(saved) == 1 and is_whole(saved[0])
