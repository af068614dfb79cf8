"""Measurements between two logs."""

import math

import pytest
import torch
from accelerate import Accelerator

from diffusers_mixgrpo.training.metrics import MAXIMA, MetricBuffer


@pytest.fixture
def buffer() -> MetricBuffer:
    return MetricBuffer(Accelerator(cpu=True), torch.device("cpu"))


def test_series_are_averaged_and_start_again(buffer):
    buffer.add({"reward": 1.0, "kl": torch.tensor(0.5)})
    buffer.add({"reward": 2, "kl": torch.tensor(0.25, dtype=torch.bfloat16)})
    assert buffer.pop() == {"kl": 0.375, "reward": 1.5}
    assert buffer.pop() == {}
    buffer.add({"reward": 7.0})
    assert buffer.pop() == {"reward": 7.0}


def test_deviations_are_logged_by_their_maximum(buffer):
    for value in (0.25, 1.0, 0.5):
        buffer.add({name: value for name in MAXIMA} | {"ratio/mean": value})
    assert buffer.pop() == {name: 1.0 for name in MAXIMA} | {"ratio/mean": pytest.approx(1.75 / 3)}


def test_nan_does_not_count_and_nothing_but_nan_is_left_out(buffer):
    buffer.add({"reward": math.nan, "other": math.nan, "time": 1.0})
    buffer.add({"reward": 3.0})
    assert buffer.pop() == {"reward": 3.0, "time": 1.0}


def test_cleared_measurements_are_forgotten(buffer):
    buffer.add({"reward": 1.0})
    buffer.clear()
    assert buffer.pop() == {}


def test_measurements_of_a_run_stay_on_their_device():
    """Tensors of torch's `meta` device raise when the host asks for a value."""
    device = torch.device("meta")
    buffer = MetricBuffer(Accelerator(cpu=True), device)
    buffer.add({"ratio/mean": torch.empty((), device=device), "reward": 1.0})
    with pytest.raises(RuntimeError, match="[Mm]eta"):  # NotImplementedError is one too
        buffer.pop()  # the first to ask


def test_the_ranks_share_means_and_maxima():
    class TwoRanks:
        """As an Accelerator: the other rank has measured 1 more."""

        num_processes = 2

        def gather(self, tensor):
            return torch.cat([tensor, tensor + 1])

    buffer = MetricBuffer(TwoRanks(), torch.device("cpu"))
    buffer.add({"reward": 2.0, "ratio/max_deviation": 2.0})
    assert buffer.pop() == {"ratio/max_deviation": 3.0, "reward": 2.5}
