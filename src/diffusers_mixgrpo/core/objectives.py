"""
Objectives: losses of transitions from their log-probs and advantages. Pure functions of tensors.

Shapes: `N` transitions, each one image at one step of the window; `...` the shape of one image's latents.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor


LOSS_TYPES = ("grpo", "grpo_guard", "dppo")
KL_TYPES = ("transition", "velocity")


@dataclass
class Objective:
    """
    Losses of `N` transitions, and what to log about them.

    Args:
        losses (`torch.Tensor` of shape `(N,)`): The loss of each transition, differentiable.
        ratio (`torch.Tensor` of shape `(N,)`): New probability over old probability, detached.
        statistics (`dict[str, torch.Tensor]`): 0-d tensors by the names of the logs, detached.
    """

    losses: Tensor
    ratio: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def weighted(self, weights: Tensor) -> "Objective":
        """The same with the losses times `weights`, of shape `(N,)`."""
        return dataclasses.replace(self, losses=self.losses * weights)


def clipped_objective(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
) -> Objective:
    r"""
    The clipped objective of GRPO: \\(\max(-A\,r, -A\,\mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon_{high}))\\).

    With \\(r = \exp(\log p_{new} - \log p_{old})\\); the objective of MixGRPO (https://arxiv.org/abs/2507.21802).

    Args:
        new_log_probs (`torch.Tensor` of shape `(N,)`): Log-probs under the current weights, differentiable.
        old_log_probs (`torch.Tensor` of shape `(N,)`): Log-probs when the transitions were sampled, detached.
        advantages (`torch.Tensor` of shape `(N,)`): The advantage of each transition's image.
        epsilon (`float`): Clip range of the ratio below 1.
        epsilon_high (`float`, *optional*): Clip range above 1. Defaults to `epsilon`.

    Returns:
        [`Objective`], with the statistics `ratio/mean`, `ratio/max_deviation` (largest \\(|r - 1|\\)), and
        `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean`: shares of transitions that are clipped
        below, above, and in total.
    """
    return _clipped(torch.exp(new_log_probs - old_log_probs), advantages, epsilon, epsilon_high)


def guarded_objective(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    kl: Tensor,
    stds: Tensor,
    dts: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
) -> Objective:
    r"""
    The clipped objective of GRPO-Guard, whose ratio has the same mean and a similar spread at all steps.

    \\(r = \exp(\sigma (\log p_{new} - \log p_{old} + KL))\\) with the std \\(\sigma\\) of the transition, and the
    clipped loss divided by \\(-\Delta\\), the length of the step. The log-ratio of a Gaussian transition has the mean
    \\(-KL\\), which pulls the ratio below 1, more so late in the schedule; the term takes this out. Source: GRPO-Guard
    (https://arxiv.org/abs/2510.22319) as released with Flow-GRPO.

    Args:
        new_log_probs, old_log_probs, advantages (`torch.Tensor` of shape `(N,)`): As in [`clipped_objective`].
        kl (`torch.Tensor` of shape `(N,)`): The KL divergence of the old transition from the new one, differentiable,
            a mean over latent elements as the log-probs are.
        stds (`torch.Tensor` of shape `(N,)`): The std of each transition.
        dts (`torch.Tensor` of shape `(N,)`): The change of the noise level in each transition, negative.
        epsilon, epsilon_high (`float`): Clip range of this ratio, as in [`clipped_objective`].

    Returns:
        [`Objective`], with the statistics of [`clipped_objective`].
    """
    ratio = torch.exp((new_log_probs - old_log_probs + kl) * stds)
    return _clipped(ratio, advantages, epsilon, epsilon_high).weighted(-1 / dts)


def masked_objective(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    kl: Tensor,
    threshold: float,
) -> Objective:
    r"""
    The objective of DPPO for flows: \\(-A\,r\\), without a gradient where the policy has moved too far already.

    Where the exact KL divergence of old and new transition is at least `threshold`, an update that would raise it has
    no gradient: one that raises a ratio above 1, or lowers one below 1. Unlike the range of a clipped ratio, which is
    one sample's noisy estimate of it, the divergence is the trust region itself. Source: Flow-DPPO.

    Args:
        new_log_probs, old_log_probs, advantages (`torch.Tensor` of shape `(N,)`): As in [`clipped_objective`].
        kl (`torch.Tensor` of shape `(N,)`): The KL divergence of the old transition from the new one, a mean over
            latent elements as the log-probs are.
        threshold (`float`): Largest divergence, > 0.

    Returns:
        [`Objective`], with the statistics of [`clipped_objective`], whose `clip_ratio`s are the shares of transitions
        without a gradient, and `kl_old`, the mean divergence from the policy that sampled.
    """
    ratio = torch.exp(new_log_probs - old_log_probs)
    losses = -advantages * ratio
    far = kl.detach() >= threshold
    masked_low = far & (ratio.detach() < 1) & (advantages < 0)
    masked_high = far & (ratio.detach() > 1) & (advantages > 0)
    losses = torch.where(masked_low | masked_high, losses.detach(), losses)
    statistics = _ratio_statistics(ratio, masked_low, masked_high) | {"kl_old": kl.detach().mean()}
    return Objective(losses, ratio.detach(), statistics)


def add_kl_penalty(objective: Objective, kl: Tensor, beta: float) -> Objective:
    """
    Add `beta` times the divergence of each transition from the reference model's.

    Args:
        objective ([`Objective`]): The losses to add it to.
        kl (`torch.Tensor` of shape `(N,)`): [`~transitions.gaussian_kl`] or [`~transitions.velocity_kl`],
            differentiable.
        beta (`float`): Coefficient of the penalty.

    Returns:
        [`Objective`], with the statistic `kl`, the mean over transitions.
    """
    statistics = {**objective.statistics, "kl": kl.detach().mean()}
    return Objective(objective.losses + beta * kl, objective.ratio, statistics)


def _clipped(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None) -> Objective:
    low = 1 - epsilon
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    ratio = ratio.detach()
    statistics = _ratio_statistics(ratio, (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0))
    return Objective(losses, ratio, statistics)


def _ratio_statistics(ratio: Tensor, clipped_low: Tensor, clipped_high: Tensor) -> dict[str, Tensor]:
    ratio = ratio.detach()
    return {
        "clip_ratio/low_mean": clipped_low.float().mean(),
        "clip_ratio/high_mean": clipped_high.float().mean(),
        "clip_ratio/region_mean": (clipped_low | clipped_high).float().mean(),
        "ratio/mean": ratio.mean(),
        "ratio/max_deviation": (ratio - 1).abs().max(),
    }
