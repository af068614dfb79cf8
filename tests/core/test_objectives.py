"""Objectives against their formulas, written case by case in float64, and their gradients in closed form."""

import math

import pytest
import torch

from diffusers_mixgrpo.core.objectives import (
    Objective,
    add_kl_penalty,
    clipped_objective,
    guarded_objective,
    masked_objective,
)
from diffusers_mixgrpo.core.transitions import gaussian_kl


LOW = 0.1
HIGH = 0.3
# Ratios below, inside and above the clip range, each with advantages of both signs and 0
RATIOS = [0.5, 0.8, 0.95, 1.0, 1.2, 1.5, 4.0]
ADVANTAGES = [-3.0, -0.5, 0.0, 0.7, 2.0]
GRID = [(ratio, advantage) for ratio in RATIOS for advantage in ADVANTAGES]


def grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New and old log-probs, and advantages, of every case."""
    ratios, advantages = torch.tensor(GRID, dtype=torch.float64).T
    old = torch.linspace(-2, 1, len(GRID), dtype=torch.float64)
    return (old + ratios.log()).requires_grad_(), old, advantages


def expected_loss(ratio: float, advantage: float, low: float = LOW, high: float = HIGH) -> tuple[float, float]:
    """The loss and its derivative by the new log-prob, case by case: PPO's pessimistic bound."""
    if advantage > 0 and ratio > 1 + high:
        return -advantage * (1 + high), 0.0
    if advantage < 0 and ratio < 1 - low:
        return -advantage * (1 - low), 0.0
    return -advantage * ratio, -advantage * ratio


