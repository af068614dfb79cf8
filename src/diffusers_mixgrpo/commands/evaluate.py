"""Scores the images of a diffusers pipeline, before or after training, with any reward functions.

    diffusers-mixgrpo evaluate --lora outputs/toy --compare_base  # the tiny FLUX before and after `make demo`
    diffusers-mixgrpo evaluate --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev --lora flux-mixgrpo \
        --cutoff_step_ratio 0.8 --prompts hpdv2 --num_prompts 400 --reward_funcs hpsv2 pickscore imagereward

Writes `evaluation.md` (means and their standard errors over prompts), `evaluation.json` (the same with every score)
and `grid.png`. The image of prompt `i` has the seed `seed + i`, as in the trainer's `evaluate`.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from .. import toy
from ..hybrid_inference import hybrid_inference
from ..mixgrpo_config import MixGRPOConfig
from ..policies import PipelinePolicy, policy_class
from ..reports.sample_grid import Block, Tile, draw_grid, number, readable
from ..rewards import load_reward
from ..rewards.runner import RewardRunner
from ..training.datasets import open_images
from ..training.plan import PromptDataset
from .command_line import DATASET_READERS, TOY_CONFIGURATION, flag, parse, read_yaml


SAMPLING_ARGUMENTS = (
    *("height", "width", "num_inference_steps"),
    *("guidance_scale", "max_sequence_length", "negative_prompt"),
)
HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")
NUM_GRID_PROMPTS = 16
NUM_PENDING_IMAGES = 128  # kept in memory until they are scored


@dataclass
class EvaluationArguments:
    pretrained_model_name_or_path: str | None = flag("Folder or Hub repository. The bundled tiny pipeline if unset.")
    lora: str | None = flag("A trained LoRA: folder, file or Hub repository.")
    transformer: str | None = flag("A fully fine-tuned transformer: folder or Hub repository.")
    cutoff_step_ratio: float | None = flag("Hybrid inference: share of the steps for the trained model, such as 0.8.")
    compare_base: bool = flag("Score the base model as well, on the same prompts and seeds.", False)
    prompts: str | None = flag(
        "Text file with one prompt per line; .json, .jsonl, .csv or dataset with a column 'prompt'; or hpdv2."
    )
    split: str = flag("Split of a dataset on the Hub.", "test")
    num_prompts: int | None = flag("Number of prompts, from the first. All if unset.")
    reward_funcs: list[str] = field(default_factory=list, metadata={"help": "As in the training script."})
    reward_init_kwargs: str = flag('Arguments of rewards, as JSON: {"hpsv2": {"version": "v2.0"}}.', "{}")
    height: int | None = flag("In pixels. The pipeline's own default if unset; the toy has its own sampling defaults.")
    width: int | None = flag("In pixels. The pipeline's own default if unset.")
    num_inference_steps: int | None = flag("25 if unset.")
    guidance_scale: float | None = flag("The pipeline's own default if unset.")
    max_sequence_length: int | None = flag("Text tokens per prompt. The pipeline's own default if unset.")
    negative_prompt: str | None = flag("For classifier-free guidance. That of the pipeline's family if unset.")
    shift: float | None = flag("Static timestep shift. The pipeline's own schedule if unset.")
    batch_size: int = flag("Number of images generated at once.", 4)
    seed: int = flag("Seed of the first prompt.", 0)
    output_dir: str = flag("Folder for the results.", "outputs/evaluation")

    def __post_init__(self) -> None:
        uses_toy = self.pretrained_model_name_or_path is None
        defaults = read_yaml(TOY_CONFIGURATION) if uses_toy else {}
        for name in SAMPLING_ARGUMENTS:
            if getattr(self, name) is None:
                setattr(self, name, defaults.get(name, getattr(MixGRPOConfig, name)))
        self.reward_funcs = self.reward_funcs or defaults.get("reward_funcs", [])
        if self.prompts is None and not uses_toy:
            raise ValueError("`prompts` must be a file, a dataset or hpdv2 for a pipeline of your own, got None.")
        if self.lora is not None and self.transformer is not None:
            raise ValueError("`lora` and `transformer` must not both be set. Pass the one that was trained.")
        if self.compare_base and not self.has_trained_model:
            raise ValueError(
                "`compare_base` must be False without a trained model, got True. Set `lora` or `transformer`."
            )
        if self.cutoff_step_ratio is None:
            return
        if not self.has_trained_model:
            raise ValueError(
                f"`cutoff_step_ratio` must be unset without a trained model, got {self.cutoff_step_ratio}. Set `lora` "
                "or `transformer`."
            )
        if not 0 <= self.cutoff_step_ratio <= 1:
            raise ValueError(f"`cutoff_step_ratio` must be in [0, 1], got {self.cutoff_step_ratio}.")

    @property
    def has_trained_model(self) -> bool:
        return self.lora is not None or self.transformer is not None


def main(argv: list[str] | None = None) -> None:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # it warns about a LoRA without weights for the text encoders
    (args,) = parse(sys.argv[1:] if argv is None else argv, EvaluationArguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # 1. Load
    rows = load_rows(args)
    runner = RewardRunner(load_rewards(args), device=device)
    pipe = load_pipeline(args, device)
    rows_with_images: PromptDataset = rows
    if sampling_policy(pipe, args).takes_image:
        rows_with_images = open_images("prompts", rows, type(pipe).__name__)
    base_transformer = pipe.transformer
    load_trained_weights(args, pipe)
    trained_transformer = pipe.transformer

    # 2. Generate and score
    variants = ["trained"] if args.has_trained_model else ["base"]
    if args.compare_base:
        variants = ["base", "trained"]
    scores = {}
    images = {}
    with tqdm(total=len(rows) * len(variants), unit="image") as progress_bar:
        for variant in variants:
            progress_bar.set_description(variant)
            pipe.transformer = base_transformer if variant == "base" else trained_transformer
            pipe.to(device)
            if args.lora and variant == "base":
                pipe.disable_lora()
            elif args.lora:
                pipe.enable_lora()
            context: contextlib.AbstractContextManager = contextlib.nullcontext()
            if variant == "trained" and args.cutoff_step_ratio is not None:
                full_base = base_transformer.to(device) if args.transformer else None
                context = hybrid_inference(pipe, args.cutoff_step_ratio, base_transformer=full_base)
            with context:
                scores[variant], images[variant] = generate_and_score(
                    pipe, rows_with_images, runner, args, progress_bar
                )

    # 3. Compare prompt by prompt, and write the results
    if args.compare_base:
        scores["difference"] = scores["trained"] - scores["base"]
    results = {
        variant: {name: summarize(row) for name, row in zip(runner.names, variant_scores, strict=True)}
        for variant, variant_scores in scores.items()
    }
    prompts = [row["prompt"] for row in rows]
    folder = Path(args.output_dir)
    save_grid(folder / "grid.png", prompts, images, scores, runner.names[0])
    settings = vars(args) | sampling_policy(pipe, args).call_arguments
    record = {"settings": settings, "results": results, "prompts": prompts}
    (folder / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    table = in_markdown(args, runner, results)
    (folder / "evaluation.md").write_text(table, encoding="utf-8")
    print(f"{table}\nWritten to {folder}: evaluation.md, evaluation.json, grid.png")


@contextlib.contextmanager
def naming(argument: str, value: str) -> Iterator[None]:
    """Adds the name of an argument to the errors of reading what it refers to."""
    is_path = value.startswith((".", "/", "~")) or value.endswith((".txt", *DATASET_READERS))
    try:
        if is_path:
            Path(value).expanduser().stat()
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{argument}`={value!r} cannot be read: {error}") from error


def load_rows(args: EvaluationArguments) -> list[dict[str, Any]]:
    """The prompts with the other columns of their dataset, which are passed to the rewards."""
    name = args.prompts or ""
    with naming("prompts", name):
        rows = read_rows(name, args.split)
        if len(rows) and "prompt" not in rows[0]:
            raise ValueError(f"It must have a column 'prompt', got {', '.join(rows[0])}.")
    count = len(rows) if args.num_prompts is None else args.num_prompts
    if not 0 < count <= len(rows):
        raise ValueError(f"`num_prompts` must be in [1, {len(rows)}] for `prompts`={name!r}, got {count}.")
    return [dict(rows[i]) for i in range(count)]


def read_rows(name: str, split: str) -> Dataset | list[dict[str, Any]]:
    path = Path(name)
    if not name:
        return [{"prompt": prompt} for prompt in toy.prompts("test")]
    if name == "hpdv2":
        files = [hf_hub_download("zhwang/HPDv2", f"benchmark/{s}.json", repo_type="dataset") for s in HPDV2_STYLES]
        styles = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
        # One prompt of each style in turn, so that the first prompts represent all styles equally.
        return [{"prompt": prompt} for prompts in zip(*styles, strict=True) for prompt in prompts]
    if path.suffix in DATASET_READERS:
        return DATASET_READERS[path.suffix](name)
    if path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return [{"prompt": line} for line in lines if line]
    return load_dataset(name, split=split)


def load_rewards(args: EvaluationArguments) -> list[Any]:
    with naming("reward_init_kwargs", args.reward_init_kwargs):
        options = json.loads(args.reward_init_kwargs)
        if unknown := sorted(set(options) - set(args.reward_funcs)):
            raise ValueError(f"Its keys must be in `reward_funcs`={args.reward_funcs}, got {', '.join(unknown)}.")
    return [load_reward(name, **options.get(name, {})) for name in args.reward_funcs]


def load_pipeline(args: EvaluationArguments, device: str) -> DiffusionPipeline:
    """The pipeline before training."""
    name = args.pretrained_model_name_or_path or toy.path()
    with naming("pretrained_model_name_or_path", name):
        pipe = DiffusionPipeline.from_pretrained(name, dtype=inference_dtype(device))
    pipe.set_progress_bar_config(disable=True)
    if args.shift is not None:
        config = dict(pipe.scheduler.config, shift=args.shift, use_dynamic_shifting=False)
        pipe.scheduler = pipe.scheduler.from_config(config)
    return pipe


def load_trained_weights(args: EvaluationArguments, pipe: DiffusionPipeline) -> None:
    """Load the LoRA into the pipeline's transformer, or replace the transformer by the fully fine-tuned one."""
    transformer: ModelMixin = pipe.transformer
    if args.lora:
        with naming("lora", args.lora):
            pipe.load_lora_weights(args.lora)
            if not getattr(transformer, "peft_config", None):
                raise ValueError("It has no LoRA for the pipeline's transformer.")
    if args.transformer:
        with naming("transformer", args.transformer):
            is_transformer = Path(args.transformer, "config.json").is_file()
            pipe.transformer = type(transformer).from_pretrained(
                args.transformer,
                subfolder=None if is_transformer else "transformer",  # the trainer saves the folder of a pipeline
                dtype=transformer.dtype,
            )


