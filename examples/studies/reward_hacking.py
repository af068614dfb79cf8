"""Trains the bundled tiny FLUX on a reward that can be exploited, and shows how the guard notices.

    python examples/studies/reward_hacking.py
    python examples/studies/reward_hacking.py --honest --num_eval_prompts 253

The first command trains on the redness of an image, whatever its prompt. The guard has image statistics and a reward
that is never trained on, `toy.toy_reward`. The second one trains on `toy.toy_reward` itself, and the guard stays
silent, with enough prompts to see that the reward rises. Each takes two to three minutes on one core.

Writes a figure and a JSON file of the evaluations: images of fixed prompts by optimizer steps, and below them the
rewards and statistics.
"""

import json
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from PIL import Image
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, toy
from diffusers_mixgrpo.commands.command_line import TOY_CONFIGURATION, read_yaml
from diffusers_mixgrpo.commands.figures import plt
from diffusers_mixgrpo.training.hacking_guard import IMAGES, SHIFT, HackingGuard


# Some of the held-out prompts
SHOWN = (
    "a small red circle at the top on gray",
    "a large yellow square at the left on white",
    "three cyan triangles in a row on black",
    "two blue circles in a row on white",
)
ALARM = "#aa3377"
# Of MixGRPO, where the defaults differ
PUBLISHED = {"sde_type": "flow", "eta": 0.7, "step_weighting": "none", "scale_rewards": "group"}
PUBLISHED |= {"lr_scheduler_type": "constant", "window_strategy": "frozen", "window_size": 4}
SETTINGS = ("height", "width", "max_sequence_length", "num_inference_steps", "epsilon")


@dataclass
class Arguments:
    honest: bool = field(default=False, metadata={"help": "Train on the true reward."})
    iterations: int = field(default=0, metadata={"help": "Iterations; 32, or 48 with `honest`, if unset."})
    eval_every: int = field(default=4, metadata={"help": "Iterations between evaluations."})
    learning_rate: float = field(default=8e-4, metadata={"help": "Learning rate."})
    num_eval_prompts: int = field(default=64, metadata={"help": "Held-out prompts."})
    output: str = field(default="", metadata={"help": "The figure. In outputs/reward_hacking if unset."})


@dataclass
class Point:
    """One evaluation: the optimizer step, its metrics, and the images of the shown prompts."""

    step: int
    metrics: dict[str, float]
    images: list[Image.Image]


