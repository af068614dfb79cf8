"""Trains a LoRA, or all weights, of a pipeline with MixGRPO.

On the bundled tiny FLUX, in minutes on a laptop:

    diffusers-mixgrpo train

On FLUX.1-dev, with your own reward and prompts (one per line, or a dataset with a column "prompt"):
    accelerate launch -m diffusers_mixgrpo train --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \
        --reward_funcs my_module:my_reward --dataset_name prompts.txt --output_dir flux-mixgrpo --push_to_hub

Every field of `MixGRPOConfig` is a flag, and can be set in a YAML file that is passed with `--config`.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig

from .. import argument_rules as must_be
from .. import toy
from ..mixgrpo_config import MixGRPOConfig
from ..mixgrpo_trainer import MixGRPOTrainer
from ..reports.html_report import write_report
from .before_after import Evaluation, draw_before_after, evaluate, sample_examples
from .command_line import DATASET_READERS, TOY_CONFIGURATION, flag, parse
from .figures import draw_by_window, draw_reward_curve
from .summary import check_reload, in_words, write_summary


@dataclass
class ScriptArguments:
    pretrained_model_name_or_path: str | None = flag(
        "Folder or Hub repository of a pipeline. The bundled tiny one if unset."
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards: a name (hpsv2, pickscore, ...), module:function, a URL, or a CLIP model."},
    )
    eval_reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards that are never trained on, only called in evaluations; higher must be better."},
    )
    dataset_name: str | None = flag(
        "Text file with one prompt per line; .json, .jsonl or .csv, a folder or a dataset with a column 'prompt'."
    )
    num_eval_prompts: int | None = flag("Number of held-out prompts. A tenth of all, at most 64, if unset.")
    lora_rank: int = flag("Rank of the LoRA; 0 trains all weights.", 64)
    lora_alpha: int = flag("Scale of the LoRA.", 128)
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Layers that the LoRA adapts, or all-linear. Those of the pipeline's family if unset."},
    )
    dry_run: bool = flag("Only print what the run will do and cost.", False)

    def __post_init__(self) -> None:
        count = must_be.integer(0)
        limits = {"lora_rank": count, "lora_alpha": must_be.integer(1), "num_eval_prompts": must_be.optional(count)}
        must_be.check_fields(self, must_be.rules_of(ScriptArguments, **limits))


def main(argv: list[str] | None = None) -> None:
    # 1. Parse. The configuration of the toy is the default for the bundled pipeline.
    argv = sys.argv[1:] if argv is None else argv
    flags = {argument.split("=")[0] for argument in argv}
    if not flags & {"--config", "--pretrained_model_name_or_path"}:
        argv = ["--config", str(TOY_CONFIGURATION), *argv]
    script, config = parse(argv, ScriptArguments, MixGRPOConfig)

    # 2. Build
    train_dataset, eval_dataset = load_prompts(script)
    trainer = MixGRPOTrainer(
        model=script.pretrained_model_name_or_path or toy.path(),
        reward_funcs=script.reward_funcs,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=lora_of(script),
        eval_reward_funcs=script.eval_reward_funcs,
    )
    if script.dry_run:
        print(trainer.preflight())
        return

    # 3. Train, and evaluate on the held-out prompts before and after
    before = evaluate(trainer)
    seconds = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint).metrics["train_runtime"]
    after = evaluate(trainer)

    # 4. Save and report first, and push last: a push that fails loses nothing.
    trainer.save_model(_internal_call=True)  # which does not push
    trainer.create_model_card()
    report(trainer, script, before, after, seconds)
    if config.push_to_hub:
        trainer.push_to_hub()


def lora_of(script: ScriptArguments) -> LoraConfig | None:
    """The LoRA to train, or `None` to train all weights."""
    if script.lora_rank == 0:
        return None
    targets: list[str] | str | None = script.lora_target_modules or None
    return LoraConfig(
        r=script.lora_rank,
        lora_alpha=script.lora_alpha,
        init_lora_weights="gaussian",
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )


def report(
    trainer: MixGRPOTrainer, script: ScriptArguments, before: Evaluation, after: Evaluation, seconds: float
) -> None:
    """Write figures, summary and report, and print the gain. All ranks sample the images; the first one writes."""
    folder = trainer.args.output_dir
    examples = sample_examples(trainer, before, after)
    if not trainer.is_world_process_zero():
        return
    draw_reward_curve([{"step": 0, **before.metrics}, *trainer.state.log_history], folder)
    draw_by_window({"": trainer.state.log_history}, os.path.join(folder, "by_window.png"))
    if examples:
        draw_before_after(examples, folder)
    difference = None
    if examples and trainer.weights.is_lora and script.pretrained_model_name_or_path is None:
        difference = check_reload(trainer, toy.path(), examples)
    summary = write_summary(trainer, script, before.metrics, after.metrics, seconds, difference)
    write_report(folder)
    print(in_words(summary, folder))


def load_prompts(script: ScriptArguments) -> tuple[Dataset, Dataset | None]:
    """Prompts to train on and, disjoint from them, prompts to evaluate on."""
    name = script.dataset_name
    count = script.num_eval_prompts
    if name is None:
        count = 200 if count is None else count
        train = Dataset.from_dict({"prompt": toy.prompts("train")})
        return train, Dataset.from_dict({"prompt": toy.prompts("test", count)}) if count else None
    if os.path.isfile(name) and (read := DATASET_READERS.get(Path(name).suffix)):
        dataset = read(name)
    elif os.path.isfile(name):
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines()]
        dataset = Dataset.from_dict({"prompt": [line for line in dict.fromkeys(lines) if line]})
    elif name.endswith((".txt", *DATASET_READERS)):
        raise FileNotFoundError(f"`dataset_name` must be a file, got {name!r} (working directory: {os.getcwd()}).")
    else:
        dataset = load_dataset(name, split="train")
    count = min(len(dataset) // 10, 64) if count is None else count
    if count and count >= len(dataset):
        raise ValueError(
            f"`num_eval_prompts` must be less than the {len(dataset)} prompts of {name!r}, got {count}. Pass a "
            "smaller number, or 0 for no evaluation."
        )
    train = dataset.select(range(len(dataset) - count))
    return train, dataset.select(range(len(dataset) - count, len(dataset))) if count else None
