"""Transitions against formulas written a second time, in float64 and in other terms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_mixgrpo.core.transitions import (
    SDE_TYPES,
    Transitions,
    gaussian_kl,
    gaussian_log_prob,
    predict_noise,
    predict_x0,
    sde_transition,
)


SHAPES = [(1, 6, 8), (3, 6, 8), (2, 4, 3, 5), (2, 4, 2, 3, 5)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def static_shift(steps: int, shift: float = 3.0) -> list[float]:
    times = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def dynamic_shift(steps: int, mu: float) -> list[float]:
    return [1 / (1 + math.exp(-mu) * (1 / t - 1)) for t in [1 - i / steps for i in range(steps)]] + [0.0]


def reference(
    sde_type: str, v: torch.Tensor, x: torch.Tensor, sigma: float, sigma_next: float, eta: float, second: float
):
    """Mean and std in the textbook's terms: scores, log-SNRs and the interpolation of data and noise."""
    data = x - v * sigma
    noise = x + v * (1 - sigma)
    if sde_type in ("flow", "dance"):
        # dx = (v - g^2/2 score) dt + g dw, run from sigma down to sigma_next
        score = -noise / sigma
        if sde_type == "flow":
            g = eta * math.sqrt(sigma / (1 - (second if sigma == 1 else sigma)))
        else:
            g = eta
        return x - (sigma - sigma_next) * (v - g * g / 2 * score), g * math.sqrt(sigma - sigma_next)
    if sde_type == "cps":
        kept, fresh = math.cos(math.pi * eta / 2), math.sin(math.pi * eta / 2)
        return (1 - sigma_next) * data + sigma_next * kept * noise, sigma_next * fresh
    if sigma == 1:
        return (1 - sigma_next) * data, sigma_next
    if sigma_next == 0:
        return data, 0.0
    h = math.log((1 - sigma_next) / sigma_next) - math.log((1 - sigma) / sigma)
    std = sigma_next * math.sqrt(-math.expm1(-2 * h))
    return sigma_next / sigma * math.exp(-h) * x - (1 - sigma_next) * math.expm1(-2 * h) * data, std


def transition(sde_type, v, x, sigma, sigma_next, eta, second):
    sigma, sigma_next, second = (torch.tensor(s, dtype=torch.float64) for s in (sigma, sigma_next, second))
    return sde_transition(sde_type, v, x, sigma, sigma_next, eta, second)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("steps", [2, 3, 7, 25])
@pytest.mark.parametrize("schedule", [static_shift, lambda n: dynamic_shift(n, 0.5), lambda n: dynamic_shift(n, 1.15)])
def test_closed_form_at_every_step(sde_type, steps, schedule):
    generator = torch.Generator().manual_seed(steps)
    sigmas = schedule(steps)
    for shape in SHAPES:
        for eta in (0.3, 0.7, 1.0):
            for sigma, sigma_next in zip(sigmas[:-2], sigmas[1:-1], strict=True):
                v, x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
                mean, std = transition(sde_type, v, x, sigma, sigma_next, eta, sigmas[1])
                mean_, std_ = reference(sde_type, v, x, sigma, sigma_next, eta, sigmas[1])
                assert mean.dtype == std.dtype == torch.float64
                assert mean.shape == shape and std.shape == ()
                assert (mean - mean_).abs().max() < 1e-10
                assert abs(std.item() - std_) < 1e-10
                assert std > 0


levels = st.floats(1e-3, 0.999)


