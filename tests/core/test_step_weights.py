"""Sensitivities of the steps against autograd and closed forms in float64, and the weights made of them."""

import math

import pytest
import torch

from diffusers_mixgrpo.core.step_weights import STEP_WEIGHTINGS, step_weights
from diffusers_mixgrpo.core.transitions import (
    SDE_TYPES,
    Transitions,
    gaussian_kl,
    gaussian_log_prob,
    velocity_kl,
)


ETAS = {"flow": 0.7, "dance": 0.3, "cps": 0.5, "dpm": 1.0}


def all_steps(sde_type: str, steps: int = 25, shift: float = 3.0, eta: float | None = None) -> Transitions:
    """All steps but the last of a statically shifted schedule, in float64."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = shift * times / (1 + (shift - 1) * times)
    return Transitions(
        sde_type=sde_type,
        eta=ETAS[sde_type] if eta is None else eta,
        sigmas=sigmas[:-2],
        next_sigmas=sigmas[1:-1],
        sigma_max=sigmas[1],
        timesteps=sigmas[:-2] * 1000,
    )


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_sensitivities_against_autograd(sde_type):
    transitions = all_steps(sde_type)
    count = len(transitions)
    generator = torch.Generator().manual_seed(0)
    sample, velocity, noise = torch.randn(3, count, 4, 6, generator=generator, dtype=torch.float64)
    velocity.requires_grad_()
    means, stds = transitions.mean_and_std(velocity, sample, torch.arange(count))
    (coefficients,) = torch.autograd.grad(means.sum(), velocity, retain_graph=True)
    expected = transitions.velocity_coefficients()[:, None, None].expand_as(coefficients)
    torch.testing.assert_close(coefficients, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(transitions.stds(), stds.flatten().detach(), rtol=1e-12, atol=0)

    # The gradient of a log-prob is noise * g / n: this is what the sensitivity is the scale of.
    log_probs = gaussian_log_prob((means + stds * noise).detach(), means, stds)
    (gradient,) = torch.autograd.grad(log_probs.sum(), velocity)
    scale = gradient.square().sum((1, 2)).sqrt() / noise.square().sum((1, 2)).sqrt() * 24
    torch.testing.assert_close(scale, transitions.sensitivities(), rtol=1e-9, atol=0)


def closed_form(transitions: Transitions) -> torch.Tensor:
    sigma, after, eta = transitions.sigmas, transitions.next_sigmas, transitions.eta
    length = sigma - after
    if transitions.sde_type in ("flow", "dance"):
        s = torch.full_like(sigma, eta)
        if transitions.sde_type == "flow":
            s = eta * (sigma / (1 - torch.where(sigma == 1, transitions.sigma_max, sigma))).sqrt()
        return length.sqrt() / s + s * length.sqrt() * (1 - sigma) / (2 * sigma)
    if transitions.sde_type == "cps":
        cosine, sine = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
        return ((1 - after) * sigma - after * cosine * (1 - sigma)).abs() / (after * sine)
    decay = after * (1 - sigma) / (sigma * (1 - after))  # e^{-h}
    return (1 - after) * (1 - decay**2).sqrt() * sigma / after


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_sensitivities_in_closed_form(sde_type):
    transitions = all_steps(sde_type)
    torch.testing.assert_close(transitions.sensitivities(), closed_form(transitions), rtol=1e-9, atol=0)


def test_growth_over_a_sweep():
    sensitivities = all_steps("flow").sensitivities()
    assert float(sensitivities[-1] / sensitivities[0]) == pytest.approx(55.07, abs=0.01)
    flat = sensitivities * step_weights("rectified", all_steps("flow"), range(24))
    torch.testing.assert_close(flat, flat[:1].expand(24), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", STEP_WEIGHTINGS)
@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("trained", [range(24), range(16), (3, 4, 5, 9)])
def test_weights_have_mean_one_over_the_trained_steps(sde_type, weighting, trained):
    transitions = all_steps(sde_type)
    weights = step_weights(weighting, transitions, trained)
    assert weights.shape == (24,) and bool((weights > 0).all())
    assert float(weights[list(trained)].mean()) == pytest.approx(1, rel=1e-12)
    scales = {"none": torch.ones(24), "rectified": 1 / closed_form(transitions), "noise": transitions.stds()}
    expected = scales[weighting].to(weights)
    torch.testing.assert_close(weights / weights[0], expected / expected[0], rtol=1e-9, atol=0)


def test_unknown_weighting():
    with pytest.raises(ValueError, match="`step_weighting` must be one of 'none', 'rectified', 'noise', got 'flat'"):
        step_weights("flat", all_steps("flow"), range(24))


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_velocity_kl(sde_type):
    transitions = all_steps(sde_type)
    steps = torch.arange(len(transitions))
    generator = torch.Generator().manual_seed(1)
    sample, velocity, reference = torch.randn(3, len(steps), 4, 6, generator=generator, dtype=torch.float64)
    means, stds = transitions.mean_and_std(velocity, sample, steps)
    reference_means, _ = transitions.mean_and_std(reference, sample, steps)
    coefficients = transitions.velocity_coefficients()[:, None, None]
    found = velocity_kl(means, reference_means, coefficients)
    torch.testing.assert_close(found, (velocity - reference).square().mean((1, 2)), rtol=1e-8, atol=0)
    # The divergence of the transitions is the same, times half the squared sensitivity.
    expected = found * transitions.sensitivities() ** 2 / 2
    torch.testing.assert_close(gaussian_kl(means, reference_means, stds), expected, rtol=1e-8, atol=0)
