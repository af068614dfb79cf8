"""Bars for what takes long: in a terminal, and nowhere else."""

import contextlib
import fcntl
import os
import struct
import sys
import termios
import threading

import pytest
from helpers import PROMPTS

from diffusers_mixgrpo.training import progress


@contextlib.contextmanager
def terminal():
    """A real terminal as `sys.stderr`. The list that it yields holds what it has shown when the context ends."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown = []

    def read():
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(master, 4096):
                shown.append(part.decode())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    # Not a fixture: pytest sets `sys.stderr` anew for each phase of a test.
    with os.fdopen(slave, "w") as stream, contextlib.redirect_stderr(stream):
        assert sys.stderr.isatty()
        yield shown
    reader.join()
    os.close(master)


def run(make, **changes):
    trainer = make(max_steps=2, eval_dataset=PROMPTS, sample_batch_size=4, num_inference_steps=5, **changes)
    trainer.train()
    trainer.evaluate()


def test_a_terminal_shows_how_far_sampling_is(make, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0)
    with terminal() as parts:
        run(make, disable_tqdm=False)
    shown = "".join(parts)
    assert "Sampling 8 images: " in shown and "/10 " in shown  # two batches of five steps
    assert "Sampling 5 images without noise: " in shown and "/5 " in shown


def test_short_work_shows_no_bar(make):
    with terminal() as parts:
        run(make, disable_tqdm=False)
    assert "2/2" in "".join(parts) and "Sampling" not in "".join(parts)


def test_disable_tqdm(make, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0)
    with terminal() as parts:
        run(make, disable_tqdm=True)
    assert "Sampling" not in "".join(parts)


def test_no_bar_outside_a_terminal(make, monkeypatch, capfd):
    monkeypatch.setattr(progress, "DELAY", 0)
    run(make, disable_tqdm=False)
    shown = capfd.readouterr()
    assert "2/2" in shown.err and "Sampling" not in shown.out + shown.err


def test_a_bar_ends_with_an_error(monkeypatch):
    """And leaves no text behind: the last thing written clears the line."""
    monkeypatch.setattr(progress, "DELAY", 0)
    with terminal() as parts, pytest.raises(KeyboardInterrupt):
        with progress.Progress(is_shown=True).bar("Work", 2) as on_step:
            on_step()
            raise KeyboardInterrupt
    shown = "".join(parts)
    assert "Work" in shown and shown.rstrip("\r").rsplit("\r", 1)[-1].strip() == ""
