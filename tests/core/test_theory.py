"""
The claims of docs/theory.md, on Gaussian data, where everything has a known answer.

The law of the final sample is propagated exactly through the scheduler's own steps, and expectations of polynomials
are taken by Gauss-Hermite quadrature, so most of these tests have no statistical error. The others have fixed seeds
and tolerances of 4.5 standard errors.
"""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_mixgrpo import Conditioning, compute_advantages, gaussian_kl, sample_trajectories
from diffusers_mixgrpo.core.objectives import clipped_objective


spec = importlib.util.spec_from_file_location(
    "theory_plots", Path(__file__).parents[2] / "examples" / "studies" / "theory_plots.py"
)
theory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theory)

ETA = theory.ETA
CONVERGING = ["flow", "dance", "dpm"]
SIGMAS = 4.5  # of a statistical tolerance: one false alarm in 150,000 comparisons


def run_law(steps, start=0, size=0, kind="flow", flow=None, **config):
    config = {"eta": ETA[kind]} | config
    flow = flow or theory.gaussian_2d()
    return theory.final_law(theory.make_scheduler(steps, start, size, sde_type=kind, **config), flow)


def error(*args, flow=None, **kwargs) -> float:
    flow = flow or theory.gaussian_2d()
    return float((run_law(*args, flow=flow, **kwargs)[1] - flow.cov).norm() / flow.cov.norm())


def excess(steps, *args, **kwargs) -> float:
    """How far the window takes the covariance from that of the ODE sampler with as many steps."""
    solver = {name: kwargs[name] for name in ("ode_solver", "shift") if name in kwargs}
    return float((run_law(steps, *args, **kwargs)[1] - run_law(steps, **solver)[1]).norm())


def order(coarse: float, fine: float) -> float:
    """For a doubling of the steps."""
    return math.log2(coarse / fine)


# ---- The sampler's distribution ----


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_the_velocity_carries_the_gaussian_path(sigma):
    # A linear velocity K x carries covariances by P' = K P + P K^T: of the path, that is a derivative by sigma.
    flow, h = theory.gaussian_2d(), 1e-5
    origin = flow.velocity(torch.zeros(1, 2, dtype=torch.float64), sigma)
    gain = flow.velocity(torch.eye(2, dtype=torch.float64), sigma) - origin
    derivative = (flow.marginal_cov(sigma + h) - flow.marginal_cov(sigma - h)) / (2 * h)
    P = flow.marginal_cov(sigma)
    torch.testing.assert_close(gain.T @ P + P @ gain, derivative, rtol=0, atol=1e-8)
    torch.testing.assert_close(flow.velocity((1 - sigma) * flow.mean[None], sigma)[0], -flow.mean)


@pytest.mark.parametrize("kind", ETA)
def test_the_mean_is_exact_for_any_number_of_steps(kind):
    for steps, start, size in ((2, 0, 1), (5, 0, "all"), (8, 3, 2), (25, 0, 4), (25, 20, 4)):
        mean, _, _ = run_law(steps, start, size, kind, shift=3.0)
        torch.testing.assert_close(mean, theory.gaussian_2d().mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ETA)
def test_sampling_agrees_with_the_propagated_law(kind):
    flow, count, generator = theory.gaussian_2d(), 20000, torch.Generator().manual_seed(0)
    mean, cov, _ = run_law(10, 3, 4, kind, shift=3.0)
    scheduler = theory.make_scheduler(10, 3, 4, sde_type=kind, eta=ETA[kind], shift=3.0)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(flow.velocity(x, sigma), t, x, generator=generator).prev_sample
    variances = cov.diag()
    assert ((x.mean(0) - mean).abs() < SIGMAS * (variances / count).sqrt()).all()
    cov_errors = ((variances[:, None] * variances + cov**2) / count).sqrt()
    assert ((x.T.cov() - cov).abs() < SIGMAS * cov_errors).all()
    assert (cov_errors < 0.02 * cov.norm()).all()


