"""
Figures and numbers of docs/theory.md and docs/windows.md, on a problem with a known answer: Gaussian data.

    python examples/studies/theory_plots.py --output docs/images

For Gaussian data the velocity field is linear, so every step of [`MixedODESDEScheduler`] is an affine map plus
Gaussian noise, and one run of the scheduler on unit vectors gives the law of the final sample. There is no network,
and no sampling except where stated. Takes about half a minute on one core.

Shapes: `d` latent elements, `T` steps, `S` stochastic steps, `p = d + d * d` parameters, `P` groups of `G` samples.
"""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from diffusers_mixgrpo import MixedODESDEScheduler, WindowSchedule, gaussian_kl
from diffusers_mixgrpo.core.advantages import group_normalize
from diffusers_mixgrpo.core.step_weights import step_weights


# Kind of SDE -> the noise level that its authors use
ETA = {"flow": 0.7, "dance": 0.3, "cps": 0.7, "dpm": 0.7}
# Paul Tol's bright color scheme, safe for color-blind readers. Line styles and markers also distinguish the kinds.
STYLE = {
    "ODE": {"color": "#000000", "linestyle": "-", "marker": ""},
    "flow": {"color": "#4477aa", "linestyle": "-", "marker": "o"},
    "dance": {"color": "#228833", "linestyle": "--", "marker": "s"},
    "cps": {"color": "#ee6677", "linestyle": "-.", "marker": "^"},
    "dpm": {"color": "#aa3377", "linestyle": ":", "marker": "D"},
}
# A forward and backward pass costs about three forward passes.
TRAINING_PASSES = 3


