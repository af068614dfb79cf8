"""Times one training iteration of each published method, and says where the time goes.

    python examples/benchmark_iteration.py --output outputs/benchmark.json
    python examples/benchmark_iteration.py --grow --output outputs/grow.json
    python examples/benchmark_iteration.py --flux_dev --gradient_checkpointing --output outputs/flux_dev.json

The first runs all five presets on the bundled tiny FLUX with the paper's T = 25, w = 4, G = 12 under these options:

- `off`: each image computes its own prefix.
- `shared-prefix`: a group computes it once. What `MixGRPOConfig` does by default.
- `exact`: and one update per iteration, on the graph of the rollout, so that nothing is replayed.
- `all`: and the approximations: a shorter prefix, a cache outside of the window, the extremes of each group only.

Passes are of equally many images, but for the same work one image and one step at a time. Cases take turns, with the
window at places spread over a whole sweep. A ratio is one of a round's means, and the median round is reported. The
baseline is DanceGRPO under the first of the options: as published.

`--flux_dev` builds a FLUX.1-dev-sized transformer with random weights on the device, which needs no download. There
the window stands in the middle of its sweep: the cost of an iteration is linear in its place.
"""

import contextlib
import dataclasses
import gc
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from benchmark_report import GROWTH_COLOURS, PARTS, PASSES, PUBLISHED, draw_growth, draw_presets, in_markdown
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from random_flux import build_flux_dev, iteration_flops
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, toy
from diffusers_mixgrpo.presets import ACCELERATIONS, PRESETS


METHODS = ("dancegrpo", "flow-grpo", "mixgrpo", "mixgrpo-flash", "mixgrpo-flash-star")
OPTIONS = tuple(ACCELERATIONS)
GROW = {"num_generations": (4, 8, 12, 24), "num_inference_steps": (10, 15, 25, 50)}
GROW |= {"window_size": (1, 2, 4, 8), "size": (32, 64, 96, 128)}


