"""
Objectives: losses of transitions from their log-probs and advantages. Pure functions of tensors.

Shapes: `N` transitions, each one image at one step of the window; `...` the shape of one image's latents.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .transitions import gaussian_kl


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


def clipped_objective(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
) -> Objective:
    r"""
    The clipped objective of GRPO: \\(\max(-A\,r, -A\,\mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon_{high}))\\).

    With \\(r = \exp(\log p_{new} - \log p_{old})\\); see equation 6 of MixGRPO (https://arxiv.org/abs/2507.21802).

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
    low = 1 - epsilon
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    ratio = torch.exp(new_log_probs - old_log_probs)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))

    ratio = ratio.detach()
    clipped_low = (ratio < low) & (advantages < 0)
    clipped_high = (ratio > high) & (advantages > 0)
    statistics = {
        "clip_ratio/low_mean": clipped_low.float().mean(),
        "clip_ratio/high_mean": clipped_high.float().mean(),
        "clip_ratio/region_mean": (clipped_low | clipped_high).float().mean(),
        "ratio/mean": ratio.mean(),
        "ratio/max_deviation": (ratio - 1).abs().max(),
    }
    return Objective(losses, ratio, statistics)


def add_kl_penalty(
    objective: Objective, means: Tensor, reference_means: Tensor, stds: Tensor, beta: float
) -> Objective:
    """
    Add `beta` times the exact KL divergence of each transition from the reference model's.

    Args:
        objective ([`Objective`]): The losses to add it to.
        means (`torch.Tensor` of shape `(N, ...)`): Means of the transitions under the current weights, differentiable.
        reference_means (`torch.Tensor` of shape `(N, ...)`): Means under the reference model, detached.
        stds (`torch.Tensor` that broadcasts against `means`): Their common standard deviations.
        beta (`float`): Coefficient of the penalty.

    Returns:
        [`Objective`], with the statistic `kl`, in nats per latent element.
    """
    kl = gaussian_kl(means, reference_means, stds)
    statistics = {**objective.statistics, "kl": kl.detach().mean()}
    return Objective(objective.losses + beta * kl, objective.ratio, statistics)
