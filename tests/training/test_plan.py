"""What is random in an iteration."""

import pytest
import torch

from diffusers_mixgrpo.iteration_draws import STREAMS, draw_order, draw_seeds, draw_steps


def test_seeds_are_functions_of_their_arguments_and_differ_in_each():
    keys = [(s, i, stream, rank) for s in (0, 1) for i in (0, 1, 2) for stream in STREAMS for rank in (0, 1)]
    seeds = {key: draw_seeds(*key, count=3) for key in keys}
    assert len({seed for three in seeds.values() for seed in three}) == 3 * len(keys)
    assert all(draw_seeds(*key, count=3) == three and draw_seeds(*key) == three[:1] for key, three in seeds.items())
    assert all(0 <= seed < 2**63 for three in seeds.values() for seed in three)  # what a torch.Generator takes


@pytest.mark.parametrize("fraction, count", [(1.0, 9), (0.6, 5), (0.01, 1)])
def test_steps(fraction, count):
    drawn = [draw_steps(3, iteration, 9, fraction).tolist() for iteration in range(200)]
    assert all(len(steps) == count and steps == sorted(set(steps)) for steps in drawn)
    assert {step for steps in drawn for step in steps} == set(range(9))
    assert drawn == [draw_steps(3, iteration, 9, fraction).tolist() for iteration in range(200)]


@pytest.mark.parametrize("zeros", [0, 1, 5, 9, 12])
def test_the_order_shares_out_what_has_to_be_trained(zeros):
    advantages = torch.arange(1.0, 13.0)
    advantages[torch.randperm(12, generator=torch.Generator().manual_seed(zeros))[:zeros]] = 0
    orders = [draw_order(seed, advantages, 3) for seed in range(300)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(12))
        counts = (advantages[order] != 0).view(4, 3).sum(1)
        assert counts.max() - counts.min() <= 1
    batches = torch.stack(orders).view(300, 4, 3)
    in_first = torch.stack([(batches[:, 0] == image).any(-1).double().mean() for image in range(12)])
    kept = advantages != 0
    if 1 <= zeros < 12:  # all that have an advantage come first equally often
        assert (in_first[kept] - in_first[kept].mean()).abs().max() < 0.12
    assert len({tuple(order.tolist()) for order in orders}) > 250
