"""Conditioning: rows per prompt and tensors that all prompts share."""

import pytest
import torch

from diffusers_mixgrpo import Conditioning


@pytest.fixture
def conditioning() -> Conditioning:
    return Conditioning(
        rows={"words": torch.arange(24.0).view(3, 4, 2), "mask": torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()},
        shared={"positions": torch.arange(4)},
    )


def test_length_is_the_number_of_prompts(conditioning):
    assert len(conditioning) == 3
    assert len(Conditioning(rows={"words": torch.zeros(5, 2)})) == 5
    assert Conditioning(rows={"words": torch.zeros(5, 2)}).shared == {}


@pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0]), slice(1, 3), torch.tensor([1, 1, 1, 0])])
def test_selection(conditioning, index):
    selected = conditioning[index]
    for name, rows in conditioning.rows.items():
        assert torch.equal(selected.rows[name], rows[index])
    assert selected.shared is conditioning.shared
    assert len(selected) == len(conditioning.rows["mask"][index])


def test_each_row_is_repeated_in_succession(conditioning):
    repeated = conditioning.repeat_interleave(2)
    assert len(repeated) == 6
    for row, source in enumerate([0, 0, 1, 1, 2, 2]):
        for name, rows in conditioning.rows.items():
            assert torch.equal(repeated.rows[name][row], rows[source])
    assert repeated.shared is conditioning.shared


def test_a_dtype_is_for_floating_point_alone(conditioning):
    half = conditioning.to(torch.bfloat16)
    assert half.rows["words"].dtype == torch.bfloat16
    assert half.rows["mask"].dtype == torch.bool and half.shared["positions"].dtype == torch.int64
    assert conditioning.rows["words"].dtype == torch.float32


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_device_is_for_all_tensors(conditioning, device):
    moved = conditioning.to(device)
    assert {tensor.device.type for tensor in (*moved.rows.values(), *moved.shared.values())} == {"meta"}
    assert moved.rows["mask"].dtype == torch.bool
    assert conditioning.rows["words"].device.type == "cpu"


def test_concatenation_is_the_inverse_of_selection(conditioning):
    parts = [conditioning[[i]] for i in range(3)]
    whole = Conditioning.concatenate(parts)
    assert len(whole) == 3
    for name, rows in conditioning.rows.items():
        assert torch.equal(whole.rows[name], rows)
    assert whole.shared is parts[0].shared
