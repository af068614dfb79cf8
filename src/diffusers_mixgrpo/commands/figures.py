"""Figures of a run, drawn into files."""

import os
from collections.abc import Mapping

import matplotlib
import numpy as np


matplotlib.use("Agg")  # without a display

import matplotlib.pyplot as plt  # noqa: E402


def draw_reward_curve(history: list[dict], output_dir: str) -> None:
    """`reward_curve.png`: training reward, held-out reward before and after, and the start of the window."""
    training = [entry for entry in history if "reward" in entry]
    held_out = [entry for entry in history if "eval_reward" in entry]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=[4, 1], layout="constrained")
    if training:
        steps = [entry["step"] for entry in training]
        rewards = [entry["reward"] for entry in training]
        starts = [entry["window/start"] for entry in training]
        top.plot(steps, rewards, color="#4477aa", linewidth=1, label="training prompts, mixed ODE-SDE sampling")
        bottom.step(steps, starts, color="#777777", where="post")
    if held_out:
        steps = [entry["step"] for entry in held_out]
        rewards = [entry["eval_reward"] for entry in held_out]
        errors = [entry.get("eval_reward_se", 0) for entry in held_out]
        label = "held-out prompts, ODE sampling (± standard error)"
        top.errorbar(steps, rewards, errors, color="#cc3311", fmt="o-", capsize=3, label=label)
    top.set_title("Reward during training")
    top.set_ylabel("mean reward")
    top.grid(alpha=0.3)
    top.legend(loc="lower right")
    bottom.set_ylabel("window\nstart")
    bottom.yaxis.get_major_locator().set_params(integer=True)
    bottom.set_xlabel("optimizer step")
    figure.savefig(os.path.join(output_dir, "reward_curve.png"), dpi=120)
    plt.close(figure)


def draw_by_window(histories: Mapping[str, list[dict[str, float]]], file: str | os.PathLike) -> bool:
    """
    The gradient's norm, the spread of rewards and the share of clipped transitions at each place of the window.

    Args:
        histories (`dict[str, list[dict]]`): `trainer.state.log_history` of one run or several, by their labels.
        file (`str` or `os.PathLike`): Where to draw.

    Returns:
        `bool`: False if no window has moved. Then there is nothing to draw.
    """
    panels = {
        "grad_norm": "gradient norm before clipping",
        "reward_std": "std of rewards in a group",
        "clip_ratio": "share of clipped transitions",
    }
    curves = {(label, name): _by_window(history, name) for label, history in histories.items() for name in panels}
    if max(map(len, curves.values()), default=0) < 2:
        return False
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for label in histories:
            curve = curves[label, name]
            if len(curve) < 2:
                continue  # a window that does not move
            axis.plot(curve.keys(), curve.values(), marker="o", markersize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("first step of the window")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    if any(value > 0 for label in histories for value in curves[label, "grad_norm"].values()):
        axes[0].set_yscale("log")
    if len(histories) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return True


def _by_window(history: list[dict[str, float]], name: str) -> dict[int, float]:
    """The mean of a measurement at each place of the window, in the order of the places."""
    values: dict[int, list[float]] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith(f"{name}_by_window/"):
                values.setdefault(int(key.rsplit("/", 1)[1]), []).append(value)
    return {place: float(np.mean(values[place])) for place in sorted(values)}