@given(levels, levels, st.floats(0.01, 1.0), st.sampled_from(SDE_TYPES))
@settings(max_examples=200, deadline=None)
def test_closed_form_between_any_two_levels(a, b, eta, sde_type):
    sigma_next, sigma = sorted((a, b))
    if sigma - sigma_next > 1e-4:
        v, x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mean, std = transition(sde_type, v, x, sigma, sigma_next, eta, 0.99)
        mean_, std_ = reference(sde_type, v, x, sigma, sigma_next, eta, 0.99)
        torch.testing.assert_close(mean, mean_, rtol=1e-10, atol=1e-10)
        assert std.item() == pytest.approx(std_, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_finite_at_pure_noise(sde_type):
    for dtype in (torch.float32, torch.float64):
        v, x = (torch.randn(2, 4, 4, dtype=dtype, requires_grad=True) for _ in range(2))
        one, following = torch.ones((), dtype=dtype), torch.tensor(0.96, dtype=dtype)
        mean, std = sde_transition(sde_type, v, x, one, following, 0.7, following)
        log_prob = gaussian_log_prob(mean.detach() + 0.1, mean, std)
        log_prob.sum().backward()
        for tensor in (mean, std, log_prob, v.grad, x.grad):
            assert tensor.isfinite().all()


def test_sde_dpm_at_one_is_the_limit():
    v, x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at_one = transition("dpm", v, x, 1.0, 0.9, 0.7, 0.9)
    close = transition("dpm", v, x, 1 - 1e-9, 0.9, 0.7, 0.9)
    for a, b in zip(at_one, close, strict=True):
        assert (a - b).abs().max() < 1e-7


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_one_batch_of_many_steps_is_each_step_alone(sde_type):
    sigmas = torch.tensor(static_shift(25)).float()
    transitions = Transitions(
        sde_type, 0.7, sigmas=sigmas[3:9], next_sigmas=sigmas[4:10], sigma_max=sigmas[1], timesteps=1000 * sigmas[3:9]
    )
    assert len(transitions) == 6
    steps = torch.tensor([5, 0, 3, 3, 1, 2, 4, 0, 5])
    v, x, z = torch.randn(3, len(steps), 16, 8, generator=torch.Generator().manual_seed(0))
    mean, std = transitions.mean_and_std(v, x, steps)
    assert mean.shape == x.shape and std.shape == (len(steps), 1, 1)
    y = mean + std * z
    log_prob = gaussian_log_prob(y, mean, std)
    for row, step in enumerate(steps.tolist()):
        one = slice(row, row + 1)
        alone, alone_std = sde_transition(
            sde_type, v[one], x[one], sigmas[3 + step], sigmas[4 + step], 0.7, sigma_max=sigmas[1]
        )
        # Arithmetic and square roots are rounded correctly by IEEE 754: the coefficients are the same bits.
        assert torch.equal(std[row].squeeze(), alone_std)
        assert (mean[one] - alone).abs().max() <= 1e-5 * alone.abs().max()
        torch.testing.assert_close(log_prob[one], gaussian_log_prob(y[one], alone, alone_std), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_transitions_of_latents_of_any_shape(shape):
    generator = torch.Generator().manual_seed(1)
    sigmas = torch.tensor(static_shift(10), dtype=torch.float64)
    transitions = Transitions("flow", 0.7, sigmas[:4], sigmas[1:5], sigmas[1], 1000 * sigmas[:4])
    v, x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    steps = torch.arange(len(x)) % 4
    mean, std = transitions.mean_and_std(v, x, steps)
    assert std.shape == (len(x), *[1] * (len(shape) - 1))
    for row, step in enumerate(steps.tolist()):
        expected, expected_std = reference(
            "flow", v[row], x[row], float(sigmas[step]), float(sigmas[step + 1]), 0.7, float(sigmas[1])
        )
        torch.testing.assert_close(mean[row], expected, rtol=1e-10, atol=1e-10)
        assert std[row].item() == pytest.approx(expected_std, rel=1e-10)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_float32_or_better(sde_type, dtype):
    v, x = torch.randn(2, 2, 8, 8).to(dtype)
    sigma, sigma_next, second = torch.tensor([0.8, 0.7, 0.95])
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = sde_transition(sde_type, v, x, sigma, sigma_next, 0.7, second)
    mean_, _ = sde_transition(sde_type, v.double(), x.double(), sigma, sigma_next, 0.7, second)
    assert mean.dtype == std.dtype == expected_dtype
    # Nothing was rounded to the dtype of the inputs on the way: bfloat16 and float16 would be off by 4e-3 and 5e-4.
    assert (mean - mean_).abs().max() < 2e-5
    for result in (gaussian_log_prob(x, mean, std), gaussian_kl(mean, x, std), predict_x0(v, x, sigma)):
        assert result.dtype == expected_dtype


def test_predictions():
    noise, data = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)[:, None, None]
    x, v = (1 - sigma) * data + sigma * noise, noise - data
    torch.testing.assert_close(predict_x0(v, x, sigma), data)
    torch.testing.assert_close(predict_noise(v, x, sigma), noise)


def test_cps_keeps_the_amounts_of_data_and_noise():
    noise, data = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    x, v = 0.2 * data + 0.8 * noise, noise - data
    mean, std = transition("cps", v, x, 0.8, 0.6, 0.7, 0.9)
    kept = (mean - 0.4 * data) / noise
    torch.testing.assert_close(kept**2 + std**2, torch.full_like(x, 0.36))


@pytest.mark.parametrize("sde_type", ["flow", "dance", "dpm"])
def test_small_steps_move_the_mean_like_the_ode_plus_score(sde_type):
    # The SDE's drift is v dt + s^2/2 * (-score) dt with s^2 = std^2 / |dt|, for each kind.
    v, x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    sigma, step = 0.6, 1e-6
    mean, std = transition(sde_type, v, x, sigma, sigma - step, 0.5, 0.9)
    drift = (x - mean) / step
    noise = x + (1 - sigma) * v
    expected = v + (std**2 / step) / (2 * sigma) * noise
    torch.testing.assert_close(drift, expected, rtol=1e-4, atol=1e-4)


def test_log_prob_is_the_mean_of_the_density():
    sample, mean = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    std = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)[:, None, None]
    expected = torch.distributions.Normal(mean, std).log_prob(sample).mean(dim=(1, 2))
    torch.testing.assert_close(gaussian_log_prob(sample, mean, std), expected, rtol=1e-12, atol=1e-12)


def test_kl():
    mean, mean_ref = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    std = torch.tensor(0.4, dtype=torch.float64)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(mean_ref, std)
    )
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std), exact.mean(dim=(1, 2)), rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    samples = mean + std * torch.randn(1000, *mean.shape, generator=generator, dtype=torch.float64)
    estimate = torch.stack([gaussian_log_prob(s, mean, std) - gaussian_log_prob(s, mean_ref, std) for s in samples])
    error = estimate.std(0) / math.sqrt(len(estimate))
    assert ((estimate.mean(0) - gaussian_kl(mean, mean_ref, std)).abs() < 5 * error).all()
    assert gaussian_kl(mean, mean, std).eq(0).all()


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_gradients(sde_type, sigma):
    v, x, y = (torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def log_prob(v, x, y):
        return gaussian_log_prob(y, *transition(sde_type, v, x, sigma, 0.5, 0.7, 0.95))

    assert torch.autograd.gradcheck(log_prob, (v, x, y))


def test_unknown_kind():
    v, x = torch.randn(2, 1, 2, 2)
    sigma = torch.tensor(0.5)
    with pytest.raises(ValueError, match="`sde_type` must be one of 'flow', 'dance', 'cps', 'dpm', got 'ode'"):
        sde_transition("ode", v, x, sigma, sigma / 2, 0.7, sigma)
