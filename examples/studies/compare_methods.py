"""Trains the bundled tiny FLUX with all five presets, from one start and alike in all that is not the method.

    python examples/compare_methods.py --tune_learning_rates 5e-4 1e-3 2e-3
    python examples/compare_methods.py --ablate window_size
    python examples/compare_methods.py --accelerations shared-prefix exact all

Writes `results.md`, `results.json`, `results.png` and one file per run. Run the same command again to go on after an
interruption: finished runs are kept.

What is shared is read from `configs/toy.yaml`. A method keeps its published fields (`MixGRPOConfig.from_preset`), with
these scaled to the toy's 10 steps:

- The window of 4 of 25 steps keeps its share of the steps: 2 of 10. "All but the last" stays all but the last.
- The window moves every `tau = iterations // (T - w)` iterations (at least 1), so that a run is one sweep over all its
  `T - w` places. The published 300 iterations, with 25 or 20 in a place, end before the last steps are reached.
- Shares stay what they are: 60% of the steps trained in DanceGRPO, 40% and 20% of the suffix run in Flash and Flash*.

With `accelerations` the windowed methods are run under each of these options, and the baselines under the first.
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from compare_report import TRAINING_PASSES, best_of, draw, in_markdown, set_against, summarise
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, toy
from diffusers_mixgrpo.presets import ACCELERATIONS, PRESETS


METHODS = ("dancegrpo", "flow-grpo", "mixgrpo", "mixgrpo-flash", "mixgrpo-flash-star")
ABLATIONS = ("window_size", "window_interval", "window_stride", "strategy", "beta", "solver", "top_k", "cache")


@dataclass
class CompareArguments:
    presets: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to compare."})
    ablate: str | None = field(
        default=None, metadata={"help": "Compare settings of MixGRPO instead of methods.", "choices": ABLATIONS}
    )
    accelerations: list[str] = field(
        default_factory=lambda: ["shared-prefix"],
        metadata={"help": "Run each method under: off, shared-prefix (the default), exact, all."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A run of each method per seed."})
    iterations: int = field(default=72, metadata={"help": "Iterations of each run, the same for all."})
    eval_every: int = field(default=9, metadata={"help": "Iterations between evaluations, which are not timed."})
    num_eval_prompts: int | None = field(default=None, metadata={"help": "Held-out prompts. The config's if unset."})
    window_size: int | None = field(
        default=None, metadata={"help": "Window of the MixGRPO methods. The published share of the steps if unset."}
    )
    tune_learning_rates: list[float] = field(
        default_factory=list, metadata={"help": "Choose among these for each method. The config's for all if unset."}
    )
    tune_iterations: int | None = field(default=None, metadata={"help": "A third of `iterations` if unset."})
    tune_seed: int = field(default=1000, metadata={"help": "Seed of the tuning runs, none of `seeds`."})
    num_validation_prompts: int = field(
        default=128, metadata={"help": "Training prompts that no run trains on, to choose the learning rate on."}
    )
    config: str = field(
        default=str(Path(__file__).parent / "configs" / "toy.yaml"), metadata={"help": "What all methods share."}
    )
    output_dir: str = field(default="", metadata={"help": "outputs/compare or outputs/ablate_... if unset."})

    def __post_init__(self):
        for name, legal in (("presets", METHODS), ("accelerations", ACCELERATIONS)):
            if unknown := set(getattr(self, name)) - set(legal):
                raise ValueError(f"`{name}` must be among {', '.join(legal)}, got {', '.join(sorted(unknown))}.")
        if self.tune_seed in self.seeds:
            raise ValueError(
                f"`tune_seed`={self.tune_seed} is one of `seeds`={self.seeds}: a learning rate must not be chosen on "
                "a run that is compared. Choose another."
            )
        self.presets = [name for name in METHODS if name in self.presets]
        self.tune_iterations = self.tune_iterations or max(1, self.iterations // 3)
        self.output_dir = self.output_dir or ("outputs/" + (f"ablate_{self.ablate}" if self.ablate else "compare"))


@dataclass(frozen=True)
class Job:
    """A run: what it is called, where its record goes, and all that its result depends on."""

    name: str
    file: Path
    settings: dict[str, Any]


def main(argv: list[str] | None = None):
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    (args,) = HfArgumentParser(CompareArguments).parse_args_into_dataclasses(argv)
    folder, shared = Path(args.output_dir), read_shared(args)
    variants = ablation(args, shared) if args.ablate else methods(args, shared)

    # 1. Choose a learning rate for each method on the validation prompts
    tuning, planned = tuning_jobs(args, shared, variants), final_jobs(args, shared, variants, {})
    remaining = sum(job.settings["iterations"] for job in tuning + planned if not job.file.exists())
    with tqdm(total=remaining, unit="iteration", disable=not remaining) as bar:
        tried: dict[str, dict[float, float]] = {name: {} for name in variants}
        for job, run in zip(tuning, finish(tuning, bar), strict=True):
            tried[job.name][job.settings["learning_rate"]] = run["evaluations"][-1]["reward"]
        rates = {name: best_of(scores) for name, scores in tried.items() if scores}

        # 2. Train
        jobs = final_jobs(args, shared, variants, rates)
        runs = finish(jobs, bar)

    # 3. Compare on the held-out prompts
    reference = find_base(args, shared, variants) if args.ablate else label("dancegrpo", args.accelerations[0])
    summaries = {name: summarise([run for run in runs if run["name"] == name]) for name in variants}
    set_against(summaries, reference)
    results = {"command": shlex.join(sys.argv[1:] if argv is None else argv), "machine": machine(), "shared": shared}
    results |= {"reference": reference, "tuning": tried, "summaries": summaries}
    text = in_markdown(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    draw(summaries, folder / "results.png")
    write_json(folder / "results.json", results | {"runs": runs})
    print(f"{text}\nWritten to {folder}: results.md, results.png, results.json, and a file per run.")


# ---- What is compared ----


def read_shared(args: CompareArguments) -> dict[str, Any]:
    """What is not the method: from the configuration file, without what is, and from the command line."""
    settings = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    methods = ("sde_type", "eta", "ode_solver", "solver_order", "prefix_ratio", "suffix_ratio")
    outside = ("max_steps", "output_dir", "logging_steps", "logging_images_steps", "save_strategy", "report_to")
    shared = {k: v for k, v in settings.items() if k not in methods + outside and not k.startswith("window_")}
    shared["shift"] = settings.get("shift")  # the presets' is for FLUX.1-dev
    shared["num_eval_prompts"] = args.num_eval_prompts or settings["num_eval_prompts"]
    shared["num_validation_prompts"] = args.num_validation_prompts
    files = sorted(file for file in Path(toy.path()).rglob("*") if file.is_file())
    shared["pipeline"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return shared | {"iterations": args.iterations, "eval_every": args.eval_every, "eval_on": "test"}


def methods(args: CompareArguments, shared: dict) -> dict[str, dict[str, Any]]:
    """The presets under the options that make them cheaper; the baselines as published, under the first alone."""
    variants = {}
    for option in args.accelerations:
        for name in args.presets:
            if option != args.accelerations[0] and PRESETS[name]["window_size"] == -1:
                continue
            settings = variants[label(name, option)] = method(name, args, shared) | ACCELERATIONS[option]
            if settings.get("reuse_rollout_graph"):  # one update per iteration
                images = shared["per_device_train_batch_size"] * shared["steps_per_generation"]
                settings |= {"steps_per_generation": 1, "per_device_train_batch_size": images}
    return variants


def label(name: str, option: str) -> str:
    return name if option == "shared-prefix" else f"{name}, {option}"


def method(name: str, args: CompareArguments, shared: dict, size: int | None = None) -> dict[str, Any]:
    """A preset scaled to the toy: what is otherwise than published. `size` is that of the window, if given."""
    steps, published = shared["num_inference_steps"], PRESETS[name]
    if published["window_size"] == -1:
        return {"preset": name}
    size = size or args.window_size or round(published["window_size"] / published["num_inference_steps"] * steps)
    size = min(max(size, 1), steps - 1)
    return {"preset": name, "window_size": size, "window_interval": max(1, args.iterations // (steps - size))}


def ablation(args: CompareArguments, shared: dict) -> dict[str, dict[str, Any]]:
    """MixGRPO, scaled, with one setting changed; `tau` follows from the window's size and from nothing else."""
    base, steps = method("mixgrpo", args, shared), shared["num_inference_steps"]
    size, tau = base["window_size"], base["window_interval"]
    if args.ablate == "window_size":
        sizes = {min(w, steps - 1) for w in (1, 2, 4, 6, size, steps - 1)}
        return {f"w = {w}": method("mixgrpo", args, shared, w) for w in sorted(sizes)}
    if args.ablate == "window_interval":
        return {f"tau = {n}": base | {"window_interval": n} for n in sorted({1, 2, 5, tau, 2 * tau})}
    if args.ablate == "window_stride":
        return {f"s = {n}": base | {"window_stride": n} for n in (1, 2, 3, 4)}
    if args.ablate == "strategy":
        names = ("progressive", "random", "frozen", "linear_decay", "exp_decay")
        variants = {name: base | {"window_strategy": name} for name in names}
        # k and l0 count steps, of which the toy has fewer than 25
        variants["exp_decay"] |= {"window_decay_rate": 2.5 / steps, "window_decay_start": round(0.52 * steps)}
        return variants
    if args.ablate == "beta":
        # Log-ratio and KL are means over the same elements, so 1 weighs a nat like a standard deviation of reward.
        return {f"beta = {beta:g}": base | {"beta": beta} for beta in (0.0, 0.01, 0.1, 1.0)}
    if args.ablate == "top_k":
        return {"all": base} | {f"k = {k}": base | {"replay_top_k": k} for k in (3, 2, 1)}
    if args.ablate == "cache":
        taylor, block = ACCELERATIONS["all"]["ode_cache"], {"name": "FirstBlockCacheConfig"}
        caches = {f"first block, {limit}": block | {"threshold": limit} for limit in (0.1, 0.3)}
        caches |= {f"TaylorSeer, {n}": taylor | {"cache_interval": n} for n in (2, 3)}
        return {"none": base} | {name: base | {"ode_cache": cache} for name, cache in caches.items()}
    # DPM-Solver++ of order 1 is Euler's step here.
    solvers = {"euler": ("euler", 2), "dpmsolver++ 2": ("dpmsolver++", 2), "dpmsolver++ 3": ("dpmsolver++", 3)}
    suffix = {"suffix_ratio": PRESETS["mixgrpo-flash"]["suffix_ratio"]}
    variants = {"euler, whole suffix": base}
    for name, (solver, order) in (solvers | {"unipc 2": ("unipc", 2)}).items():
        changes = suffix | {"ode_solver": solver, "solver_order": order}
        variants[f"{name}, {suffix['suffix_ratio']:.0%} suffix"] = base | changes
    return variants