@dataclass(frozen=True)
class GaussianFlow:
    r"""
    The rectified flow of Gaussian data, \\(x_0 \sim N(m, C)\\).

    Args:
        mean (`torch.Tensor` of shape `(d,)`): \\(m\\), float64.
        cov (`torch.Tensor` of shape `(d, d)`): \\(C\\), float64, positive definite.
    """

    mean: Tensor
    cov: Tensor

    def marginal_cov(self, sigma: Tensor | float) -> Tensor:
        r"""\\(P_\sigma = (1 - \sigma)^2 C + \sigma^2 I\\), of shape `(d, d)`."""
        return (1 - sigma) ** 2 * self.cov + sigma**2 * torch.eye(len(self.mean), dtype=self.cov.dtype)

    def velocity(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        r"""\\(E[noise - x_0 | x_\sigma = x]\\) for `x` of shape `(batch, d)`."""
        sigma = torch.as_tensor(sigma, dtype=self.cov.dtype)
        gain = sigma * torch.eye(len(self.mean), dtype=self.cov.dtype) - (1 - sigma) * self.cov
        # Both are polynomials of C, so they commute and the product is symmetric.
        return (x - (1 - sigma) * self.mean) @ torch.linalg.solve(self.marginal_cov(sigma), gain) - self.mean


@dataclass(frozen=True)
class QuadraticReward:
    r"""\\(R(x) = -\frac12 (x - c)^T Q (x - c)\\), whose expectation under a Gaussian is known."""

    center: Tensor
    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return -0.5 * (((x - self.center) @ self.weight) * (x - self.center)).sum(-1)

    def expected(self, mean: Tensor, cov: Tensor) -> Tensor:
        """The mean reward under `N(mean, cov)`."""
        return self(mean) - 0.5 * (self.weight * cov).sum()


def gaussian_1d(std: float = 0.4, mean: float = 0.0) -> GaussianFlow:
    return GaussianFlow(torch.tensor([mean], dtype=torch.float64), torch.tensor([[std**2]], dtype=torch.float64))


def gaussian_2d(stds: Sequence[float] = (0.6, 0.2), angle: float = 0.6) -> GaussianFlow:
    """An anisotropic, rotated Gaussian away from the origin."""
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    cov = turn @ torch.diag(torch.tensor(stds, dtype=torch.float64) ** 2) @ turn.T
    return GaussianFlow(torch.tensor([1.0, -0.5], dtype=torch.float64), cov)


def reward_2d() -> QuadraticReward:
    """A reward with another mean than the data's as its optimum. It also prefers a smaller spread."""
    weight = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    return QuadraticReward(torch.tensor([1.3, -0.3], dtype=torch.float64), weight)


def make_scheduler(steps: int, start: int = 0, size: int | str = 0, **config) -> MixedODESDEScheduler:
    """A scheduler with FLUX's noise levels, `linspace(1, 1 / T, T)` before the shift, ready to run."""
    scheduler = MixedODESDEScheduler(window_size=0, **config)
    scheduler.set_window(start, size)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    return scheduler


def perturbation(theta: Tensor, x: Tensor) -> Tensor:
    """`b + x W` for `theta = (b, W)` of shape `(p,)` or `(batch, p)` and `x` of shape `(batch, d)`."""
    d = x.shape[-1]
    weight = theta[..., d:].reshape(*theta.shape[:-1], d, d)
    return theta[..., :d] + (x.unsqueeze(-2) @ weight).squeeze(-2)


def final_law(
    scheduler: MixedODESDEScheduler, flow: GaussianFlow, theta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """
    The exact law of the final sample when the initial one is standard normal.

    One run of the scheduler on a batch of impulses: the zero vector, the unit vectors as initial samples, and the unit
    vectors as the noise of each stochastic step. The results are the columns of the affine map.

    Args:
        scheduler ([`MixedODESDEScheduler`]): Ready to run; afterwards it has run.
        flow ([`GaussianFlow`]): The data.
        theta (`torch.Tensor` of shape `(T, p)`, *optional*): A perturbation of the velocity in each step.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: mean `(d,)`, covariance `(d, d)`, and the part of the
        covariance that comes from the window's noise, `(d, d)`; differentiable in `theta`.
    """
    d = len(flow.mean)
    window = scheduler.window
    eye = torch.eye(d, dtype=torch.float64)
    x = torch.zeros(1 + d + d * len(window), d, dtype=torch.float64)
    x[1 : 1 + d] = eye
    for i, t in enumerate(scheduler.timesteps):
        noise = torch.zeros_like(x)
        if i in window:
            first = 1 + d * (1 + i - window.start)
            noise[first : first + d] = eye
        velocity = flow.velocity(x, scheduler.sigmas[i])
        if theta is not None:
            velocity = velocity + perturbation(theta[i], x)
        x = scheduler.step(velocity, t, x, variance_noise=noise).prev_sample
    columns = x[1:] - x[0]
    return x[0], columns.T @ columns, columns[d:].T @ columns[d:]


def cov_error(flow: GaussianFlow, scheduler: MixedODESDEScheduler) -> float:
    """Error of the final covariance, relative to the data's, in the Frobenius norm."""
    return float((final_law(scheduler, flow)[1] - flow.cov).norm() / flow.cov.norm())


def expected_gradient(
    scheduler: MixedODESDEScheduler, flow: GaussianFlow, reward: QuadraticReward, theta: Tensor
) -> Tensor:
    """Exact derivative of the expected reward by the parameters of each step, `(T, p)`."""
    theta = theta.detach().requires_grad_()
    mean, cov, _ = final_law(scheduler, flow, theta)
    return torch.autograd.grad(reward.expected(mean, cov), theta)[0]


def sample_scores(
    scheduler: MixedODESDEScheduler,
    flow: GaussianFlow,
    theta: Tensor,
    initial: Tensor,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Samples, and for each of them and each stochastic step the derivative of the step's log-prob by its parameters.

    Args:
        scheduler ([`MixedODESDEScheduler`]): Ready to run; afterwards it has run.
        flow ([`GaussianFlow`]): The data.
        theta (`torch.Tensor` of shape `(T, p)`): The perturbation of the velocity in each step.
        initial (`torch.Tensor` of shape `(N, d)`): Initial noise.
        noise (`torch.Tensor` of shape `(N, S, d)`, *optional*): The window's noise; drawn from `generator` if `None`.
        generator (`torch.Generator`, *optional*): Source of the window's noise.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: final samples `(N, d)` and scores `(N, S, p)`. The scores are derivatives
        of the whole log-density: the scheduler's mean over elements times `d`.
    """
    x = initial
    scores = []
    for i, t in enumerate(scheduler.timesteps):
        rows = theta[i].expand(len(x), -1).detach().requires_grad_()
        velocity = flow.velocity(x, scheduler.sigmas[i]) + perturbation(rows, x)
        given = None if noise is None or i not in scheduler.window else noise[:, i - scheduler.window.start]
        previous = scheduler.step(velocity.detach(), t, x, generator=generator, variance_noise=given).prev_sample
        if i in scheduler.window:
            log_prob = scheduler.log_prob(velocity, x, previous, i) * x.shape[-1]
            scores.append(torch.autograd.grad(log_prob.sum(), rows)[0])
        x = previous
    return x, torch.stack(scores, dim=1)


def sample_groups(scheduler, flow, reward, theta, groups: int, group_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rewards `(P, G)` and scores `(P, G, S, p)` of groups that share their initial noise."""
    generator = torch.Generator().manual_seed(seed)
    initial = torch.randn(groups, len(flow.mean), generator=generator, dtype=torch.float64)
    initial = initial.repeat_interleave(group_size, dim=0)
    samples, scores = sample_scores(scheduler, flow, theta, initial, generator=generator)
    return reward(samples).view(groups, group_size), scores.view(groups, group_size, *scores.shape[1:])


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first dimension and its standard error."""
    return values.mean(0), values.std(0) / len(values) ** 0.5


def table(header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Print a Markdown table."""
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) + " |")


# ---- The sampler's distribution ----


def draw_marginals(output: str) -> None:
    """`theory_marginals.png`: error of the final covariance against the number of steps."""
    flow = gaussian_2d()
    counts = [12, 24, 48, 96, 192, 384, 768]
    windows = {
        "SDE on all steps except the last": lambda T: (0, "all"),
        "4 SDE steps from 0": lambda T: (0, 4),
        "4 SDE steps from $T/2$": lambda T: (T // 2, 4),
        "$T/4$ SDE steps from $T/2$": lambda T: (T // 2, T // 4),
    }
    figure, axes = plt.subplots(2, 2, figsize=(7, 6.6), sharex=True, sharey=True, layout="constrained")
    ode = [cov_error(flow, make_scheduler(steps)) for steps in counts]
    rows = []
    for axis, (name, window) in zip(axes.flat, windows.items(), strict=True):
        axis.loglog(counts, ode, **STYLE["ODE"], linewidth=1.2, label="ODE (Euler)")
        for kind, eta in ETA.items():
            errors = [
                cov_error(flow, make_scheduler(steps, *window(steps), sde_type=kind, eta=eta)) for steps in counts
            ]
            axis.loglog(counts, errors, **STYLE[kind], markersize=4, linewidth=1.4, label=f"{kind}, η = {eta}")
            rows.append([name, kind, *errors[::2], math.log2(errors[-2] / errors[-1])])
        axis.loglog(
            counts, [9 / steps for steps in counts], color="#bbbbbb", linewidth=4, zorder=0, label="slope $1 / T$"
        )
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    rows.append(["none", "ODE", *ode[::2], math.log2(ode[-2] / ode[-1])])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("denoising steps $T$")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    figure.supylabel("relative error of the final covariance", fontsize=10)
    save(figure, output, "theory_marginals.png")
    table(["window", "kind", *(f"T={count}" for count in counts[::2]), "last order"], rows)


def print_solver_orders() -> None:
    """Convergence orders with a second-order solver outside the window."""
    flow = gaussian_2d()
    rows = []
    for name, window in (
        ("none", lambda T: (0, 0)),
        ("w=4 at T/4", lambda T: (T // 4, 4)),
        ("w=T/4 at T/4", lambda T: (T // 4, T // 4)),
    ):
        for kind in ("flow", "dance", "dpm"):
            config = {"sde_type": kind, "eta": ETA[kind], "ode_solver": "unipc"}
            errors = [cov_error(flow, make_scheduler(steps, *window(steps), **config)) for steps in (96, 192, 384)]
            rows.append([name, kind, *errors, math.log2(errors[1] / errors[2])])
    table(["window, UniPC outside", "kind", "T=96", "T=192", "T=384", "order"], rows)


def print_wide_windows() -> None:
    """Final std for data of std 0.4 with the SDE on all steps except the last."""
    flow = gaussian_1d()
    counts = (25, 200, 800)
    rows = []
    for kind, eta, shift in (
        *((kind, eta, shift) for shift in (1.0, 3.0) for kind, eta in ETA.items()),
        ("cps", 0.3, 3.0),
    ):
        stds = [
            math.sqrt(final_law(make_scheduler(n, 0, "all", sde_type=kind, eta=eta, shift=shift), flow)[1])
            for n in counts
        ]
        limit = 0.4 * math.cos(eta * math.pi / 4) if kind == "cps" else 0.4
        rows.append([kind, eta, shift, *stds, limit])
    table(["all steps except the last", "eta", "shift", *(f"T={n}" for n in counts), "limit"], rows)


def flow_excess(start: int, size: int, eta: float) -> float:
    """The relative excess of variance of `flow` after steps close to `sigma == 1`, in the limit of a fine schedule."""
    value = 0.0
    for i in range(start, start + size):
        noise = eta**2 / max(i, 1)
        value = (1 - noise / 2) ** 2 * value + noise**2 / 4
    return value


def print_first_steps() -> None:
    """The excess of `flow` with a window of 4 near the start, extrapolated to infinitely many steps and by formula."""
    flow = gaussian_2d()
    rows = []
    for start in (0, 1, 2, 4, 8, 16):
        ratios = []
        for steps in (300, 600):
            _, cov, _ = final_law(make_scheduler(steps, start, 4, sde_type="flow", eta=0.7), flow)
            ratios.append(float((cov - final_law(make_scheduler(steps), flow)[1]).trace() / flow.cov.trace()))
        limit = 2 * ratios[1] - ratios[0]
        rows.append([start, *(f"{100 * v:.2f}%" for v in (*ratios, limit, flow_excess(start, 4, 0.7)))])
    table(["flow, w=4, start", "T=300", "T=600", "extrapolated", "formula"], rows)


def draw_window_position(output: str) -> None:
    """`theory_window_position.png`: final spread by window position, in the published setting."""
    flow = gaussian_2d()
    steps = 25
    size = 4
    starts = range(steps - size)
    _, ode, _ = final_law(make_scheduler(steps, shift=3.0), flow)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.3), layout="constrained")
    left.axhline(math.sqrt(ode.trace() / flow.cov.trace()), **STYLE["ODE"], linewidth=1.2, label="ODE (Euler)")
    left.axhline(1, color="#bbbbbb", linewidth=4, zorder=0, label="data")
    rows = []
    for kind, eta in ETA.items():
        laws = [final_law(make_scheduler(steps, s, size, sde_type=kind, eta=eta, shift=3.0), flow) for s in starts]
        spread = [math.sqrt(cov.trace() / flow.cov.trace()) for _, cov, _ in laws]
        share = [float(part.trace() / cov.trace()) for _, cov, part in laws]
        style = STYLE[kind] | {"markersize": 3.5, "linewidth": 1.4}
        left.plot(starts, spread, **style, label=f"{kind}, η = {eta}")
        right.plot(starts, [100 * value for value in share], **style)
        wide = make_scheduler(steps, 0, "all", sde_type=kind, eta=eta, shift=3.0)
        wide_spread = math.sqrt(final_law(wide, flow)[1].trace() / flow.cov.trace())
        rows.append([kind, eta, *spread[::5], wide_spread, *share[::10]])
    left.set(xlabel="window start $l$", ylabel="final spread / data spread")
    right.set(xlabel="window start $l$", ylabel="variance from window noise (%)", ylim=(0, 103))
    left.legend(fontsize=7.5)
    figure.suptitle("Window position: T = 25 steps, shift 3, 4 SDE steps", fontsize=10)
    for axis in (left, right):
        axis.set_xticks(range(0, 21, 5))
        axis.grid(alpha=0.3)
    save(figure, output, "theory_window_position.png")
    print(f"\nODE: {math.sqrt(ode.trace() / flow.cov.trace()):.4f}")
    table(
        ["kind", "eta", *(f"spread, l={s}" for s in starts[::5]), "all", *(f"share, l={s}" for s in (0, 10, 20))], rows
    )


# ---- The windowed gradient ----


def passes_per_image(steps: int, window: range, trained: int, group_size: int) -> float:
    """Forward passes per image, with a prefix shared by its group. A training pass counts as three."""
    return window.start / group_size + steps - window.start + TRAINING_PASSES * trained


def signal_to_noise(rewards: Tensor, scores: Tensor, exact: Tensor) -> tuple[float, float, Tensor, Tensor]:
    """
    Number of images for a signal-to-noise ratio of 1: the estimate's variance equals the squared gradient.

    Args:
        rewards (`torch.Tensor` of shape `(P, G)`), scores (`torch.Tensor` of shape `(P, G, p)`): Samples.
        exact (`torch.Tensor` of shape `(p,)`): The exact gradient.

    Returns:
        `tuple[float, float, torch.Tensor, torch.Tensor]`: images and their standard error, estimate and its standard
        error.
    """
    group_size = rewards.shape[1]
    advantages = rewards - rewards.mean(1, keepdim=True)
    estimates = (advantages.unsqueeze(-1) * scores).mean(1) * group_size / (group_size - 1)
    images = torch.stack([part.var(0).sum() for part in estimates.chunk(20)]) * group_size / exact.square().sum()
    return *(float(value) for value in mean_and_error(images)), *mean_and_error(estimates)


def draw_gradient(output: str, groups: int) -> None:
    """`theory_gradient.png`: unbiasedness, and images and forward passes for a signal-to-noise ratio of 1."""
    flow = gaussian_2d()
    reward = reward_2d()
    steps, size, group_size = 25, 4, 12
    theta = torch.zeros(steps, 6, dtype=torch.float64)
    ode = expected_gradient(make_scheduler(steps, shift=3.0), flow, reward, theta)

    # 1. The window at each of six positions, and all steps at once
    wide = make_scheduler(steps, 0, "all", shift=3.0)
    exact_wide = expected_gradient(wide, flow, reward, theta)
    wide = make_scheduler(steps, 0, "all", shift=3.0)
    rewards_wide, scores_wide = sample_groups(wide, flow, reward, theta, groups, group_size, seed=99)
    rows = []
    points = []
    bars = []
    variances = []
    worst = 0.0
    places = range(0, steps - size, size)
    for place in places:
        inside = slice(place, place + size)
        exact = expected_gradient(make_scheduler(steps, place, size, shift=3.0), flow, reward, theta)[inside].sum(0)
        scheduler = make_scheduler(steps, place, size, shift=3.0)
        rewards, scores = sample_groups(scheduler, flow, reward, theta, groups, group_size, seed=place)
        images, error, estimate, estimate_error = signal_to_noise(rewards, scores.sum(2), exact)
        own = exact_wide[inside].sum(0)
        images_wide, error_wide, *_ = signal_to_noise(rewards_wide, scores_wide[:, :, inside].sum(2), own)
        cost = passes_per_image(steps, scheduler.window, size, group_size)
        deviations = (estimate - exact).abs() / estimate_error
        worst = max(worst, float(deviations.max()))
        points.append((place, images, error, images_wide, error_wide, cost))
        variances.append(torch.tensor([images, error], dtype=torch.float64) * exact.square().sum())
        bars.append((place, exact, estimate, estimate_error))
        rows.append(
            [
                f"{place}-{place + size - 1}",
                float(exact.norm()),
                cosine(exact, ode[inside].sum(0)),
                float(rewards.std(1).mean()),
                f"{images:.1f} ± {error:.1f}",
                f"{images_wide:.0f} ± {error_wide:.0f}",
                cost,
                f"{images * cost:.0f} ± {error * cost:.0f}",
            ]
        )
    header = ["window", "gradient norm", "cos to ODE part", "std of R in a group", "images, window", "images, all SDE"]
    table([*header, "forward passes / image", "forward passes"], rows)
    print(f"\nlargest deviation of {6 * len(rows)} estimates from the exact values: {worst:.2f} standard errors")

    # 2. All steps, a random 14 of them, and the sum of the windows
    full = exact_wide[:24].sum(0)  # the last step is an ODE step without a score
    rows = []
    generator = torch.Generator().manual_seed(7)
    chosen = torch.rand(groups, 1, 24, 1, generator=generator).argsort(2) < 14
    swept = torch.stack([exact for _, exact, *_ in bars]).sum(0)
    # Six windows with an equal share of the images each: one image of the sweep estimates a sixth of the sum.
    variance, spread = torch.stack(variances).T * len(bars) / swept.square().sum()
    images, images_error = float(variance.sum()), float(spread.norm())
    for name, part, trained in (("all 24", scores_wide, 24), ("random 14 of 24", scores_wide * chosen * 24 / 14, 14)):
        count, error, *_ = signal_to_noise(rewards_wide, part.sum(2), full)
        cost = passes_per_image(steps, range(24), trained, group_size)
        rows.append([name, cosine(full, ode.sum(0)), count, error, cost, count * cost, error * cost])
    shared = sum(cost for *_, cost in points) / len(points)
    for name, cost in (
        ("six windows in turn", shared),
        ("six windows in turn, prefix not shared", steps + TRAINING_PASSES * size),
    ):
        rows.append([name, cosine(swept, ode.sum(0)), images, images_error, cost, images * cost, images_error * cost])
    table(["trained", "cos to ODE gradient", "images", "±", "forward passes / image", "forward passes", "±"], rows)
    for place, exact, *_ in bars:
        print(f"window at {place}: cos to the whole ODE gradient {cosine(exact, ode.sum(0)):.3f}")

    # 3. The figure
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
    for (place, exact, estimate, error), color in zip(bars[1::2], ("#4477aa", "#ee6677", "#228833"), strict=True):
        index = np.arange(len(exact))
        left.plot(index, exact, "_", color=color, markersize=16, markeredgewidth=2)
        left.errorbar(
            index, estimate, 2 * error, fmt="o", color=color, markersize=3.5, capsize=3, label=f"$l$ = {place}"
        )
    left.plot([], [], "_", color="#777777", markersize=14, markeredgewidth=2, label="exact")
    left.axhline(0, color="#bbbbbb", linewidth=0.8)
    left.set_xticks(range(6), ["$b_1$", "$b_2$", "$W_{11}$", "$W_{12}$", "$W_{21}$", "$W_{22}$"])
    left.set(xlabel="velocity parameter", ylabel="derivative of the expected reward")
    left.set_title("Gradient estimates ± 2 standard errors", fontsize=10)
    left.legend(fontsize=8)
    place, images, error, images_wide, error_wide, cost = map(np.array, zip(*points, strict=True))
    unshared = passes_per_image(steps, range(steps - 1), size, group_size)
    for name, count, spread, passes, color, style in (
        ("SDE on all steps", images_wide, error_wide, unshared, "#ee6677", "s--"),
        ("SDE in the window", images, error, unshared, "#228833", "^-."),
        ("SDE in the window, shared prefix", images, error, cost, "#4477aa", "o-"),
    ):
        right.errorbar(
            place, count * passes, spread * passes, fmt=style, color=color, markersize=4, capsize=3, label=name
        )
    right.set(xlabel="window start $l$", ylabel="forward passes for signal = noise", xticks=place)
    right.margins(y=0.3)  # room for the legend
    right.set_ylim(bottom=0)
    right.set_title("Cost of a 4-step gradient", fontsize=10)
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save(figure, output, "theory_gradient.png")


def print_group_statistics(groups: int) -> None:
    """Effect of the group's mean and std on the gradient estimate."""
    flow = gaussian_2d()
    reward = reward_2d()
    steps, place = 25, 8
    theta = torch.zeros(steps, 6, dtype=torch.float64)
    inside = slice(place, place + 4)
    exact = expected_gradient(make_scheduler(steps, place, 4, shift=3.0), flow, reward, theta)[inside].sum(0)
    unit = exact / exact.norm()
    rows = []
    for group_size in (2, 4, 12, 48):
        count = groups * 12 // group_size
        scheduler = make_scheduler(steps, place, 4, shift=3.0)
        rewards, scores = sample_groups(scheduler, flow, reward, theta, count, group_size, seed=group_size)
        centered = rewards - rewards.mean(1, keepdim=True)
        row: list = [group_size, (group_size - 1) / group_size]
        for advantages in (centered, group_normalize(rewards)):
            estimates = (advantages.unsqueeze(-1) * scores.sum(2)).mean(1)
            estimate, error = mean_and_error(estimates)
            along, along_error = mean_and_error(estimates @ unit)
            floor = (error.square().sum() - along_error**2).sqrt()
            angle, noise = (math.degrees(math.atan2(side, along)) for side in (sideways(estimate, unit), floor))
            scale, scale_error = along / exact.norm(), along_error / exact.norm()
            row += [f"{scale:.3f} ± {scale_error:.3f}", f"{angle:.1f}°", f"{noise:.1f}°"]
        rows.append(row)
    names = ["scale", "angle", "angle by chance"]
    table(["G", "(G-1)/G", *(f"mean: {n}" for n in names), *(f"mean and std: {n}" for n in names)], rows)


def sideways(vector: Tensor, unit: Tensor) -> float:
    """Length of the part of `vector` that is orthogonal to `unit`."""
    return float((vector - (vector @ unit) * unit).norm())


# ---- KL ----


def draw_kl(output: str, samples: int) -> None:
    """`theory_kl.png`: exact KL and Monte Carlo estimate by step."""
    steps, elements, delta = 25, 64, 0.5
    generator = torch.Generator().manual_seed(0)
    x, velocity, direction = torch.randn(3, 1, elements, generator=generator, dtype=torch.float64)
    other = velocity + delta * direction / direction.square().mean().sqrt()
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    rows = []
    for kind, eta in ETA.items():
        scheduler = make_scheduler(steps, 0, "all", sde_type=kind, eta=eta, shift=3.0)
        exact, estimates, errors, k3_errors = [], [], [], []
        for i in scheduler.window:
            mean, std = scheduler.transition(velocity, x, i)
            reference, _ = scheduler.transition(other, x, i)
            exact.append(float(gaussian_kl(mean, reference, std)))
            noise = torch.randn(samples, elements, generator=generator, dtype=torch.float64)
            drawn = mean + std * noise
            difference = scheduler.log_prob(velocity, x, drawn, i) - scheduler.log_prob(other, x, drawn, i)
            estimate, error = mean_and_error(difference)
            # The usual low-variance estimate (k3) of the whole latent's log-ratio, divided by its elements
            _, k3_error = mean_and_error((torch.expm1(-difference * elements) + difference * elements) / elements)
            estimates.append(float(estimate))
            errors.append(float(error))
            k3_errors.append(float(k3_error))
        axis.semilogy(exact, **(STYLE[kind] | {"marker": ""}), linewidth=1.4)
        axis.errorbar(
            list(scheduler.window)[::2],
            estimates[::2],
            [2 * error for error in errors[::2]],
            fmt=STYLE[kind]["marker"],
            color=STYLE[kind]["color"],
            markersize=4,
            capsize=3,
            label=f"{kind}, η = {eta}",
        )
        deviation = max(abs(a - b) / e for a, b, e in zip(exact, estimates, errors, strict=True))
        rows.append([kind, exact[0], exact[8], exact[23], estimates[8], errors[8], k3_errors[8], deviation])
    axis.set(xlabel="denoising step", ylabel="KL (nats per latent element)")
    axis.set_title("Exact and sampled KL", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="lines: exact; points: sampled ± 2 SE", title_fontsize=8)
    save(figure, output, "theory_kl.png")
    names = ["exact, step 0", "step 8", "step 23", "sampled, step 8", "±", "± of k3", "largest deviation / SE"]
    table(["kind", *names], rows)


# ---- Windows ----


def draw_step_weights(output: str, steps: int = 25, shift: float = 3.0) -> None:
    """`theory_step_weights.png`: the gradient scale of a log-prob by step, before and after weighting."""
    etas = ETA | {"cps": 0.5}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharex=True, sharey=True, layout="constrained")
    names = {"none": "as published", "rectified": "rectified", "noise": "noise"}
    rows = []
    for kind, eta in etas.items():
        scheduler = make_scheduler(steps, 0, steps - 1, sde_type=kind, eta=eta, shift=shift)
        transitions = scheduler.transitions()
        sensitivities = transitions.sensitivities()
        row = [f"`{kind}`", eta]
        for axis, weighting in zip(axes, names, strict=True):
            values = (sensitivities * step_weights(weighting, transitions, range(steps - 1))).tolist()
            axis.plot(range(steps - 1), values, label=f"{kind}, eta {eta:g}", markersize=3, **STYLE[kind])
            row.append(f"{max(values) / min(values):.3g}")
        rows.append(row)
    for axis, name in zip(axes, names.values(), strict=True):
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gradient scale of a log-prob x weight")
    axes[0].legend(fontsize=8)
    print(f"\nLargest over smallest gradient scale, {steps} steps, shift {shift:g}")
    table(["SDE type", "eta", *names.values()], rows)
    save(figure, output, "theory_step_weights.png")


def draw_windows(output: str, iterations: int = 600) -> None:
    """`windows.png`: window position by iteration, and the share of iterations that train each step."""
    schedules = {
        "progressive": WindowSchedule("progressive"),
        "exp_decay": WindowSchedule("exp_decay"),
        "linear_decay": WindowSchedule("linear_decay"),
        "random": WindowSchedule("random"),
        "frozen": WindowSchedule("frozen"),
    }
    figure, axes = plt.subplots(
        5, 2, figsize=(7, 8.4), sharex="col", sharey=True, width_ratios=[4, 1], layout="constrained"
    )
    rows = []
    for (left, right), (name, schedule) in zip(axes, schedules.items(), strict=True):
        windows = [schedule.schedule(m) for m in range(iterations)]
        starts = np.array([window.start for window in windows])
        if name == "random":  # steps between 600 draws would fill the plot
            left.vlines(range(iterations), starts - 0.5, starts + 3.5, color="#4477aa", linewidth=0.7)
        else:
            edges = np.arange(iterations + 1)
            first = np.append(starts, starts[-1])
            left.fill_between(edges, first - 0.5, first + 3.5, step="post", color="#4477aa", linewidth=0)
        # Exact shares over one sweep; for `random` the expected ones, over all starts
        weights = np.zeros(schedule.num_inference_steps)
        for start, stay in schedule.stays:
            weights[start : start + schedule.window_size] += stay / schedule.sweep_length
        right.barh(range(25), 100 * weights, color="#ccbb44", height=1.0, linewidth=0)
        left.axvline(300, color="#ee6677", linestyle="--", linewidth=1.5, label="end of the published run")
        left.axhline(23.5, color="#777777", linestyle=":", linewidth=1.5, label="last step: never trained")
        left.set_ylabel("denoising step")
        sweeps = name not in ("random", "frozen")
        left.set_title(name + f" (sweep: {schedule.sweep_length} iterations)" * sweeps, fontsize=10, loc="left")
        left.set(ylim=(-0.5, 24.5), xlim=(0, iterations), yticks=(0, 8, 16, 24))
        right.set(xlim=(0, 40), xticks=(0, 20, 40))
        right.grid(axis="x", alpha=0.3)
        rows.append(
            [
                name,
                schedule.sweep_length,
                schedule.schedule(299).start,
                *(f"{100 * w:.1f}%" for w in weights[[0, 12, 23]]),
            ]
        )
    axes[-1, 1].text(20, 1.5, "100%", ha="center", va="center", fontsize=9)
    axes[-1, 0].legend(fontsize=8, loc="center right")
    axes[-1, 0].set_xlabel("training iteration")
    axes[-1, 1].set_xlabel("trained\n(% of iterations)")
    save(figure, output, "windows.png")
    table(["strategy", "sweep", "start at 299", "step 0", "step 12", "step 23"], rows)


def save(figure, output: str, name: str) -> None:
    figure.savefig(os.path.join(output, name), dpi=120)
    plt.close(figure)
    print(f"\n## {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/images", help="folder of the figures, created if missing")
    parser.add_argument("--groups", type=int, default=20000, help="groups of 12 samples for each gradient estimate")
    parser.add_argument("--samples", type=int, default=16000, help="samples for each KL estimate")
    args = parser.parse_args()
    os.makedirs(args.output, exist_ok=True)
    draw_windows(args.output)
    draw_step_weights(args.output)
    draw_marginals(args.output)
    print_solver_orders()
    print_wide_windows()
    print_first_steps()
    draw_window_position(args.output)
    draw_gradient(args.output, args.groups)
    print_group_statistics(args.groups)
    draw_kl(args.output, args.samples)


if __name__ == "__main__":
    main()