@dataclass
class BenchmarkArguments:
    presets: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to time."})
    options: list[str] | None = field(default=None, metadata={"help": "Some of off, shared-prefix, exact and all."})
    prompts: int | None = field(default=None, metadata={"help": "Prompts of an iteration: 4 on the toy, 1 otherwise."})
    num_generations: int = field(default=12, metadata={"help": "Images per prompt G."})
    num_inference_steps: int = field(default=25, metadata={"help": "Sampling steps T."})
    window_size: int = field(default=4, metadata={"help": "Stochastic steps w of the MixGRPO presets."})
    updates: int = field(default=4, metadata={"help": "Optimizer steps per iteration, of 'off' and 'shared-prefix'."})
    size: int | None = field(default=None, metadata={"help": "Height and width in pixels: 64 on the toy, or 720."})
    max_sequence_length: int | None = field(default=None, metadata={"help": "Text tokens: 12 on the toy, or 512."})
    rounds: int | None = field(default=None, metadata={"help": "Repetitions: 3 on the toy, 1 otherwise."})
    window_stride: int | None = field(
        default=None, metadata={"help": "From place to place: 1, or 0: only the middle."}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Images per pass. All of an iteration if unset."})
    replay_batch_size: int | None = field(default=None, metadata={"help": "The same in the replay, if another."})
    full: bool = field(default=False, metadata={"help": "Train all weights, and not a LoRA."})
    grow: bool = field(default=False, metadata={"help": "Time growing G, T, w and pictures instead."})
    flux_dev: bool = field(default=False, metadata={"help": "A transformer as large as FLUX.1-dev's, random weights."})
    flux_dev_layers: list[int] | None = field(default=None, metadata={"help": "Its double and single blocks: 19 38."})
    flux_dev_heads: int = field(default=24, metadata={"help": "Its attention heads of 128."})
    compile: bool = field(default=False, metadata={"help": "Compile the transformer's blocks."})
    attention_backend: str | None = field(default=None, metadata={"help": "One of diffusers'."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Compute activations again to save memory."})
    load_in_4bit: bool = field(default=False, metadata={"help": "With `flux_dev`: NF4 weights, by bitsandbytes."})
    output: str | None = field(default=None, metadata={"help": "JSON file. The figure is put beside it, as .png."})

    def __post_init__(self):
        toys = {"prompts": 4, "size": 64, "max_sequence_length": 12, "rounds": 3, "window_stride": 1}
        large = {"prompts": 1, "size": 720, "max_sequence_length": 512, "rounds": 1, "window_stride": 0}
        toys["options"], large["options"] = OPTIONS, ("shared-prefix",)
        for name, value in (large if self.flux_dev else toys).items():
            setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        for name, legal in (("presets", METHODS), ("options", OPTIONS)):
            if unknown := set(getattr(self, name)) - set(legal):
                raise ValueError(f"`{name}` must be among {', '.join(legal)}, got {', '.join(sorted(unknown))}.")
            setattr(self, name, [choice for choice in legal if choice in getattr(self, name)])
        if self.load_in_4bit and (self.full or not self.flux_dev):
            raise ValueError("`load_in_4bit=True` is for `flux_dev=True` with a LoRA: leave out `full`.")
        if self.images % self.updates:
            raise ValueError(f"`updates={self.updates}` must divide prompts * num_generations = {self.images}.")

    @property
    def images(self) -> int:
        return self.prompts * self.num_generations


@dataclass(frozen=True)
class Case:
    """What is timed: a preset, what is set otherwise than there, and the window's places in one round."""

    preset: str
    settings: dict[str, Any]
    places: Sequence[int]


def main(argv: list[str] | None = None):
    for library in (diffusers_logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    (args,) = transformers.HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    results = {"command": shlex.join(sys.argv[1:] if argv is None else argv), "setting": dataclasses.asdict(args)}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        results |= {"machine": machine(bench.device), "matmul_peak_tflops": matmul_peak(bench.device)}
        results |= time_growth(bench, args) if args.grow else time_presets(bench, args)
    print(in_markdown(results))
    if args.output:
        file = Path(args.output)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1), encoding="utf-8")
        (draw_growth if args.grow else draw_presets)(results, file.with_suffix(".png"))
        print(f"\nWritten to {file} and {file.with_suffix('.png')}.")


# ---- What is timed ----


def time_presets(bench: "Bench", args: BenchmarkArguments) -> dict[str, Any]:
    """All presets under all options, and on the toy one image and one step at a time."""
    cases = {(option, preset): make_case(args, preset, option) for option in args.options for preset in args.presets}
    if one_by_one := "mixgrpo" in args.presets and not args.flux_dev:
        cases["one-by-one", "mixgrpo"] = make_case(args, "mixgrpo", "one-by-one")
    entries, first = bench.measure(cases), args.options[0]
    options = {option: {preset: entries[option, preset] for preset in args.presets} for option in args.options}
    for group in options.values():
        for entry in group.values():
            compare(entry, options[first].get("dancegrpo"), "ratio_to_dancegrpo")
            compare(entry, group.get("dancegrpo"), "ratio_under_same_options")
    # The baselines as published, ours with the options that leave its result as it is
    exact = next((option for option in ("exact", "shared-prefix") if option in options), first)
    chosen = {preset: exact if preset in PUBLISHED else first for preset in args.presets}
    presets = {preset: {"options": option, **options[option][preset]} for preset, option in chosen.items()}
    results = {"presets": presets, "options": options}
    if one_by_one:
        slow, same = entries["one-by-one", "mixgrpo"], "shared-prefix" if "shared-prefix" in options else first
        compare(slow, options[same]["mixgrpo"], "ratio_to_batched")
        options["one-by-one"], results["one_by_one_speedup"] = {"mixgrpo": slow}, slow["ratio_to_batched"]
    return results


def time_growth(bench: "Bench", args: BenchmarkArguments) -> dict[str, Any]:
    """Cost of DanceGRPO and MixGRPO as one number grows: `grow.<number>.<value>.<preset>`."""
    presets = [preset for preset in args.presets if preset in GROWTH_COLOURS]
    cases = {}
    for axis, values in GROW.items():
        for value in values:
            changed = dataclasses.replace(args, **{axis: value}, window_stride=0)
            cases |= {(axis, value, preset): make_case(changed, preset, "shared-prefix") for preset in presets}
    entries, grow = bench.measure(cases), {axis: {str(value): {} for value in GROW[axis]} for axis in GROW}
    for (axis, value, preset), entry in entries.items():
        grow[axis][str(value)][preset] = entry
    return {"grow": grow}


def make_case(args: BenchmarkArguments, preset: str, option: str) -> Case:
    """The preset at this size under an option. Its window stands, and is moved from turn to turn."""
    settings = {
        name: getattr(args, name) for name in ("num_generations", "num_inference_steps", "max_sequence_length")
    }
    settings |= {"height": args.size, "width": args.size, "window_strategy": "frozen"}
    if PRESETS[preset]["window_size"] != -1:
        settings["window_size"] = args.window_size
    settings |= ACCELERATIONS["off" if option == "one-by-one" else option]
    settings |= {"merge_lora": False} if args.full else {}
    batch, updates = args.batch_size or args.images, 1 if settings.get("reuse_rollout_graph") else args.updates
    settings |= {"steps_per_generation": updates, "per_device_train_batch_size": args.images // updates}
    settings |= {"sample_batch_size": batch, "replay_batch_size": args.replay_batch_size or batch}
    last = args.num_inference_steps - 1 - args.window_size
    places = [*range(0, last, args.window_stride), last] if args.window_stride else [last // 2]
    if option == "one-by-one":
        settings |= {"sample_batch_size": 1, "replay_batch_size": 1}
        places = [last // 2]
    elif PRESETS[preset]["window_strategy"] == "frozen":
        places = [0] * min(3, len(places))
    return Case(preset, settings, places)


class Bench:
    """Runs iterations of cases, all on the same pipeline."""

    def __init__(self, args: BenchmarkArguments, folder: str):
        self.args, self.folder = args, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = build_flux_dev(args, self.device) if args.flux_dev else toy.load()
        self.stopwatch = Stopwatch(self.pipe.transformer, self.device, None if args.flux_dev else toy.toy_reward)
        self.trainers: dict[Any, MixGRPOTrainer] = {}

    def measure(self, cases: dict[Any, Case]) -> dict[Any, dict[str, Any]]:
        """An entry per case. On the toy the cases take turns; a large model is trained case by case."""
        rounds: dict[Any, list[list[dict]]] = {key: [[] for _ in range(self.args.rounds)] for key in cases}
        turns = [
            (number, index / len(case.places), key, place)
            for key, case in cases.items()
            for number in range(self.args.rounds)
            for index, place in enumerate(case.places)
        ]
        if not self.args.flux_dev:
            turns.sort(key=lambda turn: turn[:2])
        failed = set()
        for number, _, key, place in tqdm(turns):
            try:
                if key not in failed:
                    rounds[key][number].append(self._run(key, cases[key], place))
            except torch.OutOfMemoryError:
                failed.add(key)
                self.pipe.transformer.zero_grad()
        entries = {key: self._entry(cases[key], rounds[key]) for key in cases if key not in failed}
        return {key: entries.get(key, {"error": "out of memory"}) for key in cases}

    def _run(self, key: Any, case: Case, place: int) -> dict[str, Any]:
        """One iteration with the window at `place`. To warm up, the first of a case is done twice if that is cheap."""
        if is_new := key not in self.trainers:
            if self.args.flux_dev:  # the optimizer's moments alone are several GB
                self.trainers.clear()
                gc.collect()
                torch.cuda.empty_cache()
            self.trainers[key] = self._make_trainer(case)
        trainer = self.trainers[key]
        trainer.window_schedule = dataclasses.replace(trainer.window_schedule, start=place)
        self.stopwatch.trainer = trainer
        warms_up = is_new and (not self.args.flux_dev or self.args.compile)
        for _ in range(1 + warms_up):
            trainer.train()
        return self.stopwatch.record

    def _make_trainer(self, case: Case) -> MixGRPOTrainer:
        args, transformer = self.args, self.pipe.transformer
        is_first = not getattr(transformer, "_is_accelerate_prepared", False)
        quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        quiet |= {"gradient_checkpointing": True} if args.gradient_checkpointing else {}
        quiet |= {"compile_repeated_blocks": args.compile, "attention_backend": args.attention_backend}
        quiet |= {"use_cpu": self.device.type == "cpu", "dataloader_pin_memory": False, "output_dir": self.folder}
        steps, rank = case.settings["steps_per_generation"], 64 if args.flux_dev else 16
        config = MixGRPOConfig.from_preset(case.preset, **case.settings, **quiet, max_steps=steps)
        trainer = MixGRPOTrainer(
            model=self.pipe,
            reward_funcs=self.stopwatch.reward,
            args=config,
            train_dataset=[{"prompt": text} for text in toy.prompts("train", config.prompts_per_iteration)],
            # The other trainers go on with the LoRA of the first
            peft_config=LoraConfig(r=rank, lora_alpha=2 * rank) if is_first and not args.full else None,
            callbacks=[self.stopwatch],
        )
        trainer.remove_callback(PrinterCallback)
        policy, accelerator, during = trainer.policy, trainer.accelerator, self.stopwatch.during
        policy.decode = during("decode")(policy.decode)
        accelerator.backward = during("replay_backward", then="optimizer")(accelerator.backward)
        return trainer

    def _entry(self, case: Case, rounds: list[list[dict]]) -> dict[str, Any]:
        """The round of median time, and the times of all rounds."""
        means = [mean_record(records) for records in rounds]
        entry = sorted(means, key=lambda mean: mean["seconds_per_iteration"])[(len(means) - 1) // 2]
        seconds, forward = entry["seconds_per_iteration"], entry.pop("forward_seconds")
        in_transformer = forward + entry["parts"]["replay_backward"]
        entry |= {"transformer_share": in_transformer / seconds, "updates": case.settings["steps_per_generation"]}
        if "ode_cache" not in case.settings:  # with it a pass leaves out most of the blocks
            flops = iteration_flops(self.pipe, case.settings, entry["passes"], self.args.full)
            entry |= {"tflops": flops / seconds / 1e12, "tflops_in_transformer": flops / in_transformer / 1e12}
        for name in ("seconds_per_iteration", "cpu_seconds_per_iteration"):
            entry[f"{name}_of_rounds"] = [mean[name] for mean in means]
        return entry


# ---- Timing ----


class Stopwatch(TrainerCallback):
    """
    Splits the time of an iteration into parts. A part lasts until the next begins, so that they make up the whole.

    On a GPU it waits for the device at each border. It is the reward too, which ends the rollout.
    """

    def __init__(self, transformer: torch.nn.Module, device: torch.device, score: Callable[..., list[float]] | None):
        self.device, self.score = device, score
        self.trainer: Any = None
        self.record: dict[str, Any] = {}
        self.running, self.sampling, self.part = False, False, "rest"
        transformer.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        transformer.register_forward_hook(self._after_pass)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.record = {"seconds_per_iteration": 0.0, "cpu_seconds_per_iteration": 0.0, "forward_seconds": 0.0}
            self.record |= {"parts": dict.fromkeys(PARTS, 0.0), "passes": dict.fromkeys(PASSES, 0)}
            self.sampling = True
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        self.running, self.part = True, "rest"
        self.begun = self.since = self._now()
        self.cpu_begun = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self._switch("rest")
        self.running = False
        self.record["seconds_per_iteration"] += self.since - self.begun
        self.record["cpu_seconds_per_iteration"] += time.process_time() - self.cpu_begun
        if self.device.type == "cuda":
            self.record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9

    def reward(self, prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
        """The score, and a little that differs from image to image: none is left out for an advantage of 0."""
        with self.during("reward", then="rest"):
            scores = self.score(prompts, images) if self.score else [0.0] * len(images)
        self.sampling &= not self.running  # before training it is tried on two pictures
        little = np.random.default_rng(0).normal(scale=1e-3, size=len(images)).tolist()
        return [score + extra for score, extra in zip(scores, little, strict=True)]

    @contextlib.contextmanager
    def during(self, part: str, then: str | None = None) -> Iterator[None]:
        """What is done inside is of this part; also decorates functions."""
        then = then or self.part
        self._switch(part)
        yield
        self._switch(then)

    def _before_pass(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.running:
            part = self._part_of_pass()
            self._switch(part)
            self.record["passes"][part] += kwargs["hidden_states"].shape[0]
            self.pass_begun = self.since

    def _after_pass(self, module: Any, args: Any, output: Any) -> None:
        if self.running:
            self.record["forward_seconds"] += self._now() - self.pass_begun

    def _part_of_pass(self) -> str:
        scheduler = self.trainer.noise_scheduler
        index = scheduler.step_index or 0  # None before the first step
        rollout = "prefix" if index < scheduler.window.start else "window" if index in scheduler.window else "suffix"
        return rollout if self.sampling else "replay_forward"

    def _switch(self, part: str) -> None:
        if self.running:
            now = self._now()
            self.record["parts"][self.part] += now - self.since
            self.part, self.since = part, now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def mean_record(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number over iterations."""
    columns = {name: [record[name] for record in records] for name in records[0]}
    return {n: mean_record(v) if isinstance(v[0], dict) else statistics.fmean(v) for n, v in columns.items()}


def compare(entry: dict[str, Any], base: dict[str, Any] | None, name: str) -> None:
    """Add the ratio of times, wall and CPU: the median over rounds of `entry / base`; None where one is missing."""
    for clock in ("", "cpu_"):
        own, other = ((e or {}).get(f"{clock}seconds_per_iteration_of_rounds", []) for e in (entry, base))
        ratios = [a / b for a, b in zip(own, other, strict=False)]
        entry[clock + name] = statistics.median(ratios) if ratios else None


def matmul_peak(device: torch.device) -> float:
    """TFLOP/s of the best of some large matrix products: bfloat16 on a GPU, float32 on a CPU."""
    on_gpu, seconds = device.type == "cuda", []
    size = 8192 if on_gpu else 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    for _ in range(13):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12


def machine(device: torch.device) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return f"{where}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
