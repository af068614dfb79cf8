"""Trains a LoRA, or all weights, of a FLUX pipeline with MixGRPO.

On the bundled tiny FLUX, in minutes on a laptop:

    python examples/train_flux_mixgrpo.py

On FLUX.1-dev, with your own reward and prompts (one a line, or a data set with a column "prompt"):

    accelerate launch examples/train_flux_mixgrpo.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \
        --reward_funcs my_module:my_reward --dataset_name prompts.txt --output_dir flux-mixgrpo --push_to_hub

Every field of `MixGRPOConfig` is a flag, and can stand in a YAML file given with `--config`.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from report import check_reload, draw_before_after, draw_reward_curve, in_words, write_summary
from trl import TrlParser

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, toy


@dataclass
class ScriptArguments:
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub repository of a FLUX pipeline. The bundled tiny one if unset."}
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards: a name (hpsv2, pickscore, ...), a Hub id, a URL, module:function, or one of the toy's."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Text file with a prompt a line, or a data set with a column 'prompt'."}
    )
    num_eval_prompts: int | None = field(
        default=None, metadata={"help": "Prompts held out to evaluate on. A tenth of all, at most 64, if unset."}
    )
    lora_rank: int = field(default=64, metadata={"help": "Rank of the LoRA; 0 trains all weights."})
    lora_alpha: int = field(default=128, metadata={"help": "Scale of the LoRA."})
    dry_run: bool = field(default=False, metadata={"help": "Only tell what the run will do and cost, and stop."})


def main():
    # 1. Parse. Without a pipeline or a configuration of one's own it is the toy's.
    argv = sys.argv[1:]
    if "--config" not in argv and not any(a.startswith("--pretrained_model_name_or_path") for a in argv):
        argv = ["--config", str(Path(__file__).parent / "configs" / "toy.yaml"), *argv]
    script, config = TrlParser((ScriptArguments, MixGRPOConfig)).parse_args_and_config(argv)

    # 2. Build
    train_dataset, eval_dataset = load_prompts(script)
    peft_config = None
    if script.lora_rank > 0:
        peft_config = LoraConfig(r=script.lora_rank, lora_alpha=script.lora_alpha, init_lora_weights="gaussian")
    model = script.pretrained_model_name_or_path or toy.path()
    trainer = MixGRPOTrainer(
        model=model,
        reward_funcs=[getattr(toy, name, name) for name in script.reward_funcs],
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )

    if script.dry_run:
        print(trainer.preflight())
        return

    # 3. Train, between two evaluations on prompts that training does not see
    shown = [row["prompt"] for row in eval_dataset.select(range(min(8, len(eval_dataset))))] if eval_dataset else []
    before, pictures_before = (trainer.evaluate(), trainer.sample_images(shown)) if eval_dataset else ({}, [])
    seconds = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint).metrics["train_runtime"]
    after, pictures_after = (trainer.evaluate(), trainer.sample_images(shown)) if eval_dataset else ({}, [])

    # 4. Save, and push
    trainer.save_model()
    trainer.create_model_card()
    if config.push_to_hub:
        trainer.push_to_hub()

    # 5. Show what was gained
    if not trainer.is_world_process_zero():
        return
    summary = write_summary(trainer, script, before, after, seconds)
    draw_reward_curve([{"step": 0, **before}, *trainer.state.log_history], config.output_dir)
    if eval_dataset:
        scores = [trainer.reward_funcs[0](shown, pictures) for pictures in (pictures_before, pictures_after)]
        draw_before_after(shown, pictures_before, pictures_after, *scores, config.output_dir)
    if script.pretrained_model_name_or_path is None and peft_config is not None:
        summary["reload_max_difference"] = check_reload(model, config, shown, pictures_after)
    print(in_words(summary, config.output_dir))


def load_prompts(script: ScriptArguments) -> tuple[Dataset, Dataset | None]:
    """Prompts to train on and, disjoint from them, prompts to evaluate on."""
    name, count = script.dataset_name, script.num_eval_prompts
    if name is None:
        count = 200 if count is None else count
        train = Dataset.from_dict({"prompt": toy.prompts("train")})
        return train, Dataset.from_dict({"prompt": toy.prompts("test", count)}) if count else None
    if os.path.isfile(name):
        lines = dict.fromkeys(line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines())
        dataset = Dataset.from_dict({"prompt": [line for line in lines if line]})
    elif name.endswith((".txt", ".csv", ".json")):
        raise FileNotFoundError(f"`dataset_name`={name!r} does not exist (the working directory is {os.getcwd()}).")
    else:
        dataset = load_dataset(name, split="train")
    count = min(len(dataset) // 10, 64) if count is None else count
    if count >= len(dataset) and count:
        raise ValueError(
            f"`num_eval_prompts`={count} leaves none of the {len(dataset)} prompts of `dataset_name`={name!r} to "
            "train on. Choose fewer, or 0 for no evaluation."
        )
    train = dataset.select(range(len(dataset) - count))
    return train, dataset.select(range(len(dataset) - count, len(dataset))) if count else None


if __name__ == "__main__":
    main()