def inference_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def sampling_policy(pipe: DiffusionPipeline, args: EvaluationArguments) -> PipelinePolicy:
    """The pipeline at the size and with the guidance of the arguments, or of its own family."""
    sampling = {name: getattr(args, name) for name in SAMPLING_ARGUMENTS}
    return policy_class(type(pipe).__name__)(pipe, **sampling)


def generate_and_score(
    pipe: DiffusionPipeline,
    rows: PromptDataset,
    runner: RewardRunner,
    args: EvaluationArguments,
    progress_bar: tqdm,
) -> tuple[torch.Tensor, list[Image.Image]]:
    """Scores of shape `(num_rewards, num_prompts)`, NaN where an image has none, and the first images."""
    scores = []
    first_images: list[Image.Image] = []
    num_pending = 0
    policy = sampling_policy(pipe, args)
    size = args.batch_size if policy.takes_batches else 1
    for start in range(0, len(rows), size):
        end = min(start + size, len(rows))
        batch = [rows[i] for i in range(start, end)]
        edited = [row["image"] for row in batch] if policy.takes_image else None
        images = pipe(
            generator=[torch.Generator().manual_seed(args.seed + i) for i in range(start, end)],
            **policy.arguments_of([row["prompt"] for row in batch], edited),
        ).images
        runner.start(batch, images)
        num_pending += len(batch)
        # The first batch is scored at once, so that a broken reward is noticed early.
        if start == 0 or end == len(rows) or num_pending >= NUM_PENDING_IMAGES:
            scores.append(runner.finish())
            num_pending = 0
        first_images += images[: max(0, NUM_GRID_PROMPTS - len(first_images))]
        progress_bar.update(len(batch))
    return torch.cat(scores, dim=1), first_images