def test_losses_and_gradients_in_every_case():
    new, old, advantages = grid()
    objective = clipped_objective(new, old, advantages, LOW, HIGH)
    (gradient,) = torch.autograd.grad(objective.losses.sum(), new)
    expected = torch.tensor([expected_loss(*case) for case in GRID], dtype=torch.float64)
    torch.testing.assert_close(objective.losses, expected[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected[:, 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(objective.ratio, torch.tensor([r for r, _ in GRID], dtype=torch.float64))
    assert not objective.ratio.requires_grad


def test_one_epsilon_is_for_both_sides():
    new, old, advantages = grid()
    objective = clipped_objective(new, old, advantages, epsilon=0.25)
    expected = [expected_loss(*case, low=0.25, high=0.25)[0] for case in GRID]
    torch.testing.assert_close(objective.losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_loss_is_the_larger_of_both():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 1000, generator=generator, dtype=torch.float64)
    losses = clipped_objective(new, old, advantages, LOW, HIGH).losses
    ratio = (new - old).exp()
    clipped = torch.where(ratio < 1 - LOW, 1 - LOW, torch.where(ratio > 1 + HIGH, 1 + HIGH, ratio))
    torch.testing.assert_close(-losses, torch.minimum(advantages * ratio, advantages * clipped), rtol=1e-12, atol=0)


def test_statistics():
    new, old, advantages = grid()
    statistics = clipped_objective(new, old, advantages, LOW, HIGH).statistics
    low = sum(ratio < 1 - LOW and advantage < 0 for ratio, advantage in GRID)
    high = sum(ratio > 1 + HIGH and advantage > 0 for ratio, advantage in GRID)
    assert low == high == 4
    expected = {
        "clip_ratio/low_mean": low / len(GRID),
        "clip_ratio/high_mean": high / len(GRID),
        "clip_ratio/region_mean": (low + high) / len(GRID),
        "ratio/mean": math.fsum(ratio for ratio, _ in GRID) / len(GRID),
        "ratio/max_deviation": 3.0,
    }
    assert {name: value.item() for name, value in statistics.items()} == pytest.approx(expected, rel=1e-6)
    for value in statistics.values():
        assert value.shape == () and not value.requires_grad


@pytest.mark.parametrize("ratios, deviation", [([0.25, 1.5, 1.0], 0.75), ([0.75, 1.5, 1.0], 0.5)])
def test_the_largest_deviation_is_on_either_side(ratios, deviation):
    new = torch.tensor(ratios, dtype=torch.float64).log()
    objective = clipped_objective(new, torch.zeros(3, dtype=torch.float64), torch.ones(3), LOW)
    assert objective.statistics["ratio/max_deviation"].item() == pytest.approx(deviation, rel=1e-12)


def test_a_clipped_transition_is_one_without_gradient():
    new, old, advantages = grid()
    objective = clipped_objective(new, old, advantages, LOW, HIGH)
    (gradient,) = torch.autograd.grad(objective.losses.sum(), new)
    stopped = ((gradient == 0) & (advantages != 0)).double().mean()
    assert objective.statistics["clip_ratio/region_mean"].item() == pytest.approx(stopped.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_log_probs_have_a_ratio_of_exactly_one(dtype):
    generator = torch.Generator().manual_seed(0)
    old, advantages = (10 * torch.randn(2, 500, generator=generator)).to(dtype)
    new = old.clone().requires_grad_()
    objective = clipped_objective(new, old, advantages, 1e-4)
    (gradient,) = torch.autograd.grad(objective.losses.sum(), new)
    assert torch.equal(objective.ratio, torch.ones_like(old))
    assert torch.equal(objective.losses, -advantages)
    assert torch.equal(gradient, -advantages)  # of the policy gradient: nothing is clipped
    assert {name: value.item() for name, value in objective.statistics.items()} == {
        "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 0.0,
        "clip_ratio/region_mean": 0.0,
        "ratio/mean": 1.0,
        "ratio/max_deviation": 0.0,
    }


# ---- The KL penalty ----


def transitions(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means, reference means, and one std per transition."""
    generator = torch.Generator().manual_seed(1)
    means, reference_means = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    stds = 0.1 + torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator, dtype=torch.float64)
    return means.requires_grad_(), reference_means, stds


def some_objective(count: int) -> Objective:
    generator = torch.Generator().manual_seed(2)
    new, old, advantages = torch.randn(3, count, generator=generator, dtype=torch.float64)
    return clipped_objective(new.requires_grad_(), old, advantages, LOW)


@pytest.mark.parametrize("shape", [(5, 6, 8), (3, 4, 5, 2)])
@pytest.mark.parametrize("beta", [0.04, 3.0])
def test_the_penalty_is_beta_times_the_exact_kl(shape, beta):
    means, reference_means, stds = transitions(shape)
    objective = some_objective(shape[0])
    penalized = add_kl_penalty(objective, gaussian_kl(means, reference_means, stds), beta)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(means, stds.expand(shape)),
        torch.distributions.Normal(reference_means, stds.expand(shape)),
    )
    kl = kl.flatten(1).mean(1)
    torch.testing.assert_close(penalized.losses, objective.losses + beta * kl, rtol=1e-12, atol=1e-12)
    assert penalized.statistics["kl"].item() == pytest.approx(kl.mean().item(), rel=1e-12)
    assert not penalized.statistics["kl"].requires_grad

    (gradient,) = torch.autograd.grad(penalized.losses.sum(), means)
    elements = math.prod(shape[1:])
    expected = beta * (means - reference_means) / stds**2 / elements
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=1e-12)


def test_the_penalty_leaves_the_rest_alone():
    means, reference_means, stds = transitions((4, 6, 8))
    objective = some_objective(4)
    before = dict(objective.statistics)
    penalized = add_kl_penalty(objective, gaussian_kl(means, reference_means, stds), 0.1)
    assert objective.statistics == before  # the argument is not changed
    assert {name: value for name, value in penalized.statistics.items() if name != "kl"} == before
    assert penalized.ratio is objective.ratio
    # The penalty's gradient adds to that of the clipped objective, which flows on.
    assert penalized.losses.requires_grad
    same = add_kl_penalty(objective, gaussian_kl(means, means.detach(), stds), 0.1)
    assert torch.equal(same.losses, objective.losses) and same.statistics["kl"] == 0


def test_both_gradients_of_a_penalized_objective():
    # A policy of one parameter that moves all means of a transition: r = exp(log p(y | mean) - old)
    shape = (3, 4)
    generator = torch.Generator().manual_seed(3)
    reference_means, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    std, beta = torch.tensor(0.5, dtype=torch.float64), 0.2
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    shift = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    means = reference_means + 0.1 + shift
    recorded = (reference_means + 0.1 + std * noise).detach()
    log_probs = -(((recorded - means) / std) ** 2).mean(1) / 2
    objective = clipped_objective(log_probs, log_probs.detach(), advantages, LOW)
    penalized = add_kl_penalty(objective, gaussian_kl(means, reference_means, std), beta)
    (gradient,) = torch.autograd.grad(penalized.losses.sum(), shift)
    expected = -advantages * (noise / std).mean(1) + beta * 0.1 / std**2
    torch.testing.assert_close(gradient.squeeze(1), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(penalized.losses - objective.losses, beta * gaussian_kl(means, reference_means, std))


# ---- Guard and mask, for Gaussians whose means have moved ----


def moved(move: float, count: int = 6) -> dict[str, torch.Tensor]:
    """`count` transitions whose means have moved by `move` standard deviations times a direction of its own."""
    generator = torch.Generator().manual_seed(4)
    old_means, noise, direction = torch.randn(3, count, 5, 7, generator=generator, dtype=torch.float64)
    stds = torch.linspace(0.05, 0.8, count, dtype=torch.float64)
    means = (old_means + move * stds[:, None, None] * direction).requires_grad_()
    recorded = old_means + stds[:, None, None] * noise
    per_element = stds[:, None, None]
    return {
        "means": means,
        "old_means": old_means,
        "recorded": recorded,
        "stds": stds,
        "new": torch.distributions.Normal(means, per_element).log_prob(recorded).mean((1, 2)),
        "old": torch.distributions.Normal(old_means, per_element).log_prob(recorded).mean((1, 2)),
        "kl": gaussian_kl(means, old_means, per_element),
        "advantages": torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0, -1.0], dtype=torch.float64),
        "dts": -torch.linspace(0.01, 0.3, count, dtype=torch.float64),
    }


def guard(t, epsilon, epsilon_high=None):
    return guarded_objective(t["new"], t["old"], t["advantages"], t["kl"], t["stds"], t["dts"], epsilon, epsilon_high)


@pytest.mark.parametrize("move", [0.01, 0.3])
def test_guard_in_closed_form(move):
    t = moved(move)
    objective = guard(t, 0.02, 0.03)
    # The log-ratio plus the divergence is mean(noise * move) / std, so the std cancels: one spread at all steps.
    steps = t["means"] - t["old_means"]
    noise = (t["recorded"] - t["old_means"]) / t["stds"][:, None, None]
    ratio = torch.exp((noise * steps).mean((1, 2)))
    torch.testing.assert_close(objective.ratio, ratio.detach(), rtol=1e-10, atol=0)
    clipped = ratio.clamp(0.98, 1.03)
    expected = torch.maximum(-t["advantages"] * ratio, -t["advantages"] * clipped) / -t["dts"]
    torch.testing.assert_close(objective.losses, expected, rtol=1e-10, atol=0)
    share = ((ratio < 0.98) & (t["advantages"] < 0) | (ratio > 1.03) & (t["advantages"] > 0)).double().mean()
    assert float(objective.statistics["clip_ratio/region_mean"]) == pytest.approx(float(share))
    assert (share > 0) == (move > 0.1)


def test_guard_takes_out_the_bias_of_the_log_ratio():
    # Over many noises the mean log-ratio is -KL, and the guard's is 0.
    generator = torch.Generator().manual_seed(5)
    count = 200_000
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    means = torch.full((count, 1), 0.5, dtype=torch.float64)
    std = torch.tensor(1.0, dtype=torch.float64)
    new = -((noise - means) ** 2).mean(1) / 2
    old = -(noise**2).mean(1) / 2
    kl = gaussian_kl(means, torch.zeros_like(means), std)
    ones = torch.ones(count, dtype=torch.float64)
    objective = guarded_objective(new, old, ones, kl, ones, -ones, 10.0)
    error = 0.5 / count**0.5  # the standard error of 0.5 * noise
    assert abs(float(objective.ratio.log().mean())) < 5 * error
    assert abs(float((new - old).mean()) + 0.125) < 5 * error


@pytest.mark.parametrize("move", [0.01, 0.3])
def test_mask_in_closed_form(move):
    t = moved(move)
    threshold = float(t["kl"].median().detach())
    objective = masked_objective(t["new"], t["old"], t["advantages"], t["kl"], threshold)
    ratio = torch.exp(t["new"] - t["old"])
    torch.testing.assert_close(objective.losses, -t["advantages"] * ratio, rtol=0, atol=0)
    away = (t["advantages"] * (ratio - 1)).detach() > 0
    masked = away & (t["kl"].detach() >= threshold)
    assert bool(masked.any()) and not bool(masked.all())
    assert float(objective.statistics["clip_ratio/region_mean"]) == pytest.approx(float(masked.double().mean()))
    (gradient,) = torch.autograd.grad(objective.losses.sum(), t["means"], retain_graph=True)
    (free,) = torch.autograd.grad((-t["advantages"] * ratio).sum(), t["means"])
    torch.testing.assert_close(gradient, free.masked_fill(masked[:, None, None], 0), rtol=0, atol=0)


def test_all_objectives_agree_at_the_start():
    """With unmoved means the ratio is 1, and the gradients differ only by the guard's factor std / -dt."""
    t = moved(0.0)
    gradients = {}
    for name, objective in {
        "grpo": clipped_objective(t["new"], t["old"], t["advantages"], LOW),
        "guard": guard(t, LOW),
        "dppo": masked_objective(t["new"], t["old"], t["advantages"], t["kl"], 1e-12),
    }.items():
        torch.testing.assert_close(objective.ratio, torch.ones(6, dtype=torch.float64), rtol=0, atol=0)
        assert objective.statistics["ratio/max_deviation"] == 0
        assert objective.statistics["clip_ratio/region_mean"] == 0
        (gradients[name],) = torch.autograd.grad(objective.losses.sum(), t["means"], retain_graph=True)
    torch.testing.assert_close(gradients["dppo"], gradients["grpo"], rtol=0, atol=0)
    factor = (t["stds"] / -t["dts"])[:, None, None]
    torch.testing.assert_close(gradients["guard"], gradients["grpo"] * factor, rtol=1e-12, atol=0)


def test_weighted():
    objective = some_objective(4)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.5], dtype=torch.float64)
    weighted = objective.weighted(weights)
    assert torch.equal(weighted.losses, objective.losses * weights)
    assert weighted.ratio is objective.ratio and weighted.statistics is objective.statistics
