"""Trains the bundled tiny FLUX with all five presets, from the same start and with the same shared settings.

    python examples/studies/compare_methods.py --tune_learning_rates 5e-4 1e-3 2e-3
    python examples/studies/compare_methods.py --ablate window_size
    python examples/studies/compare_methods.py --accelerations shared-prefix exact all
    python examples/studies/compare_methods.py --config examples/configs/toy_25_steps.yaml --lora_rank 0 \
        --presets mixgrpo dancegrpo --remedies published rectified --iterations 42 --eval_every 14

Writes `results.md`, `results.json`, `results.png` and one file per run. Run the same command again to resume after an
interruption: finished runs are kept.

The shared settings are read from the package's `commands/configs/toy.yaml`. A method keeps its published settings
(`MixGRPOConfig.from_preset`), except for these, which are scaled to the toy's 10 steps:

- The window keeps its share of the steps: 4 of 25 becomes 2 of 10. "All but the last step" stays the same.
- The window moves every `tau = iterations // (T - w)` iterations (at least 1), so that a run is one sweep over all its
  `T - w` positions. The published 300 iterations, with 25 or 20 per position, end before the last steps.
- Shares stay as published: DanceGRPO trains 60% of the steps, Flash and Flash* run 40% and 20% of the suffix.

With `remedies`, each windowed method runs with each of these changes (`REMEDIES`) to what is published: how a sweep
keeps what it gains. `baseline_remedies` are those of DanceGRPO and Flow-GRPO. With `--sweeps 2` the window moves twice
over the schedule.

With `accelerations`, the windowed methods run under each of these options, and the baselines under the first one.
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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from tqdm import tqdm
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, toy
from diffusers_mixgrpo.commands.command_line import TOY_CONFIGURATION, flag, read_yaml
from diffusers_mixgrpo.commands.figures import draw_by_window
from diffusers_mixgrpo.presets import ACCELERATIONS, PRESETS


EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))

from compare_report import TRAINING_PASSES, best_of, draw, in_markdown, set_against, summarize, title  # noqa: E402


METHODS = ("dancegrpo", "flow-grpo", "mixgrpo", "mixgrpo-flash", "mixgrpo-flash-star")
ABLATIONS = ("window_size", "window_interval", "window_stride", "strategy", "beta", "kl", "eta", "group_size")
ABLATIONS += ("solver", "top_k", "cache")
# What is changed of the published settings
REMEDIES: dict[str, dict[str, Any]] = {
    "published": {},
    "rectified": {"step_weighting": "rectified"},
    "noise": {"step_weighting": "noise"},
    "guard": {"loss_type": "grpo_guard"},
    "dppo": {"loss_type": "dppo"},
    "batch std": {"scale_rewards": "batch"},
    "unscaled": {"scale_rewards": "none"},
    "bounded": {"window_last_start": 0.5},
    "cps": {"sde_type": "cps", "eta": 0.5},
    "decay": {"lr_scheduler_type": "linear"},
    "recommended": {
        "step_weighting": "rectified",
        "scale_rewards": "batch",
        "sde_type": "cps",
        "eta": 0.5,
        "lr_scheduler_type": "linear",
    },
}
# Evaluated with the moving average of the weights. The others are evaluated with the weights themselves.
REMEDIES["ema"] = {"ema_decay": 0.98}
REMEDIES["recommended ema"] = REMEDIES["recommended"] | REMEDIES["ema"]
# A reward that ignores the scene, and the true ones
EXPLOITABLE = [("reward_hacking", "redness")]
EXPLOITABLE += [("diffusers_mixgrpo.toy", name) for name in ("toy_reward", "wholly_right", "extra_objects")]
# Settings of the shared configuration that belong to a method, or that this script sets itself
METHOD_SETTINGS = (
    "sde_type",
    "eta",
    "ode_solver",
    "solver_order",
    "prefix_ratio",
    "suffix_ratio",
    "lr_scheduler_type",
)
RUN_SETTINGS = ("max_steps", "output_dir", "logging_steps", "logging_images_steps", "save_strategy", "report_to")


@dataclass
class CompareArguments:
    presets: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to compare."})
    ablate: str | None = field(
        default=None, metadata={"help": "Compare settings of MixGRPO instead of methods.", "choices": ABLATIONS}
    )
    accelerations: list[str] = field(
        default_factory=lambda: ["shared-prefix"],
        metadata={"help": "Options to run each method under: off, shared-prefix (the default), exact, all."},
    )
    remedies: list[str] = field(
        default_factory=lambda: ["published"],
        metadata={"help": f"Changes to run each method with: {', '.join(REMEDIES)}."},
    )
    baseline_remedies: list[str] = field(
        default_factory=lambda: ["published"], metadata={"help": "The same for DanceGRPO and Flow-GRPO."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each method per seed."})
    iterations: int = flag("Iterations of each run.", 72)
    eval_every: int = flag("Iterations between evaluations, which are not timed.", 9)
    sweeps: int = flag("Sweeps of the window in a run.", 1)
    learning_rate: float | None = flag("Learning rate without tuning. That of the configuration if unset.")
    lora_rank: int | None = flag("Rank of the LoRA; 0 trains all weights. That of the configuration if unset.")
    num_eval_prompts: int | None = flag("Number of held-out prompts. That of the configuration if unset.")
    window_size: int | None = flag("Window of the MixGRPO methods. The published share of the steps if unset.")
    tune_learning_rates: list[float] = field(
        default_factory=list,
        metadata={"help": "Learning rates to choose from for each method. That of the configuration if unset."},
    )
    tune_iterations: int | None = flag("Iterations of each tuning run. A third of `iterations` if unset.")
    tune_seed: int = flag("Seed of the tuning runs, which must not be in `seeds`.", 1000)
    num_validation_prompts: int = flag(
        "Number of training prompts that no run trains on, for the choice of the learning rate.", 128
    )
    config: str = flag("YAML file of the shared settings.", str(TOY_CONFIGURATION))
    output_dir: str = flag("Folder for the results. outputs/compare or outputs/ablate_... if unset.", "")

    def __post_init__(self) -> None:
        known = {"presets": METHODS, "accelerations": ACCELERATIONS, "remedies": REMEDIES}
        known["baseline_remedies"] = REMEDIES
        for name, choices in known.items():
            if unknown := sorted(set(getattr(self, name)) - set(choices)):
                raise ValueError(f"`{name}` must be among {', '.join(choices)}, got {', '.join(unknown)}.")
        if self.tune_seed in self.seeds:
            raise ValueError(
                f"`tune_seed` must not be in `seeds`={self.seeds}, got {self.tune_seed}: a learning rate must not be "
                "chosen on a run that is compared. Choose another seed."
            )
        self.presets = [name for name in METHODS if name in self.presets]
        self.tune_iterations = self.tune_iterations or max(1, self.iterations // 3)
        folder = f"ablate_{self.ablate}" if self.ablate else "compare"
        self.output_dir = self.output_dir or f"outputs/{folder}"


@dataclass(frozen=True)
class Job:
    """One run: the name of its variant, the file of its record, and everything that its result depends on."""

    name: str
    file: Path
    settings: dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    (args,) = HfArgumentParser(CompareArguments).parse_args_into_dataclasses(argv)
    folder = Path(args.output_dir)
    shared = read_shared(args)
    variants = ablation(args, shared) if args.ablate else methods(args, shared)

    # 1. Choose a learning rate for each method on the validation prompts
    tuning = tuning_jobs(args, shared, variants)
    planned = final_jobs(args, shared, variants, {})
    remaining = sum(job.settings["iterations"] for job in tuning + planned if not job.file.exists())
    with tqdm(total=remaining, unit="iteration", disable=not remaining) as progress_bar:
        tried: dict[str, dict[float, float]] = {name: {} for name in variants}
        for job, run in zip(tuning, finish(tuning, progress_bar), strict=True):
            tried[job.name][job.settings["learning_rate"]] = run["evaluations"][-1]["reward"]
        rates = {name: best_of(scores) for name, scores in tried.items() if scores}

        # 2. Train
        jobs = final_jobs(args, shared, variants, rates)
        runs = finish(jobs, progress_bar)

    # 3. Compare on the held-out prompts
    reference = find_base(args, shared, variants) if args.ablate else label("dancegrpo", args.accelerations[0])
    summaries = {name: summarize([run for run in runs if run["name"] == name]) for name in variants}
    set_against(summaries, reference)
    results = {
        "command": shlex.join(sys.argv[1:] if argv is None else argv),
        "machine": machine(),
        "shared": shared,
        "reference": reference,
        "tuning": tried,
        "summaries": summaries,
    }
    text = in_markdown(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    draw(summaries, folder / "results.png")
    histories = {
        name: [entry for run in runs if run["name"] == name for entry in run["iterations"]] for name in variants
    }
    draw_by_window({title(name): entries for name, entries in histories.items()}, folder / "by_window.png")
    write_json(folder / "results.json", results | {"runs": runs})
    print(f"{text}\nWritten to {folder}: results.md, results.png, results.json, and one file per run.")


# ---- Variants ----


def read_shared(args: CompareArguments) -> dict[str, Any]:
    """The settings that all variants share: from the configuration file and the command line."""
    settings = read_yaml(args.config)
    left_out = METHOD_SETTINGS + RUN_SETTINGS
    shared = {
        name: value for name, value in settings.items() if name not in left_out and not name.startswith("window_")
    }
    if args.lora_rank is not None:
        shared["lora_rank"] = args.lora_rank
    if args.learning_rate is not None:
        shared["learning_rate"] = args.learning_rate
    shared["shift"] = settings.get("shift")  # that of the presets is for FLUX.1-dev
    shared["num_eval_prompts"] = args.num_eval_prompts or settings["num_eval_prompts"]
    shared["num_validation_prompts"] = args.num_validation_prompts
    files = sorted(file for file in Path(toy.path()).rglob("*") if file.is_file())
    shared["pipeline"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return shared | {"iterations": args.iterations, "eval_every": args.eval_every, "eval_on": "test"}


def methods(args: CompareArguments, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The windowed presets under all options, the baselines under the first one, and each with its remedies."""
    variants = {}
    for option in args.accelerations:
        for name in args.presets:
            is_windowed = PRESETS[name]["window_size"] != -1
            if option != args.accelerations[0] and not is_windowed:
                continue
            for remedy in args.remedies if is_windowed else args.baseline_remedies:
                changes = REMEDIES[remedy]
                settings = method(name, args, shared, changes=changes) | ACCELERATIONS[option]
                if settings.get("reuse_rollout_graph"):  # requires one update per iteration
                    settings["per_device_train_batch_size"] = images_per_iteration(shared)
                    settings["steps_per_generation"] = 1
                variants[label(name, option, remedy)] = settings
    return variants