def summarize(scores: torch.Tensor) -> dict[str, Any]:
    """Mean and standard error over the prompts with a score, and every score."""
    valid = scores[~scores.isnan()]
    n = len(valid)
    return {
        "mean": float(valid.mean()) if n > 0 else None,
        "standard_error": float(valid.std()) / n**0.5 if n > 1 else None,
        "n": n,
        "failed": len(scores) - n,
        "scores": [float(score) if score.isfinite() else None for score in scores],
    }


def save_grid(
    path: Path,
    prompts: list[str],
    images: dict[str, list[Image.Image]],
    scores: dict[str, torch.Tensor],
    reward_name: str,
) -> None:
    """The images of the first prompts, those of the same prompt side by side, with their scores by one reward."""
    blocks = []
    for i, prompt in enumerate(prompts[:NUM_GRID_PROMPTS]):
        values = {variant: number(float(scores[variant][0, i])) for variant in images}
        tiles = [
            Tile(images[variant][i], [(f"{variant}: {readable(reward_name)}", values[variant])]) for variant in images
        ]
        blocks.append(Block(prompt, tiles))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(", ".join(images), "", blocks).save(path)


def in_markdown(args: EvaluationArguments, runner: RewardRunner, results: dict[str, dict[str, Any]]) -> str:
    """The settings, the table, and the errors behind missing scores."""
    settings = [f"{name}={value}" for name, value in vars(args).items() if value is not None]
    lines = [
        ", ".join(settings),
        "",
        "| reward | model | mean | standard error | n | failed |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in runner.names:
        for variant, summaries in results.items():
            summary = summaries[name]
            mean = in_digits(summary["mean"])
            error = in_digits(summary["standard_error"])
            lines.append(f"| {name} | {variant} | {mean} | {error} | {summary['n']} | {summary['failed']} |")
    for name, last_error in runner.errors.items():
        lines.append(f"\nLast error of {name}: {last_error!r}")
    return "\n".join(lines) + "\n"


def in_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
