"""
Advantages of groups of images, from their rewards. Pure functions of tensors.

Shapes: `K` reward functions, `P` prompts, `G` images of each prompt (a group). NaN stands for "could not be scored".
"""

from collections.abc import Sequence

import torch


AGGREGATIONS = ("normalize_then_sum", "sum_then_normalize")
SCALINGS = ("group", "batch", "none")


def group_normalize(rewards: torch.Tensor, scale_rewards: str = "group") -> torch.Tensor:
    """
    Center rewards on the mean of their group and scale them: `(R - mean) / (std + 1e-8)`, with Bessel's correction.

    Args:
        rewards (`torch.Tensor` of shape `(..., P, G)`):
            Rewards; NaN entries are left out of all statistics.
        scale_rewards (`str`, defaults to `"group"`):
            `"group"` divides by the standard deviation within the group, `"batch"` by that of all `P * G` rewards,
            `"none"` only centers.

    Returns:
        `torch.Tensor` of shape `(..., P, G)`: exactly 0 for unscored entries, in groups with fewer than two scores,
        and in groups whose scores are all equal.
    """
    if scale_rewards not in SCALINGS:
        raise ValueError(f"`scale_rewards` must be one of {SCALINGS}, got {scale_rewards!r}.")
    rewards = rewards.double()
    scored = ~rewards.isnan()
    centered = torch.where(scored, rewards - rewards.nanmean(dim=-1, keepdim=True), 0.0)
    if scale_rewards == "group":
        centered = centered / (scored_std(rewards, dims=(-1,)) + 1e-8)
    elif scale_rewards == "batch":
        centered = centered / (scored_std(rewards, dims=(-2, -1)) + 1e-8)
    # Rounding of the mean must not turn equal rewards into a preference: (0.1 + 0.1 + 0.1) / 3 is not 0.1.
    lowest = rewards.nan_to_num(nan=float("inf")).amin(dim=-1, keepdim=True)
    highest = rewards.nan_to_num(nan=float("-inf")).amax(dim=-1, keepdim=True)
    return torch.where(scored & (highest > lowest), centered, 0.0)


def compute_advantages(
    rewards: torch.Tensor,
    weights: Sequence[float] | torch.Tensor | None = None,
    aggregation: str = "normalize_then_sum",
    scale_rewards: str = "group",
    clip: float | None = 5.0,
) -> torch.Tensor:
    """
    Advantages of groups of images under one or several rewards.

    With `aggregation="normalize_then_sum"` (the paper's advantage aggregation) each reward is normalized in its group
    first, so that no reward dominates by its scale: `A = sum_k weight_k * (R_k - mean_k) / (std_k + 1e-8)`. With
    `"sum_then_normalize"` the weighted sum of the rewards is normalized.

    Args:
        rewards (`torch.Tensor` of shape `(K, P, G)`):
            Rewards; NaN where a reward could not score an image. Such an image is left out of that
            reward's statistics and gets 0 from it. In a sum of rewards it cannot be compared and gets 0.
        weights (sequence of `K` `float`, *optional*):
            Weights of the rewards, scaled here so that their absolute values sum to 1. Defaults to equal weights.
        aggregation (`str`, defaults to `"normalize_then_sum"`):
            `"normalize_then_sum"` or `"sum_then_normalize"`.
        scale_rewards (`str`, defaults to `"group"`):
            See [`group_normalize`].
        clip (`float`, *optional*, defaults to 5.0):
            Advantages are limited to `[-clip, clip]`; `None` leaves them as they are.

    Returns:
        `torch.Tensor` of shape `(P, G)`, float32.

    Raises:
        `ValueError`: If the shapes do not fit or an option is unknown.
    """
    if rewards.ndim != 3:
        raise ValueError(f"`rewards` must have shape (rewards, prompts, generations), got {tuple(rewards.shape)}.")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"`aggregation` must be one of {AGGREGATIONS}, got {aggregation!r}.")
    weights = normalize_weights(weights, rewards.shape[0]).to(rewards.device)
    if aggregation == "normalize_then_sum":
        advantages = torch.einsum("k,kpg->pg", weights, group_normalize(rewards, scale_rewards))
    else:
        advantages = group_normalize(combine_rewards(rewards, weights), scale_rewards)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return advantages.float()


def keep_extremes(advantages: torch.Tensor, k: int) -> torch.Tensor:
    """
    Advantages of shape `(P, G)` with all but the `k` highest and the `k` lowest of each group set to 0.

    An approximation: images in between carry the weakest signal, and replaying only the extremes costs `2 * k / G` of
    a full replay.
    """
    if 2 * k >= advantages.shape[-1]:
        return advantages
    order = advantages.argsort(dim=-1, stable=True)
    extremes = torch.cat([order[..., :k], order[..., -k:]], dim=-1)
    return torch.zeros_like(advantages).scatter(-1, extremes, advantages.gather(-1, extremes))


def combine_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    The weighted sum of rewards of shape `(K, ...)`, NaN where a reward of non-zero weight is missing.
    """
    counted = weights != 0  # a reward of weight 0 is only logged, so its failures do not matter
    return torch.einsum("k,k...->...", weights[counted], rewards.double()[counted])


def normalize_weights(weights: Sequence[float] | torch.Tensor | None, num_rewards: int) -> torch.Tensor:
    """`num_rewards` float64 weights whose absolute values sum to 1; equal ones for `None`."""
    if weights is None:
        weights = [1.0] * num_rewards
    weights = torch.as_tensor(weights, dtype=torch.float64)
    if weights.shape != (num_rewards,):
        raise ValueError(
            f"`reward_weights` must have one weight per reward function, got {weights.numel()} weights for "
            f"{num_rewards} reward function(s)."
        )
    total = weights.abs().sum()
    if not torch.isfinite(total) or total == 0:
        raise ValueError(f"`reward_weights` must be finite and not all 0, got {weights.tolist()}.")
    return weights / total


def scored_std(rewards: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Standard deviation with Bessel's correction over the scored entries; 0 where fewer than two are scored."""
    scored = ~rewards.isnan()
    count = scored.sum(dim=dims, keepdim=True)
    mean = torch.where(scored, rewards, 0.0).sum(dim=dims, keepdim=True) / count.clamp(min=1)
    squares = torch.where(scored, rewards - mean, 0.0).square().sum(dim=dims, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()