def find_base(args: CompareArguments, shared: dict, variants: dict) -> str:
    """The variant of an ablation that is MixGRPO as it is compared with the other methods."""
    base = PRESETS["mixgrpo"] | method("mixgrpo", args, shared)
    return next(name for name, changes in variants.items() if base | changes == base)


def prompts(settings: dict[str, Any]) -> dict[str, list[str]]:
    """Three sets with nothing in common: to train on, to choose the learning rate on, and to judge on."""
    texts, count = toy.prompts("train"), settings["num_validation_prompts"]
    test = toy.prompts("test", settings["num_eval_prompts"])
    return {"train": texts[count:], "validation": texts[:count], "test": test}


# ---- Runs ----


def tuning_jobs(args: CompareArguments, shared: dict, variants: dict) -> list[Job]:
    """A short run for each variant and learning rate: the long one in small, its window moving faster."""
    jobs, count = [], args.tune_iterations
    changed = {"seed": args.tune_seed, "iterations": count, "eval_every": count, "eval_on": "validation"}
    for rate in args.tune_learning_rates:
        for name, changes in variants.items():
            settings = shared | changes | changed | {"learning_rate": rate}
            if "window_interval" in changes:
                settings["window_interval"] = max(1, changes["window_interval"] * count // args.iterations)
            jobs.append(Job(name, Path(args.output_dir, "tuning", f"{as_file(name)}_{rate:g}.json"), settings))
    return jobs


def final_jobs(args: CompareArguments, shared: dict, variants: dict, rates: dict[str, float]) -> list[Job]:
    """Seeds are outermost, so that a change in the machine's speed meets all methods alike."""
    jobs = []
    for seed in args.seeds:
        for name, changes in variants.items():
            settings = shared | changes | {"seed": seed, "learning_rate": rates.get(name, shared["learning_rate"])}
            jobs.append(Job(name, Path(args.output_dir, "runs", f"{as_file(name)}_{seed}.json"), settings))
    return jobs


def finish(jobs: list[Job], bar: tqdm) -> list[dict[str, Any]]:
    """
    The records of all jobs: of finished ones from their files, of the others by training.

    Raises:
        `ValueError`: If a file was made with other settings. Then nothing has been trained.
    """
    records = {job.file: json.loads(job.file.read_text("utf-8")) for job in jobs if job.file.exists()}
    for job in jobs:
        old, new = records.get(job.file, {}).get("settings", job.settings), job.settings
        other = [f"{k}: {old.get(k)!r}, now {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        if other:
            raise ValueError(
                f"{job.file} was made with other settings ({'; '.join(other)}). Remove it to train it anew, or "
                "choose another `output_dir`."
            )
    for job in jobs:
        if job.file not in records:
            bar.set_description(f"{job.name}, seed {job.settings['seed']}, lr {job.settings['learning_rate']:g}")
            records[job.file] = {"name": job.name, "settings": job.settings, **train(job.settings, bar)}
            write_json(job.file, records[job.file])
    return [records[job.file] for job in jobs]


def train(settings: dict[str, Any], bar: tqdm) -> dict[str, Any]:
    """One run from the bundled pipeline: what each iteration cost, and the evaluations before, between and after."""
    per_iteration = settings["steps_per_generation"] * settings.get("num_iterations", 1)
    per_iteration //= settings.get("gradient_accumulation_steps", 1)
    known = {f.name for f in dataclasses.fields(MixGRPOConfig)}
    texts, recorder = prompts(settings), Recorder(settings["eval_every"], bar)
    with tempfile.TemporaryDirectory() as folder:  # for the checkpoint that an interrupted trainer leaves
        config = MixGRPOConfig.from_preset(
            settings["preset"],
            **{name: value for name, value in settings.items() if name in known},
            max_steps=settings["iterations"] * per_iteration,
            logging_steps=per_iteration,
            output_dir=folder,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = MixGRPOTrainer(
            model=FluxPipeline.from_pretrained(toy.path()),
            reward_funcs=[getattr(toy, name) for name in settings["reward_funcs"]],
            args=config,
            train_dataset=[{"prompt": text} for text in texts["train"]],
            eval_dataset=[{"prompt": text} for text in texts[settings["eval_on"]]],
            peft_config=LoraConfig(
                r=settings["lora_rank"], lora_alpha=settings["lora_alpha"], init_lora_weights="gaussian"
            ),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.evaluate()
        trainer.train()
    return {"iterations": recorder.iterations, "evaluations": recorder.evaluations}


class Recorder(TrainerCallback):
    """
    Seconds and passes of each iteration, and the evaluations after every `eval_every` of them.

    Seconds are those of training steps and optimizer steps, without evaluations. Passes are those of one image through
    the transformer: what the rollout computed, and `TRAINING_PASSES` for each trained step.
    """

    def __init__(self, eval_every: int, bar: tqdm):
        self.eval_every, self.bar = eval_every, bar
        self.iterations: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.clocks, self.started, self.spent = (time.perf_counter, time.process_time), [0.0, 0.0], [0.0, 0.0]

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = [clock() for clock in self.clocks]

    def on_step_end(self, args, state, control, **kwargs):
        now = [clock() for clock in self.clocks]
        self.spent = [spent + b - a for spent, a, b in zip(self.spent, self.started, now, strict=True)]
        done, rest = divmod(state.global_step, args.optimizer_steps_per_iteration)
        due = done % self.eval_every == 0 or state.global_step == state.max_steps
        control.should_evaluate = rest == 0 and due

    def on_log(self, args, state, control, logs, **kwargs):
        if "nfe" not in logs:
            return
        size, share = logs["window/size"], args.window_train_fraction
        trained = size if share == 1 else max(1, int(share * size))
        costs: float = (TRAINING_PASSES - args.reuse_rollout_graph) * args.num_iterations
        costs *= min(1, 2 * args.replay_top_k / args.num_generations) if args.replay_top_k else 1
        costs += args.beta > 0  # a pass by the reference
        images = args.per_device_train_batch_size * args.steps_per_generation
        entry = {"seconds": self.spent[0], "cpu_seconds": self.spent[1], "nfe": logs["nfe"]}
        entry |= {"nfe_computed": logs["nfe_amortized"], "steps_trained": trained}
        entry["passes"] = images * (logs["nfe_amortized"] + costs * trained)
        others = ("reward", "window/start", "kl", "clip_ratio/region_mean", "grad_norm")
        self.iterations.append(entry | {k: v for k, v in logs.items() if k in others or k.startswith("time/")})
        self.spent = [0.0, 0.0]
        self.bar.update()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        point = {"iteration": len(self.iterations)}
        point |= {name: sum(entry[name] for entry in self.iterations) for name in ("seconds", "passes")}
        point |= {name: metrics[f"eval_{name}"] for name in ("reward", "reward_se")}
        names = ("wholly_right", "extra_objects")
        self.evaluations.append(point | {name: metrics[f"eval_rewards/{name}/mean"] for name in names})


# ---- Small things ----


def as_file(name: str) -> str:
    return re.sub(r"[^\w.+]+", "-", name).strip("-")


def machine() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"
    return f"{where}, torch {torch.__version__}"


def write_json(file: Path, content: Any) -> None:
    """All of it or nothing, so that an interruption leaves no half file behind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(unfinished, file)


if __name__ == "__main__":
    main()