def images_per_iteration(settings: dict[str, Any]) -> int:
    return settings["per_device_train_batch_size"] * settings["steps_per_generation"]


def label(name: str, option: str, remedy: str = "published") -> str:
    parts = [name, "" if option == "shared-prefix" else option, "" if remedy == "published" else remedy]
    return ", ".join(part for part in parts if part)


def method(
    name: str,
    args: CompareArguments,
    shared: dict[str, Any],
    size: int | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The settings of a preset that are scaled to the toy, with changes. `size` is that of the window, if given."""
    published = PRESETS[name]
    if published["window_size"] == -1:
        return {"preset": name, **changes}
    steps = shared["num_inference_steps"]
    share = published["window_size"] / published["num_inference_steps"]
    size = size or args.window_size or round(share * steps)
    size = min(max(size, 1), steps - 1)
    last = steps - 1 - size
    if "window_last_start" in changes:
        last = min(last, int(changes["window_last_start"] * steps))
    interval = max(1, args.iterations // (args.sweeps * (last + 1)))
    return {"preset": name, "window_size": size, "window_interval": interval, **changes}


def ablation(args: CompareArguments, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scaled MixGRPO with the first remedy and one setting changed. `tau` depends on the window only."""
    base = method("mixgrpo", args, shared, changes=REMEDIES[args.remedies[0]])
    steps = shared["num_inference_steps"]
    if args.ablate == "window_size":
        sizes = {min(size, steps - 1) for size in (1, 2, 4, 6, base["window_size"], steps - 1)}
        changes = REMEDIES[args.remedies[0]]
        return {f"w = {size}": method("mixgrpo", args, shared, size, changes) for size in sorted(sizes)}
    if args.ablate == "window_interval":
        tau = base["window_interval"]
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
    if args.ablate == "kl":
        return _kl_ablation(base)
    if args.ablate == "eta":
        return {f"eta = {eta:g}": base | {"eta": eta} for eta in (0.1, 0.3, 0.5, 0.7, 0.9)}
    if args.ablate == "group_size":
        images = images_per_iteration(shared)
        sizes = [size for size in (2, 4, 6, 8, 12, 24, 48) if images % size == 0]
        variants = {f"{images // size} x {size}": base | {"num_generations": size} for size in sizes}
        own = shared["num_generations"]
        return variants | {f"{images // own} x {own}": base}
    if args.ablate == "top_k":
        return {"all": base} | {f"k = {k}": base | {"replay_top_k": k} for k in (3, 2, 1)}
    if args.ablate == "cache":
        return _cache_ablation(base)
    return _solver_ablation(base)


def _kl_ablation(base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Both divergences from the reference, against a reward that can be exploited. The true one is only logged."""
    names = [f"{module}:{name}" for module, name in EXPLOITABLE]
    base = base | {"reward_funcs": names, "reward_weights": [1.0] + [0.0] * (len(names) - 1)}
    base["eval_reward_funcs"] = None
    variants = {"none": base}
    for kl_type, betas in {"transition": (0.01, 0.1, 1.0), "velocity": (0.1, 1.0, 10.0)}.items():
        variants |= {f"{kl_type}, {beta:g}": base | {"kl_type": kl_type, "beta": beta} for beta in betas}
    return variants


def _cache_ablation(base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    variants = {"none": base}
    for threshold in (0.1, 0.3):
        cache = {"name": "FirstBlockCacheConfig", "threshold": threshold}
        variants[f"first block, {threshold}"] = base | {"ode_cache": cache}
    for interval in (2, 3):
        cache = ACCELERATIONS["all"]["ode_cache"] | {"cache_interval": interval}
        variants[f"TaylorSeer, {interval}"] = base | {"ode_cache": cache}
    return variants


def _solver_ablation(base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # DPM-Solver++ of order 1 is Euler's step here.
    solvers = {
        "euler": ("euler", 2),
        "dpmsolver++ 2": ("dpmsolver++", 2),
        "dpmsolver++ 3": ("dpmsolver++", 3),
        "unipc 2": ("unipc", 2),
    }
    suffix_ratio = PRESETS["mixgrpo-flash"]["suffix_ratio"]
    variants = {"euler, whole suffix": base}
    for name, (solver, order) in solvers.items():
        changes = {"suffix_ratio": suffix_ratio, "ode_solver": solver, "solver_order": order}
        variants[f"{name}, {suffix_ratio:.0%} suffix"] = base | changes
    return variants


def find_base(args: CompareArguments, shared: dict[str, Any], variants: dict[str, dict[str, Any]]) -> str:
    """The variant of an ablation that is MixGRPO as in the comparison of the methods, or the first one."""
    base = PRESETS["mixgrpo"] | method("mixgrpo", args, shared, changes=REMEDIES[args.remedies[0]])
    return next((name for name, changes in variants.items() if base | changes == base), next(iter(variants)))


def prompts(settings: dict[str, Any]) -> dict[str, list[str]]:
    """Three disjoint sets: to train on, to choose the learning rate on, and to compare on."""
    texts = toy.prompts("train")
    count = settings["num_validation_prompts"]
    test = toy.prompts("test", settings["num_eval_prompts"])
    return {"train": texts[count:], "validation": texts[:count], "test": test}


# ---- Runs ----


def tuning_jobs(args: CompareArguments, shared: dict[str, Any], variants: dict[str, dict[str, Any]]) -> list[Job]:
    """A short run for each variant and learning rate, with a window that moves faster in proportion."""
    count = args.tune_iterations
    changed = {"seed": args.tune_seed, "iterations": count, "eval_every": count, "eval_on": "validation"}
    jobs = []
    for rate in args.tune_learning_rates:
        for name, changes in variants.items():
            settings = shared | changes | changed | {"learning_rate": rate}
            if "window_interval" in changes:
                settings["window_interval"] = max(1, changes["window_interval"] * count // args.iterations)
            jobs.append(Job(name, Path(args.output_dir, "tuning", f"{as_file(name)}_{rate:g}.json"), settings))
    return jobs


def final_jobs(
    args: CompareArguments,
    shared: dict[str, Any],
    variants: dict[str, dict[str, Any]],
    rates: dict[str, float],
) -> list[Job]:
    """The runs to compare. Seeds are the outer loop, so that a change in the machine's speed affects all methods."""
    jobs = []
    for seed in args.seeds:
        for name, changes in variants.items():
            settings = shared | changes | {"seed": seed, "learning_rate": rates.get(name, shared["learning_rate"])}
            jobs.append(Job(name, Path(args.output_dir, "runs", f"{as_file(name)}_{seed}.json"), settings))
    return jobs


def finish(jobs: list[Job], progress_bar: tqdm) -> list[dict[str, Any]]:
    """
    The records of all jobs: those of finished ones from their files, the others by training.

    Raises:
        `ValueError`: If a file has other settings. In that case nothing has been trained.
    """
    records = {job.file: json.loads(job.file.read_text("utf-8")) for job in jobs if job.file.exists()}
    for job in jobs:
        if job.file in records:
            _check_settings(job, records[job.file]["settings"])
    for job in jobs:
        if job.file not in records:
            seed = job.settings["seed"]
            progress_bar.set_description(f"{job.name}, seed {seed}, lr {job.settings['learning_rate']:g}")
            records[job.file] = {"name": job.name, "settings": job.settings, **train(job.settings, progress_bar)}
            write_json(job.file, records[job.file])
    return [records[job.file] for job in jobs]


def _check_settings(job: Job, recorded: dict[str, Any]) -> None:
    different = []
    for name in sorted({*recorded, *job.settings}):
        old = recorded.get(name)
        new = job.settings.get(name)
        if old != new:
            different.append(f"{name}: {old!r}, now {new!r}")
    if different:
        raise ValueError(
            f"{job.file} must have the settings of this command, got other ones ({'; '.join(different)}). Remove the "
            "file to train again, or choose another `output_dir`."
        )


def train(settings: dict[str, Any], progress_bar: tqdm) -> dict[str, Any]:
    """One run from the bundled pipeline: the cost of each iteration, and the evaluations."""
    steps_per_iteration = settings["steps_per_generation"] * settings.get("num_iterations", 1)
    steps_per_iteration //= settings.get("gradient_accumulation_steps", 1)
    config_fields = {f.name for f in dataclasses.fields(MixGRPOConfig)}
    texts = prompts(settings)
    recorder = Recorder(settings["eval_every"], progress_bar, is_lora=settings["lora_rank"] > 0)
    with tempfile.TemporaryDirectory() as folder:  # for the checkpoint of an interrupted trainer
        config = MixGRPOConfig.from_preset(
            settings["preset"],
            **{name: value for name, value in settings.items() if name in config_fields},
            max_steps=settings["iterations"] * steps_per_iteration,
            logging_steps=steps_per_iteration,
            output_dir=folder,
            save_strategy="no",
            report_to="none",
            logging_images_steps=None,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = MixGRPOTrainer(
            model=toy.load(),  # in float32
            reward_funcs=settings["reward_funcs"],
            eval_reward_funcs=settings.get("eval_reward_funcs"),
            args=config,
            train_dataset=[{"prompt": text} for text in texts["train"]],
            eval_dataset=[{"prompt": text} for text in texts[settings["eval_on"]]],
            peft_config=_lora(settings),
            callbacks=[recorder],
        )
        trainer.remove_callback(PrinterCallback)
        recorder.evaluations += _before_training(trainer, recorder, settings)
        trainer.train()
    return {"iterations": recorder.iterations, "evaluations": recorder.evaluations}


def _before_training(
    trainer: MixGRPOTrainer, recorder: "Recorder", settings: dict[str, Any]
) -> list[dict[str, float]]:
    """The evaluation of the bundled pipeline, which is made once for all runs that share it."""
    names = ("eval_on", "num_eval_prompts", "num_validation_prompts", "reward_funcs", "num_inference_steps", "shift")
    key = json.dumps([settings[name] for name in names])
    if key not in _EVALUATIONS:
        trainer.evaluate()
        _EVALUATIONS[key] = recorder.evaluations.pop()
    return [dict(_EVALUATIONS[key])]


_EVALUATIONS: dict[str, dict[str, float]] = {}


def _lora(settings: dict[str, Any]) -> LoraConfig | None:
    if settings["lora_rank"] == 0:
        return None
    return LoraConfig(r=settings["lora_rank"], lora_alpha=settings["lora_alpha"], init_lora_weights="gaussian")


class Recorder(TrainerCallback):
    """
    Records the time and the forward passes of each iteration, and the evaluations after every `eval_every` of them.

    Times are those of training steps and optimizer steps, without evaluations. Forward passes are those of one image
    through the transformer: those computed in the rollout, and `TRAINING_PASSES` for each trained step of a LoRA. All
    weights need one more, for their gradients.
    """

    def __init__(self, eval_every: int, progress_bar: tqdm, is_lora: bool = True) -> None:
        self.eval_every = eval_every
        self.is_lora = is_lora
        self.progress_bar = progress_bar
        self.iterations: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self.clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
        self.started = dict.fromkeys(self.clocks, 0.0)
        self.spent = dict.fromkeys(self.clocks, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = {name: clock() for name, clock in self.clocks.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, clock in self.clocks.items():
            self.spent[name] += clock() - self.started[name]
        done, rest = divmod(state.global_step, args.optimizer_steps_per_iteration)
        is_due = done % self.eval_every == 0 or state.global_step == state.max_steps
        control.should_evaluate = rest == 0 and is_due

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "nfe" not in logs:
            return
        size = logs["window/size"]
        steps_trained = size
        if args.window_train_fraction != 1:
            steps_trained = max(1, int(args.window_train_fraction * size))
        images = args.per_device_train_batch_size * args.steps_per_generation
        entry = dict(self.spent)
        entry["nfe"] = logs["nfe"]
        entry["nfe_computed"] = logs["nfe_amortized"]
        entry["steps_trained"] = steps_trained
        entry["passes"] = images * (
            logs["nfe_amortized"] + passes_per_trained_step(args, self.is_lora) * steps_trained
        )
        for name, value in logs.items():
            is_kept = name in ("reward", "window/start", "kl", "clip_ratio/region_mean", "reward_std")
            is_kept = is_kept or "_by_window/" in name
            if is_kept or name.startswith("time/"):
                entry[name] = value
        self.iterations.append(entry)
        self.spent = dict.fromkeys(self.clocks, 0.0)
        self.progress_bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        point: dict[str, float] = {"iteration": len(self.iterations)}
        for name in ("seconds", "passes"):
            point[name] = sum(entry[name] for entry in self.iterations)
        weights = "eval_ema" if "eval_ema_reward" in metrics else "eval"
        for name in ("reward", "reward_se"):
            point[name] = metrics[f"{weights}_{name}"]
        for name in ("toy_reward", "wholly_right", "extra_objects"):
            point[name] = metrics[f"{weights}_rewards/{name}/mean"]
        self.evaluations.append(point)


def passes_per_trained_step(args: Any, is_lora: bool = True) -> float:
    """Forward passes that training one step costs, per image of the iteration."""
    passes: float = (TRAINING_PASSES + (not is_lora) - args.reuse_rollout_graph) * args.num_iterations
    if args.replay_top_k:
        passes *= min(1, 2 * args.replay_top_k / args.num_generations)
    if args.beta > 0:
        passes += 1  # of the reference model
    return passes


# ---- Files ----


def as_file(name: str) -> str:
    return re.sub(r"[^\w.+]+", "-", name).strip("-")


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, threads: {torch.get_num_threads()}, torch {torch.__version__}"


def write_json(file: Path, content: Any) -> None:
    """All of it or nothing, so that an interruption leaves no incomplete file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(unfinished, file)


if __name__ == "__main__":
    main()
