"""Bars for what takes long: in a terminal, and nowhere else."""

import fcntl
import os
import struct
import termios
import threading

import pytest
from helpers import PROMPTS

from diffusers_mixgrpo.training import progress


@pytest.fixture
def terminal(monkeypatch):
    """A real terminal as `sys.stderr`. Returns a function that ends it and gives what it has shown."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown = bytearray()

    def read():
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # the other end is closed
                return
            if not part:
                return
            shown.extend(part)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    stream = os.fdopen(slave, "w")
    monkeypatch.setattr("sys.stderr", stream)

    def end() -> str:
        monkeypatch.undo()
        stream.close()
        reader.join()
        os.close(master)
        return shown.decode()

    return end


def run(make, **changes):
    trainer = make(max_steps=2, eval_dataset=PROMPTS, sample_batch_size=4, num_inference_steps=5, **changes)
    trainer.train()
    trainer.evaluate()


def test_a_terminal_shows_how_far_sampling_is(make, monkeypatch, terminal):
    monkeypatch.setattr(progress, "DELAY", 0)
    run(make, disable_tqdm=False)
    shown = terminal()
    assert "Sampling 8 images: " in shown and "/10 " in shown  # two batches of five steps
    assert "Sampling 5 images without noise: " in shown and "/5 " in shown


def test_short_work_shows_no_bar(make, terminal):
    run(make, disable_tqdm=False)
    assert "Sampling" not in terminal()


def test_disable_tqdm(make, monkeypatch, terminal):
    monkeypatch.setattr(progress, "DELAY", 0)
    run(make, disable_tqdm=True)
    assert terminal() == ""


def test_no_bar_outside_a_terminal(make, monkeypatch, capfd):
    monkeypatch.setattr(progress, "DELAY", 0)
    run(make, disable_tqdm=False)
    shown = capfd.readouterr()
    assert "Sampling" not in shown.out + shown.err


def test_a_bar_ends_with_an_error(monkeypatch, terminal):
    """And leaves no text behind: the last thing written clears the line."""
    monkeypatch.setattr(progress, "DELAY", 0)
    with pytest.raises(KeyboardInterrupt), progress.Progress(is_shown=True).bar("Work", 2) as on_step:
        on_step()
        raise KeyboardInterrupt
    shown = terminal()
    assert "Work" in shown and shown.rstrip("\r").rsplit("\r", 1)[-1].strip() == ""
