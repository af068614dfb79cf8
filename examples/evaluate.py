"""Scores the pictures of a FLUX pipeline, with or without what was trained, by any rewards.

    python examples/evaluate.py --lora outputs/toy --compare_base  # the tiny FLUX before and after `make demo`
    python examples/evaluate.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --lora flux-mixgrpo \
        --cutoff_step_ratio 0.8 --prompts hpdv2 --num_prompts 400 --reward_funcs hpsv2 pickscore imagereward

Writes `evaluation.md` (means and their standard errors over prompts), `evaluation.json` (these and each score) and
`grid.png`. Prompt `i` is drawn with seed `seed + i`, as the trainer's `evaluate` does it.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from diffusers_mixgrpo import HybridInferenceCallback, MixGRPOConfig, toy
from diffusers_mixgrpo.reward_calls import RewardRunner
from diffusers_mixgrpo.rewards import load_reward
from diffusers_mixgrpo.sample_grid import save_sample_grid


SAMPLING = ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length")
STYLES = ("anime", "concept-art", "paintings", "photo")
READERS = {".json": Dataset.from_json, ".jsonl": Dataset.from_json, ".csv": Dataset.from_csv}
GRID = 16  # prompts in the grid


def flag(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluationArguments:
    pretrained_model_name_or_path: str | None = flag("Folder or Hub repository. The bundled tiny FLUX if unset.")
    lora: str | None = flag("A trained LoRA: folder, file or Hub repository.")
    transformer: str | None = flag("A transformer trained in all its weights: folder or Hub repository.")
    cutoff_step_ratio: float | None = flag("Hybrid inference: the trained model's share of the steps, like 0.8.")
    compare_base: bool = flag("Score the base model as well, on the same prompts and seeds.", False)
    prompts: str | None = flag("Text file, a prompt a line; .json, .jsonl, .csv or data set with 'prompt'; or hpdv2.")
    split: str = flag("Split of a data set on the Hub.", "test")
    num_prompts: int | None = flag("So many, from the first. All if unset.")
    reward_funcs: list[str] = field(default_factory=list, metadata={"help": "As in train_flux_mixgrpo.py."})
    reward_init_kwargs: str = flag('Arguments of rewards, as JSON: {"hpsv2": {"version": "v2.0"}}.', "{}")
    height: int | None = flag("In pixels. 720 if unset; the toy has its own sizes and numbers.")
    width: int | None = flag("In pixels. 720 if unset.")
    num_inference_steps: int | None = flag("25 if unset.")
    guidance_scale: float | None = flag("3.5 if unset.")
    max_sequence_length: int | None = flag("T5 tokens per prompt. 512 if unset.")
    shift: float | None = flag("Static timestep shift. The pipeline's own schedule if unset.")
    batch_size: int = flag("Pictures drawn at once.", 4)
    seed: int = flag("Seed of the first prompt.", 0)
    output_dir: str = flag("Where the results go.", "outputs/evaluation")

    def __post_init__(self):
        file = Path(__file__).with_name("configs") / "toy.yaml"
        toys = {} if self.pretrained_model_name_or_path else yaml.safe_load(file.read_text(encoding="utf-8"))
        for name in SAMPLING:
            if getattr(self, name) is None:
                setattr(self, name, toys.get(name, getattr(MixGRPOConfig, name)))
        self.reward_funcs = self.reward_funcs or toys.get("reward_funcs", [])
        if self.prompts is None and not toys:
            raise ValueError("`prompts` is needed with a pipeline of one's own: a file, a data set, or hpdv2.")
        if self.lora and self.transformer:
            raise ValueError("`lora` and `transformer` exclude each other: what was trained is one of them.")
        if (self.compare_base or self.cutoff_step_ratio is not None) and not (self.lora or self.transformer):
            raise ValueError("`compare_base` and `cutoff_step_ratio` need what was trained: `lora` or `transformer`.")


def main(argv: list[str] | None = None):
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # else it remarks that a LoRA has no part for the text encoders
    (args,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(argv)

    # 1. Load
    rows, device = load_rows(args), "cuda" if torch.cuda.is_available() else "cpu"
    with naming("reward_init_kwargs", args.reward_init_kwargs):
        options = json.loads(args.reward_init_kwargs)
        if unknown := set(options) - set(args.reward_funcs):
            raise ValueError(f"there is no {', '.join(unknown)} in `reward_funcs`={args.reward_funcs}")
    rewards = [getattr(toy, name, None) or load_reward(name, **options.get(name, {})) for name in args.reward_funcs]
    runner = RewardRunner(rewards, device=device)
    pipe, base, trained = load_pipeline(args, device)

    # 2. Draw and score
    variants = ["base", "trained"] if args.compare_base else ["trained" if args.lora or args.transformer else "base"]
    ratio, scores, pictures = args.cutoff_step_ratio, {}, {}
    hybrid = None if ratio is None else HybridInferenceCallback(ratio, base.to(device) if args.transformer else None)
    with tqdm(total=len(rows) * len(variants), unit="picture") as bar:
        for variant in variants:
            bar.set_description(variant)
            pipe.transformer = base if variant == "base" else trained
            pipe.to(device)
            if args.lora:
                pipe.disable_lora() if variant == "base" else pipe.enable_lora()
            callback = hybrid if variant == "trained" else None
            scores[variant], pictures[variant] = draw_and_score(pipe, rows, runner, args, bar, callback)

    # 3. Compare, prompt by prompt, and write
    if args.compare_base:
        scores["difference"] = scores["trained"] - scores["base"]
    results = {v: dict(zip(runner.names, map(summarise, s), strict=True)) for v, s in scores.items()}
    text, folder, prompts = in_markdown(args, runner, results), Path(args.output_dir), [row["prompt"] for row in rows]
    pairs = [(v, i) for i in range(len(rows[:GRID])) for v in variants]  # to be looked at side by side
    captions = [f"{v}, {runner.names[0]} {float(scores[v][0, i]):.3f}: {prompts[i]}" for v, i in pairs]
    save_sample_grid([pictures[v][i] for v, i in pairs], captions, folder / "grid.png", tile_size=200)
    record = json.dumps({"settings": vars(args), "results": results, "prompts": prompts}, indent=2)
    (folder / "evaluation.json").write_text(record + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(text, encoding="utf-8")
    print(f"{text}\nWritten to {folder}: evaluation.md, evaluation.json, grid.png")


@contextmanager
def naming(argument: str, value: str) -> Any:
    """Errors of reading what an argument says name that argument."""
    try:
        if value.startswith((".", "/", "~")) or value.endswith((".txt", *READERS)):
            Path(value).expanduser().stat()  # a path, and no name on the Hub
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{argument}`={value!r} cannot be read: {error}") from error


def load_rows(args: EvaluationArguments) -> list[dict[str, Any]]:
    """The prompts, with the other columns of their data set, which go to the rewards."""
    name, rows = args.prompts or "", [{"prompt": prompt} for prompt in toy.prompts("test")]
    with naming("prompts", name):
        if name == "hpdv2":  # in turn from each style, so that the first prompts are a fair share of all
            files = [hf_hub_download("zhwang/HPDv2", f"benchmark/{s}.json", repo_type="dataset") for s in STYLES]
            turns = zip(*(json.loads(Path(file).read_text(encoding="utf-8")) for file in files), strict=True)
            rows = [{"prompt": prompt} for turn in turns for prompt in turn]
        elif Path(name).is_file() and Path(name).suffix not in READERS:
            lines = map(str.strip, Path(name).read_text(encoding="utf-8").splitlines())
            rows = [{"prompt": line} for line in lines if line]
        elif name:
            reader = READERS.get(Path(name).suffix)
            rows = reader(name) if reader else load_dataset(name, split=args.split)
        if len(rows) and "prompt" not in rows[0]:
            raise ValueError(f"it has no column 'prompt', but {', '.join(rows[0])}")
    count = len(rows) if args.num_prompts is None else args.num_prompts
    if not 0 < count <= len(rows):
        raise ValueError(f"`num_prompts` must be from 1 to {len(rows)}, which `prompts`={name!r} has, got {count}.")
    return [dict(rows[i]) for i in range(count)]


def load_pipeline(args: EvaluationArguments, device: str) -> tuple[FluxPipeline, Any, Any]:
    """The pipeline with what was trained, the base transformer, and the trained one (the same with a LoRA in it)."""
    name, dtype = args.pretrained_model_name_or_path or toy.path(), {"cuda": torch.bfloat16}.get(device, torch.float32)
    with naming("pretrained_model_name_or_path", name):
        pipe = FluxPipeline.from_pretrained(name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if args.shift is not None:
        changed = dict(pipe.scheduler.config, shift=args.shift, use_dynamic_shifting=False)
        pipe.scheduler = pipe.scheduler.from_config(changed)
    base = pipe.transformer
    if args.lora:
        with naming("lora", args.lora):
            pipe.load_lora_weights(args.lora)
            if not getattr(pipe.transformer, "peft_config", None):
                raise ValueError("it holds no LoRA for the pipeline's transformer")
    if args.transformer:
        with naming("transformer", args.transformer):
            part = None if Path(args.transformer, "config.json").is_file() else "transformer"  # as the trainer saves
            pipe.transformer = FluxTransformer2DModel.from_pretrained(args.transformer, subfolder=part, dtype=dtype)
    return pipe, base, pipe.transformer


def draw_and_score(pipe, rows, runner, args, bar, callback) -> tuple[torch.Tensor, list[Any]]:
    """Scores `(K, n)` of a picture of each prompt, NaN where there is none, and the first pictures."""
    scores, shown, waiting = [], [], 0
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        images = pipe(
            [row["prompt"] for row in batch],
            generator=[torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))],
            callback_on_step_end=callback,
            **{name: getattr(args, name) for name in SAMPLING},
        ).images
        runner.start(batch, images)
        done, waiting = start + len(batch), waiting + len(batch)
        if start == 0 or done == len(rows) or waiting >= 128:  # at first: errors should come soon
            scores, waiting = [*scores, runner.finish()], 0
        shown += images[: max(0, GRID - len(shown))]
        bar.update(len(batch))
    return torch.cat(scores, dim=1), shown


def summarise(scores: torch.Tensor) -> dict[str, Any]:
    """Mean and its standard error over the prompts that could be scored, and each score."""
    scored = scores[~scores.isnan()]
    n, each = len(scored), [float(score) if score.isfinite() else None for score in scores]
    mean, error = float(scored.mean()) if n else None, float(scored.std()) / n**0.5 if n > 1 else None
    return {"mean": mean, "standard_error": error, "n": n, "failed": len(scores) - n, "scores": each}


def in_markdown(args: EvaluationArguments, runner: RewardRunner, results: dict[str, dict]) -> str:
    """The settings, the table, and why scores are missing."""
    settings = ", ".join(f"{name}={value}" for name, value in vars(args).items() if value is not None)
    lines = [settings, "", "| reward | model | mean | standard error | n | failed |", "| --- | --- |" + " ---: |" * 4]
    for name in runner.names:
        for variant, summary in ((variant, every[name]) for variant, every in results.items()):
            numbers = ("-" if x is None else f"{x:.4f}" for x in (summary["mean"], summary["standard_error"]))
            lines.append(f"| {name} | {variant} | {' | '.join(numbers)} | {summary['n']} | {summary['failed']} |")
    return "\n".join([*lines, *(f"\nLast error of {name}: {error!r}" for name, error in runner.errors.items())]) + "\n"


if __name__ == "__main__":
    main()
