"""How much of a gain, and of an exploit, the base model takes back in hybrid inference.

    python examples/studies/hybrid_ratio.py

Trains all weights of the bundled tiny FLUX on its true reward, and on one that ignores the prompt (`redness` of
`reward_hacking.py`), and lets the trained model take different shares of the denoising steps of held-out images.
Writes `results.json`, `results.md` and `results.png`.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from reward_hacking import redness
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, hybrid_inference, toy
from diffusers_mixgrpo.commands.command_line import read_yaml
from diffusers_mixgrpo.commands.figures import plt


EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))

from compare_report import plus_minus, standard_error, table  # noqa: E402


REWARDS = {"true reward": toy.toy_reward, "redness": redness}
STEPS = ("height", "width", "max_sequence_length", "num_inference_steps")


@dataclass
class Arguments:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each reward per seed."})
    iterations: int = field(default=30, metadata={"help": "Iterations of each run."})
    ratios: list[float] = field(
        default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
        metadata={"help": "Shares of the denoising steps that the trained model takes."},
    )
    num_eval_prompts: int = field(default=128, metadata={"help": "Held-out prompts."})
    config: str = field(
        default=str(EXAMPLES / "configs" / "toy_sweep.yaml"), metadata={"help": "YAML file of the settings."}
    )
    output_dir: str = field(default="outputs/hybrid_ratio", metadata={"help": "Folder for the results."})


def main(argv: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    scores: dict[str, dict[str, list[list[float]]]] = {}
    jobs = [(name, seed) for name in REWARDS for seed in args.seeds]
    for name, seed in tqdm(jobs, unit="run"):
        for judged, values in _train_and_judge(args, name, seed).items():
            scores.setdefault(name, {}).setdefault(judged, []).append(values)
    results = {"settings": vars(args), "scores": scores}
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = in_markdown(scores, args.ratios)
    (folder / "results.md").write_text(text, encoding="utf-8")
    draw(scores, args.ratios, folder / "results.png")
    print(text)


def _train_and_judge(args: Arguments, name: str, seed: int) -> dict[str, list[float]]:
    """Train on one reward. The mean of each reward over the held-out prompts, at each ratio."""
    settings = read_yaml(args.config)
    fields = {key: value for key, value in settings.items() if key in MixGRPOConfig.__dataclass_fields__}
    prompts = toy.prompts("test", args.num_eval_prompts)
    with tempfile.TemporaryDirectory() as output_dir:
        changes = {"output_dir": output_dir, "seed": seed, "disable_tqdm": True, "logging_images_steps": None}
        changes |= {"reward_weights": None, "report_to": "none", "save_strategy": "no"}
        config = MixGRPOConfig(**(fields | changes))
        config.max_steps = args.iterations * config.optimizer_steps_per_iteration
        trainer = MixGRPOTrainer(
            model=toy.load(),
            reward_funcs=REWARDS[name],
            args=config,
            train_dataset=[{"prompt": text} for text in toy.prompts("train")],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    trainer.pipe.set_progress_bar_config(disable=True)
    base = toy.load().transformer
    found: dict[str, list[float]] = {judged: [] for judged in REWARDS}
    for ratio in args.ratios:
        generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
        with hybrid_inference(trainer.pipe, ratio, base_transformer=base):
            images = trainer.pipe(prompts, generator=generators, **{key: settings[key] for key in STEPS}).images
        for judged, reward in REWARDS.items():
            found[judged].append(float(np.mean(reward(prompts, images))))
    return found


def in_markdown(scores: dict[str, dict[str, list[list[float]]]], ratios: list[float]) -> str:
    """One row per trained reward and ratio, with standard errors over seeds."""
    names = [f"{name}, {ratio:.0%}" for name in scores for ratio in ratios]
    columns: dict[str, list[str]] = {judged: [] for judged in REWARDS}
    for by_judge in scores.values():
        for judged, runs in by_judge.items():
            columns[judged] += [plus_minus(values) for values in zip(*runs, strict=True)]
    return table(names, columns) + "\n"


def draw(scores: dict[str, dict[str, list[list[float]]]], ratios: list[float], file: Path) -> None:
    """Both rewards against the share of the steps, one panel per trained reward."""
    figure, axes = plt.subplots(1, len(scores), figsize=(8.4, 3.4), sharey=True, layout="constrained")
    for axis, (name, by_judge) in zip(np.atleast_1d(axes), scores.items(), strict=True):
        for judged, runs in by_judge.items():
            values = np.array(runs)
            axis.errorbar(ratios, values.mean(0), standard_error(values), marker="o", capsize=3, label=judged)
        axis.set_title(f"trained on the {name}", fontsize=10)
        axis.set_xlabel("share of the steps by the trained model")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