def redness(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """How much more red than green and blue an image is, in [-1, 1]: a reward that ignores the prompt."""
    means = [np.asarray(image, dtype=float).mean((0, 1)) / 255 for image in images]
    return [float(red - (green + blue) / 2) for red, green, blue in means]


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    name = "honest" if args.honest else "reward_hacking"
    output = Path(args.output or f"outputs/reward_hacking/{name}.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, folder)
        recorder = Recorder(trainer)
        trainer.add_callback(recorder)
        trainer.evaluate()
        trainer.train()
    points = recorder.points
    guard = next(part for part in trainer.callback_handler.callbacks if isinstance(part, HackingGuard))
    write(points, guard, output.with_suffix(".json"))
    draw(points, guard, trainer.reward_names[0], trainer.evaluator.rewards.names[0], output)
    print(f"Written to {output}, and the evaluations beside it.")


def make_trainer(args: Arguments, folder: str) -> MixGRPOTrainer:
    shared = read_yaml(TOY_CONFIGURATION)
    steps_per_iteration = 2  # of 64 images
    config = MixGRPOConfig(
        **{name: shared[name] for name in SETTINGS},
        **PUBLISHED,
        num_generations=8,
        per_device_train_batch_size=32,
        steps_per_generation=steps_per_iteration,
        max_steps=steps_per_iteration * (args.iterations or (48 if args.honest else 32)),
        learning_rate=args.learning_rate,
        eval_strategy="steps",
        eval_steps=steps_per_iteration * args.eval_every,
        per_device_eval_batch_size=64,
        logging_steps=steps_per_iteration,
        output_dir=folder,
        save_strategy="no",
        report_to="none",
        logging_images_steps=None,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = MixGRPOTrainer(
        model=toy.load(),
        reward_funcs=toy.toy_reward if args.honest else redness,
        args=config,
        train_dataset=[{"prompt": text} for text in toy.prompts("train")],
        eval_dataset=[{"prompt": text} for text in toy.prompts("test", args.num_eval_prompts)],
        peft_config=LoraConfig(r=shared["lora_rank"], lora_alpha=shared["lora_alpha"], init_lora_weights="gaussian"),
        eval_reward_funcs=toy.wholly_right if args.honest else toy.toy_reward,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Recorder(TrainerCallback):
    """Keeps the evaluations, with images of the shown prompts."""

    def __init__(self, trainer: MixGRPOTrainer) -> None:
        self.trainer = trainer
        self.points: list[Point] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        images = self.trainer.sample_images(SHOWN)
        self.points.append(Point(state.global_step, dict(metrics), images))
        print(in_words(self.points), flush=True)


def in_words(points: list[Point]) -> str:
    metrics = points[-1].metrics
    shown = [f"{n.split('/')[1]} {v:.3f}" for n, v in metrics.items() if n.endswith("/mean") or "images/" in n]
    alarms = sum(int(point.metrics["eval_alarms"]) for point in points)
    return f"Step {points[-1].step}: {', '.join(shown)}. Alarms so far: {alarms}."


def write(points: list[Point], guard: HackingGuard, file: Path) -> None:
    content = {"baseline": guard.baselines["eval"], "evaluations": [{"step": p.step, **p.metrics} for p in points]}
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


# ---- The figure ----


def draw(points: list[Point], guard: HackingGuard, trained: str, untrained: str, file: Path) -> None:
    """Rows of images over the optimizer steps, and below them the curves, with the first alarm in both."""
    steps = [point.step for point in points]
    alarm = next((point.step for point in points if point.metrics["eval_alarms"]), None)
    shown = [round(place) for place in np.linspace(0, len(points) - 1, min(9, len(points)))]
    figure = plt.figure(figsize=(9, 8.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    grid = top.subplots(len(SHOWN), len(shown), squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    for column, place in enumerate(shown):
        point = points[place]
        rings = point.metrics["eval_alarms"] > 0
        title = f"step {point.step}\n{'alarm' if rings else ''}" if column else "before\ntraining"
        grid[0, column].set_title(title, fontsize=9, color=ALARM if rings else "black")
        for axes, image in zip(grid[:, column], point.images, strict=True):
            axes.imshow(np.asarray(image), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, prompt in zip(grid[:, 0], SHOWN, strict=True):
        axes.set_ylabel(textwrap.fill(prompt, 17), fontsize=8.5, rotation=0, ha="right", va="center")
    left, right = bottom.subplots(1, 2)
    _draw_rewards(left, points, trained, untrained)
    _draw_statistics(right, points, guard)
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.set_xticks(steps[:: max(1, len(steps) // 7)])
        axes.grid(alpha=0.3)
        if alarm is not None:
            axes.axvline(alarm, color=ALARM, linestyle="--", linewidth=1.2)
            axes.annotate(
                "first alarm",
                (alarm, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-4, -4),
                color=ALARM,
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                fontsize=8.5,
            )
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _draw_rewards(axes: Any, points: list[Point], trained: str, untrained: str) -> None:
    steps = [point.step for point in points]
    for name, label, color in ((trained, "trained on", "#cc3311"), (untrained, "never trained on", "#4477aa")):
        means = [point.metrics[f"eval_rewards/{name}/mean"] for point in points]
        axes.plot(steps, means, "o-", color=color, markersize=4, label=f"{name} ({label})")
    axes.set_title("Rewards on held-out prompts", fontsize=10)
    axes.set_ylabel("mean reward")
    axes.set_ylim(-0.05, 1)
    axes.legend(fontsize=8.5)


def _draw_statistics(axes: Any, points: list[Point], guard: HackingGuard) -> None:
    """Statistics in the unit in which the guard compares them."""
    steps = [point.step for point in points]
    baseline = guard.baselines["eval"]
    axes.axhspan(-SHIFT, SHIFT, color="#777777", alpha=0.15, linewidth=0, label="no alarm")
    for series in (name for name in baseline if name.startswith(IMAGES)):
        mean, std, _ = baseline[series]
        moved = [(point.metrics[f"eval_{series}"] - mean) / std for point in points]
        axes.plot(steps, moved, "o-", markersize=4, label=series.removeprefix(IMAGES))
    axes.set_title("Image statistics against the first evaluation", fontsize=10)
    axes.set_ylabel("change (standard deviations over prompts)")
    axes.legend(fontsize=8.5)


if __name__ == "__main__":
    main()