@pytest.mark.parametrize(
    # A fifth of the steps, at each of the 16 positions of a window of 4 in 20 steps. `flow` at 0 has its own test.
    "kind,place",
    [(kind, place) for kind in CONVERGING for place in range(16) if (kind, place) != ("flow", 0)],
)
def test_every_window_of_a_share_of_the_steps_converges_at_order_one(kind, place):
    errors = [error(20 * n, place * n, 4 * n, kind) for n in (4, 8)]
    assert 0.85 < order(*errors) < 1.2
    assert errors[1] < 0.06


@pytest.mark.parametrize("kind", ["dance", "dpm"])
def test_all_steps_converge_at_order_one(kind):
    errors = [error(steps, 0, "all", kind) for steps in (100, 200, 400)]
    assert 0.9 < order(*errors[1:]) < 1.1
    assert errors[2] < 0.02


@pytest.mark.parametrize("kind", CONVERGING)
@pytest.mark.parametrize("place", [0.25, 0.5, 0.75])
def test_a_fixed_window_adds_a_term_of_second_order(kind, place):
    # Not more steps: diffusers' Euler step rounds samples to float32, which is as large as dance's excess at 640.
    values = [excess(steps, int(place * steps), 4, kind) for steps in (80, 160)]
    assert 1.7 < order(*values) < 2.2


@pytest.mark.parametrize("kind", ["dance", "cps", "dpm"])
def test_a_fixed_window_at_the_first_steps_of_the_other_kinds(kind):
    values = [excess(steps, 0, 4, kind) for steps in (40, 80)]
    assert 1.7 < order(*values) < 2.3


