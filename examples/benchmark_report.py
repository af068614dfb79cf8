"""The tables and figures of `benchmark_iteration.py`."""

from pathlib import Path
from typing import Any

import numpy as np

from diffusers_mixgrpo.commands.figures import plt
from diffusers_mixgrpo.presets import METHOD_NAMES


# Iteration time relative to DanceGRPO, from the MixGRPO paper (arXiv 2507.21802)
PUBLISHED = {"mixgrpo": 0.52, "mixgrpo-flash": 0.39, "mixgrpo-flash-star": 0.29}
# Parts of an iteration -> colors of Okabe and Ito, safe for color-blind readers
PARTS = {
    "prefix": "#56b4e9",
    "window": "#e69f00",
    "suffix": "#0072b2",
    "decode": "#f0e442",
    "reward": "#009e73",
    "replay_forward": "#d55e00",
    "replay_backward": "#cc79a7",
    "optimizer": "#000000",
    "rest": "#bbbbbb",
}
PASSES = ("prefix", "window", "suffix", "replay_forward")
OPTION_STYLES = {
    "off": ("s", "#0072b2"),
    "shared-prefix": ("D", "#e69f00"),
    "exact": ("o", "#009e73"),
    "all": ("v", "#cc79a7"),
}
GROWTH_STYLES = {"dancegrpo": ("#d55e00", "s-"), "mixgrpo": ("#0072b2", "o-")}
GROWTH_LABELS = {
    "num_generations": "images per prompt G",
    "num_inference_steps": "denoising steps T",
    "window_size": "window size w",
    "size": "image size (pixels)",
}
# Header of a column in the printed tables -> key of the JSON file and format
TIME_COLUMNS = {
    "time (s/iteration)": ("seconds_per_iteration", ".3g"),
    "relative to DanceGRPO": ("ratio_to_dancegrpo", ".2f"),
    "CPU time, relative": ("cpu_ratio_to_dancegrpo", ".2f"),
    "relative, same options": ("ratio_under_same_options", ".2f"),
    "error": ("error", ""),
}
EFFICIENCY_COLUMNS = {
    "share in the transformer": ("transformer_share", ".0%"),
    "TFLOP/s": ("tflops", ".3g"),
    "TFLOP/s in the transformer": ("tflops_in_transformer", ".3g"),
    "peak memory (GB)": ("peak_memory_gb", ".1f"),
    "preflight's peak (GB)": ("preflight_memory_gb", ".1f"),
    "max abs(ratio - 1)": ("ratio_deviation", ".1g"),
}


# ---- Tables ----


def in_markdown(results: dict[str, Any]) -> str:
    """The times of all cases, and the parts of those of `presets`."""
    peak = f"{results['machine']}. Matrix product: {results['matmul_peak_tflops']:.3g} TFLOP/s"
    if "grow" in results:
        labels = ["number", "value", "method"]
        entries = flatten(results["grow"], 3)
        tables = [table(labels, entries, TIME_COLUMNS), table(labels, entries, EFFICIENCY_COLUMNS)]
        return "\n\n".join([peak, "Time:", tables[0], "Efficiency:", tables[1]])
    labels = ["options", "method"]
    entries = flatten(results["options"], 2)
    presets = {name: entry for name, entry in results["presets"].items() if "error" not in entry}
    text = [
        peak,
        "Time:",
        table(labels, entries, TIME_COLUMNS),
        "Efficiency:",
        table(labels, entries, EFFICIENCY_COLUMNS),
        "Time per part (s/iteration):",
        table_of_parts(presets, "parts", list(PARTS), ".3g"),
        "Images through the transformer per iteration:",
        table_of_parts(presets, "passes", list(PASSES), "g"),
    ]
    if results.get("one_by_one_speedup"):
        text.append(f"One image and one step at a time takes {results['one_by_one_speedup']:.1f} times as long.")
    return "\n\n".join(text)


def flatten(tree: dict[str, Any], depth: int) -> dict[tuple[str, ...], dict[str, Any]]:
    """The entries at this depth, by their path."""
    if depth == 0:
        return {(): tree}
    entries = {}
    for name, part in tree.items():
        for path, entry in flatten(part, depth - 1).items():
            entries[name, *path] = entry
    return entries


