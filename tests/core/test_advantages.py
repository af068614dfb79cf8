"""Advantages from the rewards of groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_mixgrpo import compute_advantages
from diffusers_mixgrpo.core.advantages import combine_rewards, group_normalize, keep_extremes, normalize_weights


NAN = math.nan
scores = st.floats(-1e3, 1e3, allow_subnormal=False)
groups = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(scores, min_size=n, max_size=n), min_size=1, max_size=4)
)


def tensor(*rewards):
    return torch.tensor(rewards, dtype=torch.float64)


def test_the_formula_by_hand():
    # mean 2, std with Bessel's correction sqrt((1 + 0 + 1) / 2) = 1
    advantages = compute_advantages(tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 0.0, 1.0]]))
    advantages = compute_advantages(tensor([[0.0, 1.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 1.0]]) / math.sqrt(2))


def test_groups_do_not_see_each_other():
    advantages = compute_advantages(tensor([[1.0, 2.0, 3.0], [100.0, 200.0, 300.0]]))
    torch.testing.assert_close(advantages[0], advantages[1])


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["normalize_then_sum", "sum_then_normalize"])
def test_equal_rewards_have_advantages_of_exactly_zero(scale_rewards, aggregation):
    # The mean of seven times 0.1 is not 0.1 in floating point.
    rewards = tensor([[0.1] * 7, [0.3] * 7], [[0.7] * 7, [1e-3] * 7])
    assert torch.equal(compute_advantages(rewards, None, aggregation, scale_rewards), torch.zeros(2, 7))


def test_an_unscored_image_is_left_out():
    advantages = compute_advantages(tensor([[1.0, NAN, 3.0, 2.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("group", [[NAN, NAN, NAN], [4.0, NAN, NAN]])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_fewer_than_two_scores_give_no_advantage(group, scale_rewards):
    advantages = compute_advantages(tensor([group, [1.0, 2.0, 3.0]]), scale_rewards=scale_rewards)
    assert torch.equal(advantages[0], torch.zeros(3))
    assert advantages[1, 2] > 0


def test_a_failure_of_one_reward_leaves_the_others():
    rewards = tensor([[1.0, 2.0, 3.0]], [[5.0, NAN, 1.0]])
    advantages = compute_advantages(rewards)
    root = 1 / math.sqrt(2)
    torch.testing.assert_close(advantages, torch.tensor([[0.5 * (-1 + root), 0.0, 0.5 * (1 - root)]]))
    # A sum lacks a term, so that image cannot be compared with the others.
    summed = compute_advantages(rewards, aggregation="sum_then_normalize")
    torch.testing.assert_close(summed, torch.tensor([[root, 0.0, -root]]))


def test_normalizing_first_makes_rewards_of_any_scale_equal():
    small, large = [[0.0, 0.1, 0.2]], [[2000.0, 1000.0, 0.0]]
    assert torch.allclose(compute_advantages(tensor(small, large)), torch.zeros(1, 3), atol=1e-4)
    summed = compute_advantages(tensor(small, large), aggregation="sum_then_normalize")
    torch.testing.assert_close(summed, torch.tensor([[1.0, 0.0, -1.0]]), rtol=0, atol=1e-3)


def test_weights():
    rewards = tensor([[1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0]])
    torch.testing.assert_close(compute_advantages(rewards, [3, 1]), torch.tensor([[-0.5, 0.0, 0.5]]))
    torch.testing.assert_close(compute_advantages(rewards, [300, 100]), torch.tensor([[-0.5, 0.0, 0.5]]))
    # A reward of weight 0 is only logged, and may fail.
    logged = tensor([[1.0, 2.0, 3.0]], [[NAN, NAN, NAN]])
    for aggregation in ("normalize_then_sum", "sum_then_normalize"):
        torch.testing.assert_close(compute_advantages(logged, [1, 0], aggregation), torch.tensor([[-1.0, 0.0, 1.0]]))
    assert normalize_weights(None, 4).tolist() == [0.25] * 4
    assert normalize_weights([1, -1], 2).tolist() == [0.5, -0.5]


def test_combined_reward():
    combined = combine_rewards(tensor([1.0, NAN], [3.0, 4.0]), normalize_weights([3, 1], 2))
    assert combined[0] == 1.5 and combined[1].isnan()


def test_scaling():
    rewards = tensor([[0.0, 2.0], [10.0, 11.0]])
    torch.testing.assert_close(
        compute_advantages(rewards, scale_rewards="none"), torch.tensor([[-1.0, 1.0], [-0.5, 0.5]])
    )
    std = tensor(0.0, 2.0, 10.0, 11.0).std()
    torch.testing.assert_close(
        group_normalize(rewards[0], "batch"), tensor([-1.0, 1.0], [-0.5, 0.5]) / std, rtol=1e-6, atol=0
    )


def test_clip():
    rewards = tensor([[0.0] * 63 + [1.0]])
    assert compute_advantages(rewards, clip=None).max() == pytest.approx(63 / 64 / (1 / 8), rel=1e-3)
    assert compute_advantages(rewards, clip=5.0).max() == 5
    assert compute_advantages(-rewards, clip=2.0).min() == -2


@given(groups)
@settings(max_examples=60, deadline=None)
def test_properties(group):
    rewards = tensor(group)
    advantages = compute_advantages(rewards, clip=None)
    assert advantages.dtype == torch.float32 and advantages.isfinite().all()
    for row, values in zip(advantages.double(), rewards[0], strict=True):
        assert abs(row.sum()) < 1e-3  # centered
        spread = values.max() - values.min()
        if spread > 1e-3:
            assert row.std().item() == pytest.approx(1, rel=1e-3)  # of unit variance
            assert values.max() - values[row.argmax()] <= 1e-6 * spread  # the best is the best
    if all(max(g) - min(g) > 1e-2 for g in group):
        shifted = compute_advantages(3 * rewards + 7, clip=None)
        torch.testing.assert_close(shifted, advantages, rtol=1e-3, atol=1e-4)  # units do not matter


def test_bad_arguments():
    rewards = tensor([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"must have shape \(rewards, prompts, generations\), got \(1, 2\)"):
        compute_advantages(rewards[0])
    with pytest.raises(ValueError, match="`aggregation` must be one of .* got 'mean'"):
        compute_advantages(rewards, aggregation="mean")
    with pytest.raises(ValueError, match="`scale_rewards` must be one of .* got 'all'"):
        compute_advantages(rewards, scale_rewards="all")
    with pytest.raises(ValueError, match=r"got 2 weights for 1 reward function"):
        compute_advantages(rewards, [1, 2])
    with pytest.raises(ValueError, match="must be finite and not all 0"):
        compute_advantages(rewards, [0.0])


def test_the_extremes_of_each_group():
    advantages = torch.tensor([[0.1, -2.0, 0.5, 3.0, -0.3, 0.0], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]])
    kept = keep_extremes(advantages, 1)
    assert kept[0].tolist() == [0, -2, 0, 3, 0, 0]
    assert sorted(kept[1].tolist()) == [-1, 0, 0, 0, 0, 1]
    kept = keep_extremes(advantages, 2)
    assert kept[0].tolist() == pytest.approx([0, -2, 0.5, 3, -0.3, 0])
    assert torch.equal(keep_extremes(advantages, 3), advantages)
    assert torch.equal(keep_extremes(advantages, 100), advantages)
