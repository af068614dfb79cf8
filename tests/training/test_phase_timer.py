"""How long each phase of an iteration takes, by a clock that the tests set."""

import pytest
import torch

from diffusers_mixgrpo.training.phase_timer import PhaseTimer


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


@pytest.fixture
def timer(clock) -> PhaseTimer:
    return PhaseTimer(torch.device("cpu"))


def test_the_seconds_of_a_phase_add_up(timer, clock):
    for seconds in (2, 3):
        with timer.phase("sampling"):
            clock.now += seconds
        clock.now += 10  # in no phase
    with timer.phase("training"):
        clock.now += 4
    assert timer.seconds == {"sampling": 5, "training": 4}
    assert timer.pop() == {"sampling": 5, "training": 4}
    assert timer.pop() == {}


def test_time_inside_another_phase_counts_once(timer, clock):
    with timer.phase("training"):
        clock.now += 1
        with timer.phase("sampling"):
            clock.now += 2
            with timer.phase("decoding"):
                clock.now += 4
            clock.now += 8
        with timer.phase("training"):
            clock.now += 16
        clock.now += 32
    assert timer.pop() == {"training": 1 + 16 + 32, "sampling": 2 + 8, "decoding": 4}


def test_a_phase_that_ends_with_an_error_is_counted_and_closed(timer, clock):
    with pytest.raises(KeyError):
        with timer.phase("sampling"), timer.phase("reward"):
            clock.now += 3
            raise KeyError
    with timer.phase("training"):
        clock.now += 1
    assert timer.pop() == {"reward": 3, "sampling": 0, "training": 1}


def test_on_cuda_a_phase_ends_when_the_device_is_done(clock, monkeypatch):
    def synchronize(device):
        assert device == torch.device("cuda", 0)
        clock.now += 5  # the device is still at work

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    timer = PhaseTimer(torch.device("cuda", 0))
    with timer.phase("training"):
        clock.now += 1
    assert timer.pop() == {"training": 6}