def table(
    labels: list[str], entries: dict[tuple[str, ...], dict[str, Any]], columns: dict[str, tuple[str, str]]
) -> str:
    """One row per entry, in Markdown, without empty columns."""
    shown = {}
    for title, (name, form) in columns.items():
        if any(entry.get(name) is not None for entry in entries.values()):
            shown[title] = (name, form)
    rows = [[*labels, *shown], ["---"] * (len(labels) + len(shown))]
    for key, entry in entries.items():
        row = [METHOD_NAMES.get(label, label) for label in key]
        for name, form in shown.values():
            value = entry.get(name)
            row.append("" if value is None else f"{value:{form}}")
        rows.append(row)
    return in_rows(rows)


def table_of_parts(presets: dict[str, dict[str, Any]], key: str, parts: list[str], form: str) -> str:
    """One row per part and one column per preset, in Markdown."""
    header = ["part", *(f"{METHOD_NAMES[name]} ({entry['options']})" for name, entry in presets.items())]
    rows = [header, ["---"] * len(header)]
    for part in parts:
        rows.append([part.replace("_", " "), *(f"{entry[key][part]:{form}}" for entry in presets.values())])
    return in_rows(rows)


def in_rows(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---- Figures ----


def draw_presets(results: dict[str, Any], file: Path) -> None:
    """Left the parts of an iteration, right the relative times under all options and those of the paper."""
    presets = {name: entry for name, entry in results["presets"].items() if "error" not in entry}
    rows = np.arange(len(presets))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 2.1 + 0.5 * len(presets)), sharey=True, width_ratios=(3, 2), layout="constrained"
    )
    start = np.zeros(len(presets))
    for part, color in PARTS.items():
        seconds = np.array([entry["parts"][part] for entry in presets.values()])
        label = part.replace("_", " ")
        left.barh(rows, seconds, left=start, color=color, edgecolor="white", linewidth=0.5, label=label)
        start += seconds
    left.set_yticks(rows, [f"{METHOD_NAMES[name]}\n({entry['options']})" for name, entry in presets.items()])
    left.invert_yaxis()
    left.set_title("Time per part", pad=38)
    left.set_xlabel("time (s/iteration)")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, frameon=False, fontsize=8)

    for offset, (option, (marker, color)) in zip((-0.3, -0.1, 0.1, 0.3), OPTION_STYLES.items(), strict=True):
        ratios = []
        places = []
        for row, name in enumerate(presets):
            ratio = results["options"].get(option, {}).get(name, {}).get("ratio_to_dancegrpo")
            if ratio is not None:
                ratios.append(ratio)
                places.append(row + offset)
        right.plot(ratios, places, marker, color=color, label=option)
    published = {row: PUBLISHED[name] for row, name in enumerate(presets) if name in PUBLISHED}
    low = [row - 0.4 for row in published]
    high = [row + 0.4 for row in published]
    right.vlines(list(published.values()), low, high, color="black", label="published")
    right.set_xlim(left=0)
    right.set_title("Relative time", pad=38)
    right.set_xlabel("time relative to DanceGRPO")
    right.grid(axis="x", alpha=0.3)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_growth(results: dict[str, Any], file: Path) -> None:
    """The time of an iteration as each number grows."""
    figure, axes = plt.subplots(1, len(results["grow"]), figsize=(12, 3.2), sharey=True, layout="constrained")
    for axis, (name, values) in zip(axes, results["grow"].items(), strict=True):
        for preset, (color, marker) in GROWTH_STYLES.items():
            times = {int(v): e[preset].get("seconds_per_iteration") for v, e in values.items() if preset in e}
            axis.plot(list(times), list(times.values()), marker, color=color, label=METHOD_NAMES[preset])
        axis.set_xlabel(GROWTH_LABELS[name])
        axis.grid(alpha=0.3)
    figure.suptitle("Time of an iteration")
    axes[0].set_ylabel("time (s/iteration)")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