@pytest.mark.parametrize("kind", CONVERGING)
def test_a_fixed_window_keeps_the_order_of_the_solver_and_a_share_does_not(kind):
    fixed = [error(steps, steps // 4, 4, kind, ode_solver="unipc") for steps in (80, 160, 320)]
    share = [error(steps, steps // 4, steps // 4, kind, ode_solver="unipc") for steps in (80, 160, 320)]
    assert 1.8 < order(*fixed[1:]) < 2.2
    assert 0.8 < order(*share[1:]) < 1.3
    assert fixed[2] < share[2] / 3


@pytest.mark.parametrize(
    "start,size,eta,shift", [(0, 4, 0.7, 1.0), (0, 4, 0.7, 3.0), (2, 4, 0.7, 1.0), (0, 1, 1.0, 1.0)]
)
def test_flow_at_the_first_steps_keeps_a_known_excess_at_any_step_count(start, size, eta, shift):
    coarse, fine = (excess_of(steps, start, size, eta, shift) for steps in (300, 600))
    expected = theory.flow_excess(start, size, eta) * theory.gaussian_2d().cov
    torch.testing.assert_close(2 * fine - coarse, expected, rtol=0, atol=4e-3 * float(expected.norm()))


def excess_of(steps, start, size, eta, shift) -> torch.Tensor:
    return run_law(steps, start, size, "flow", eta=eta, shift=shift)[1] - run_law(steps, shift=shift)[1]


@pytest.mark.parametrize("eta", [0.5, 0.7])
def test_flow_on_all_steps_converges_at_order_eta_squared(eta):
    # The error is a T^(-eta^2) + b / T, of opposite signs; 2 e(2T) - e(T) is rid of the second term.
    flow = theory.gaussian_1d()
    errors = [float(run_law(steps, 0, "all", "flow", flow, eta=eta)[1]) - 0.16 for steps in (100, 200, 400, 800)]
    rest = [2 * fine - coarse for coarse, fine in itertools.pairwise(errors)]
    assert order(rest[1], rest[2]) == pytest.approx(eta**2, abs=0.02)


@pytest.mark.parametrize(
    "kind,eta,stds", [("cps", 0.3, (0.337, 0.380, 0.386)), ("flow", 0.7, (0.368, 0.3965, 0.3994))]
)
def test_wide_windows_of_std_04(kind, eta, stds):
    for steps, std in zip((25, 200, 800), stds, strict=True):
        _, cov, _ = run_law(steps, 0, "all", kind, theory.gaussian_1d(), eta=eta, shift=3.0)
        assert math.sqrt(cov) == pytest.approx(std, abs=5e-4)


@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_cps_on_all_steps_shrinks_the_spread_by_a_known_factor(eta):
    flow, limit = theory.gaussian_1d(), math.cos(eta * math.pi / 4)
    gaps = [math.sqrt(run_law(steps, 0, "all", "cps", flow, eta=eta)[1]) / 0.4 - limit for steps in (50, 200, 800)]
    assert abs(gaps[2]) < 0.006 and abs(gaps[2]) < abs(gaps[1]) / 2 < abs(gaps[0]) / 4
    assert 1 - limit > 4 * abs(gaps[2])  # the limit is not 1


@pytest.mark.parametrize("size", [1, 4])
def test_cps_in_a_fixed_window_keeps_a_known_deficit(size):
    flow, sigma, cos = theory.gaussian_1d(), 0.5, math.cos(0.7 * math.pi / 2)
    marginal = float(flow.marginal_cov(sigma))
    slope = (sigma**2 * cos + (1 - sigma) ** 2 * 0.16) / marginal
    variance = marginal
    for _ in range(size):
        variance = slope**2 * variance + sigma**2 * (1 - cos**2)
    coarse, fine = (float(run_law(steps, steps // 2, size, "cps", flow)[1]) for steps in (200, 400))
    assert (2 * fine - coarse) / 0.16 == pytest.approx(variance / marginal, abs=1e-3)
    assert variance / marginal < 0.98


# ---- The windowed gradient ----


def quadrature(dimensions: int, nodes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Points `(N, dimensions)` and weights `(N,)` of the standard normal, exact to degree 5 in each dimension."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    grid = torch.tensor(list(itertools.product(points, repeat=dimensions)), dtype=torch.float64)
    weight = torch.tensor(list(itertools.product(weights / weights.sum(), repeat=dimensions)), dtype=torch.float64)
    return grid, weight.prod(1)


def some_theta(steps: int, d: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.2 * torch.randn(steps, d + d * d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", ETA)
@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_windowed_gradient_is_that_of_expected_reward_by_the_windows_steps(kind, start):
    flow, reward, theta = theory.gaussian_2d(), theory.reward_2d(), some_theta(5)

    def scheduler():
        return theory.make_scheduler(5, start, 2, sde_type=kind, eta=ETA[kind], shift=3.0)

    points, weights = quadrature(6)
    samples, scores = theory.sample_scores(
        scheduler(), flow, theta, initial=points[:, :2], noise=points[:, 2:].reshape(-1, 2, 2)
    )
    estimate = torch.einsum("n,n,nsp->sp", weights, reward(samples), scores)
    exact = theory.expected_gradient(scheduler(), flow, reward, theta)
    inside = exact[start : start + 2]
    torch.testing.assert_close(estimate, inside, rtol=0, atol=2e-5 * float(inside.abs().max()))
    # The other steps matter as well, and the estimate does not see them.
    outside = torch.cat([exact[:start], exact[start + 2 :]])
    assert outside.norm() > 0.3 * inside.norm()


@pytest.mark.parametrize("kind", ETA)
def test_the_exact_gradient_against_finite_differences_with_common_random_numbers(kind):
    # Of one parameter vector that all of the window's steps share
    flow, reward, theta, h = theory.gaussian_2d(), theory.reward_2d(), some_theta(6), 1e-2
    points, weights = quadrature(6)

    def scheduler():
        return theory.make_scheduler(6, 2, 2, sde_type=kind, eta=ETA[kind])

    def mean_reward(change: torch.Tensor) -> float:
        moved = theta.clone()
        moved[2:4] += change
        samples, _ = theory.sample_scores(scheduler(), flow, moved, points[:, :2], points[:, 2:].reshape(-1, 2, 2))
        return float(weights @ reward(samples))

    exact = theory.expected_gradient(scheduler(), flow, reward, theta)[2:4].sum(0)
    for k, unit in enumerate(torch.eye(6, dtype=torch.float64)):
        difference = (mean_reward(h * unit) - mean_reward(-h * unit)) / (2 * h)
        # Rewards are of degree 4 in theta: central differences err by O(h^2)
        assert difference == pytest.approx(float(exact[k]), abs=1e-4 * float(exact.norm()))


def test_the_group_mean_scales_the_gradient_by_g_minus_1_over_g():
    # A pair from one initial noise, so there is no statistical error.
    flow, theta = theory.gaussian_1d(0.5, mean=0.7), some_theta(5, d=1)
    reward = theory.QuadraticReward(torch.tensor([1.0], dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    points, weights = quadrature(5)
    runs = [
        theory.sample_scores(theory.make_scheduler(5, 1, 2), flow, theta, points[:, :1], noise.unsqueeze(-1))
        for noise in (points[:, 1:3], points[:, 3:5])
    ]
    rewards = torch.stack([reward(samples) for samples, _ in runs], dim=1)
    advantages = rewards - rewards.mean(1, keepdim=True)
    estimate = sum(torch.einsum("n,n,nsp->sp", weights, advantages[:, g], runs[g][1]) for g in range(2)) / 2
    exact = theory.expected_gradient(theory.make_scheduler(5, 1, 2), flow, reward, theta)[1:3]
    torch.testing.assert_close(estimate, exact / 2, rtol=0, atol=2e-5 * float(exact.abs().max()))


class LinearPolicy:
    """The analytic velocity plus a perturbation by `theta`, shared by all steps."""

    def __init__(self, theta: torch.Tensor) -> None:
        self.flow = theory.gaussian_2d()
        self.theta = theta

    def prepare_scheduler(self, scheduler) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8).tolist())

    def velocity(self, latents, timesteps, conditioning, transformer=None):
        sigmas = torch.as_tensor(timesteps, dtype=torch.float64).expand(len(latents)) / 1000
        velocity = torch.zeros_like(latents)
        for sigma in sigmas.unique():
            rows = sigmas == sigma
            velocity[rows] = self.flow.velocity(latents[rows], sigma)
        return velocity + theory.perturbation(self.theta, latents)


def test_rollout_replay_and_advantages_together_give_the_exact_gradient():
    start, size, groups, group_size, batches = 2, 3, 400, 4, 40
    reward = theory.reward_2d()
    scheduler = theory.make_scheduler(8, start, size)
    exact = theory.expected_gradient(
        theory.make_scheduler(8, start, size), theory.gaussian_2d(), reward, torch.zeros(8, 6, dtype=torch.float64)
    )[start : start + size].sum(0)
    generator, gradients = torch.Generator().manual_seed(0), []
    for _ in range(batches):
        theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        policy = LinearPolicy(theta)
        prompts = Conditioning(rows={"prompt": torch.arange(groups)})
        noise = torch.randn(groups, 2, generator=generator, dtype=torch.float64)
        trajectory = sample_trajectories(policy, scheduler, prompts, noise, group_size, generator)
        rewards = reward(trajectory.latents).view(1, groups, group_size)
        advantages = compute_advantages(rewards, scale_rewards="none", clip=None).flatten().double()
        images, steps = trajectory.transition_indices()
        replay = trajectory.replay(policy, images, steps)
        objective = clipped_objective(
            replay.log_probs, trajectory.log_probs[images, steps], advantages[images], epsilon=1e-4
        )
        gradients.append(torch.autograd.grad(objective.losses.mean(), theta)[0])
    # The loss is a mean over the window's steps and its log-probs are means over two elements.
    mean, standard_error = theory.mean_and_error(-torch.stack(gradients) * size * 2 * group_size / (group_size - 1))
    assert ((mean - exact).abs() < SIGMAS * standard_error).all()
    assert standard_error.norm() < 0.1 * exact.norm()


def test_normalizing_by_the_std_ignores_the_rewards_scale_and_still_points_uphill():
    flow, reward, theta = theory.gaussian_2d(), theory.reward_2d(), torch.zeros(25, 6, dtype=torch.float64)
    exact = theory.expected_gradient(theory.make_scheduler(25, 8, 4, shift=3.0), flow, reward, theta)[8:12].sum(0)
    scheduler = theory.make_scheduler(25, 8, 4, shift=3.0)
    rewards, scores = theory.sample_groups(scheduler, flow, reward, theta, 1000, 12, seed=0)
    advantages = theory.group_normalize(rewards)
    torch.testing.assert_close(theory.group_normalize(10 * rewards), advantages, rtol=1e-6, atol=1e-6)
    along, error_along = theory.mean_and_error((advantages.unsqueeze(-1) * scores.sum(2)).mean(1) @ exact)
    assert along > 10 * error_along
    # Its length is the gradient's over a std, which is below 1 here: it is not the gradient of expected reward.
    assert along / exact.square().sum() > 2


def test_noise_in_fewer_steps_makes_less_noise_in_an_early_windows_gradient():
    flow, reward, theta = theory.gaussian_2d(), theory.reward_2d(), torch.zeros(25, 6, dtype=torch.float64)
    image_counts = []
    for size in (4, "all"):
        exact = theory.expected_gradient(theory.make_scheduler(25, 0, size, shift=3.0), flow, reward, theta)
        scheduler = theory.make_scheduler(25, 0, size, shift=3.0)
        rewards, scores = theory.sample_groups(scheduler, flow, reward, theta, 1500, 12, seed=1)
        image_counts.append(theory.signal_to_noise(rewards, scores[:, :, :4].sum(2), exact[:4].sum(0))[:2])
    (few, few_error), (many, many_error) = image_counts
    assert many - few > SIGMAS * math.hypot(few_error, many_error)
    assert many > 2.5 * few


def test_the_sum_of_the_windows_is_nearly_the_gradient_of_the_ode_sampler():
    flow, reward, theta = theory.gaussian_2d(), theory.reward_2d(), torch.zeros(25, 6, dtype=torch.float64)

    def gradient(start, size):
        return theory.expected_gradient(theory.make_scheduler(25, start, size, shift=3.0), flow, reward, theta)

    ode = gradient(0, 0).sum(0)
    windows = [gradient(start, 4)[start : start + 4].sum(0) for start in range(0, 24, 4)]
    assert theory.cosine(sum(windows), ode) > 0.998
    assert theory.cosine(gradient(0, "all")[:24].sum(0), ode) < theory.cosine(sum(windows), ode)
    assert theory.cosine(windows[0], ode) < 0.9  # one window alone points elsewhere


# ---- KL ----


def pair_of_velocities(elements: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, velocity, direction = torch.randn(3, 1, elements, generator=generator, dtype=torch.float64)
    return x, velocity, velocity + 0.4 * direction


@pytest.mark.parametrize("kind", ETA)
def test_the_exact_kl_is_the_mean_log_ratio_over_opposite_noises(kind):
    # The log-ratio is linear in the noise, so a noise and its opposite average to the KL without any error.
    x, velocity, other = pair_of_velocities()
    scheduler = theory.make_scheduler(25, 0, "all", sde_type=kind, eta=ETA[kind], shift=3.0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for i in scheduler.window:
        mean, std = scheduler.transition(velocity, x, i)
        ratios = [
            scheduler.log_prob(velocity, x, mean + std * z, i) - scheduler.log_prob(other, x, mean + std * z, i)
            for z in (noise, -noise)
        ]
        exact = gaussian_kl(mean, scheduler.transition(other, x, i)[0], std)
        torch.testing.assert_close(sum(ratios) / 2, exact, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", ETA)
@pytest.mark.parametrize("step", [8, 23])
def test_the_exact_kl_against_a_monte_carlo_estimate(kind, step):
    x, velocity, other = pair_of_velocities()
    scheduler = theory.make_scheduler(25, 0, "all", sde_type=kind, eta=ETA[kind], shift=3.0)
    mean, std = scheduler.transition(velocity, x, step)
    noise = torch.randn(20000, x.shape[1], generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    drawn = mean + std * noise
    ratios = scheduler.log_prob(velocity, x, drawn, step) - scheduler.log_prob(other, x, drawn, step)
    estimate, standard_error = theory.mean_and_error(ratios)
    exact = gaussian_kl(mean, scheduler.transition(other, x, step)[0], std)
    assert abs(estimate - exact) < SIGMAS * standard_error
    assert standard_error < 0.1 * exact


# ---- The figures ----


def test_the_figures_are_drawn(tmp_path, capsys):
    theory.draw_windows(str(tmp_path), iterations=60)
    theory.draw_window_position(str(tmp_path))
    theory.draw_gradient(str(tmp_path), groups=60)
    theory.draw_kl(str(tmp_path), samples=20)
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert "| progressive | 525 |" in capsys.readouterr().out
