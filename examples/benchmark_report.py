"""What `benchmark_iteration.py` shows of its measurements: tables and figures."""

from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


# Iteration times against DanceGRPO's, from the MixGRPO paper (arXiv 2507.21802)
PUBLISHED = {"mixgrpo": 0.52, "mixgrpo-flash": 0.39, "mixgrpo-flash-star": 0.29}
# Parts of an iteration -> colours of Okabe and Ito, safe for the colour-blind
PARTS = {"prefix": "#56b4e9", "window": "#e69f00", "suffix": "#0072b2", "decode": "#f0e442", "reward": "#009e73"}
PARTS |= {"replay_forward": "#d55e00", "replay_backward": "#cc79a7", "optimizer": "#000000", "rest": "#bbbbbb"}
PASSES = ("prefix", "window", "suffix", "replay_forward")
MARKERS = {
    "off": ("s", "#0072b2"),
    "shared-prefix": ("D", "#e69f00"),
    "exact": ("o", "#009e73"),
    "all": ("v", "#cc79a7"),
}
# Header of a column in the printed table -> key of the JSON file and format
COLUMNS = {"s / iteration": ("seconds_per_iteration", ".3g"), "to DanceGRPO": ("ratio_to_dancegrpo", ".2f")}
COLUMNS |= {"CPU time": ("cpu_ratio_to_dancegrpo", ".2f"), "under the same": ("ratio_under_same_options", ".2f")}
COLUMNS |= {"in the transformer": ("transformer_share", ".0%"), "TFLOP/s": ("tflops", ".3g")}
COLUMNS |= {"there": ("tflops_in_transformer", ".3g"), "peak GB": ("peak_memory_gb", ".1f"), "error": ("error", "")}
GROWTH_COLOURS = {"dancegrpo": ("#d55e00", "s-"), "mixgrpo": ("#0072b2", "o-")}


def in_markdown(results: dict[str, Any]) -> str:
    """Times of all cases, and where those of the presets go."""
    text = [f"{results['machine']}, a matrix product reaches {results['matmul_peak_tflops']:.3g} TFLOP/s"]
    if "grow" in results:
        return "\n\n".join([*text, table(["number", "value", "preset"], flatten(results["grow"], 3), COLUMNS)])
    text += [table(["options", "preset"], flatten(results["options"], 2), COLUMNS), "Seconds of its parts:"]
    presets = {(name, entry["options"]): entry for name, entry in results["presets"].items()}
    parts = {key: entry.get("parts", {}) for key, entry in presets.items()}
    passes = {key: entry.get("passes", {}) | {"updates": entry.get("updates")} for key, entry in presets.items()}
    text += [table(["preset", "options"], parts, {part: (part, ".3g") for part in PARTS})]
    text += ["Images through the transformer, and optimizer steps:"]
    text += [table(["preset", "options"], passes, {part: (part, "g") for part in (*PASSES, "updates")})]
    if results.get("one_by_one_speedup"):
        text += [f"One image and one step at a time takes {results['one_by_one_speedup']:.1f} times as long."]
    return "\n\n".join(text)


def flatten(tree: dict[str, Any], depth: int) -> dict[tuple[str, ...], dict[str, Any]]:
    """The entries at this depth, by their path."""
    if depth == 0:
        return {(): tree}
    return {(name, *path): e for name, part in tree.items() for path, e in flatten(part, depth - 1).items()}


def table(labels: list[str], entries: dict[tuple[str, ...], dict], columns: dict[str, tuple[str, str]]) -> str:
    """In Markdown, without columns that are empty."""
    shown = {
        title: column
        for title, column in columns.items()
        if any(e.get(column[0]) is not None for e in entries.values())
    }
    rows = [[*labels, *shown], ["---"] * (len(labels) + len(shown))]
    for key, entry in entries.items():
        cells = [(entry.get(name), form) for name, form in shown.values()]
        rows.append([*key, *("" if value is None else f"{value:{form}}" for value, form in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_presets(results: dict[str, Any], file: Path) -> None:
    """Left the parts of an iteration, right the ratios under all options and those of the paper."""
    presets = {name: entry for name, entry in results["presets"].items() if "error" not in entry}
    rows, size = np.arange(len(presets)), (11, 1.8 + 0.5 * len(presets))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=(3, 2), layout="constrained")
    start = np.zeros(len(presets))
    for part, colour in PARTS.items():
        seconds = np.array([entry["parts"][part] for entry in presets.values()])
        axes[0].barh(rows, seconds, left=start, color=colour, edgecolor="white", linewidth=0.5, label=part)
        start += seconds
    axes[0].set_yticks(rows, [f"{name}\n({entry['options']})" for name, entry in presets.items()])
    axes[0].invert_yaxis()
    axes[0].set_xlabel("seconds per iteration")
    ratios = {o: {n: e.get("ratio_to_dancegrpo") for n, e in group.items()} for o, group in results["options"].items()}
    for offset, (option, (marker, colour)) in zip((-0.3, -0.1, 0.1, 0.3), MARKERS.items(), strict=True):
        points = [(ratios.get(option, {}).get(name), row + offset) for row, name in enumerate(presets)]
        points = np.array([point for point in points if point[0]]).reshape(-1, 2)
        axes[1].plot(*points.T, marker, color=colour, label=option)
    published = {row: PUBLISHED[name] for row, name in enumerate(presets) if name in PUBLISHED}
    low, high = (np.array(list(published)) + offset for offset in (-0.4, 0.4))
    axes[1].vlines(list(published.values()), low, high, color="black", label="published")
    axes[1].set_xlim(left=0)
    axes[1].set_xlabel("time / time of DanceGRPO")
    axes[1].grid(axis="x", alpha=0.3)
    for axis, columns in zip(axes, (5, 3), strict=True):
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_growth(results: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(1, len(results["grow"]), figsize=(12, 3), sharey=True, layout="constrained")
    for axis, (name, values) in zip(axes, results["grow"].items(), strict=True):
        for preset, (colour, marker) in GROWTH_COLOURS.items():
            times = {int(v): e[preset].get("seconds_per_iteration") for v, e in values.items() if preset in e}
            axis.plot(times.keys(), times.values(), marker, color=colour, label=preset)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="seconds per iteration", ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
