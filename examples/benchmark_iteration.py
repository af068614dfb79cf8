"""Times one training iteration of each published method, and each part of it.

    python examples/benchmark_iteration.py --output outputs/benchmark.json
    python examples/benchmark_iteration.py --grow --output outputs/grow.json
    python examples/benchmark_iteration.py --flux_dev --gradient_checkpointing --output outputs/flux_dev.json

The first command runs all five presets on the bundled tiny FLUX, with T = 25, w = 4 and G = 12 as in the paper, under
four sets of options:

- `off`: each image computes its own prefix.
- `shared-prefix`: a group computes it once, as `MixGRPOConfig` does by default.
- `exact`: in addition, one update per iteration on the graph of the rollout, so that nothing is replayed.
- `all`: in addition, approximations: a shorter prefix, a cache outside the window, only the extremes of each group.

Forward passes hold the same number of images for all, except for one case that runs one image and one step at a time.
In each round the cases take turns, with the window at positions spread over a whole sweep. Ratios are computed within
a round, and the median over the rounds is reported. The baseline is DanceGRPO under the first set of options.

`--flux_dev` builds a transformer of FLUX.1-dev's size with random weights on the device, so nothing is downloaded.
There the window stays in the middle of its sweep: the cost of an iteration is linear in the window's position.
`examples/studies/gpu_checks.py` runs all checks of a GPU with this script.
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
from benchmark_report import GROWTH_STYLES, PARTS, PASSES, PUBLISHED, draw_growth, draw_presets, in_markdown
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from random_flux import build_flux_dev, iteration_flops
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, toy
from diffusers_mixgrpo.presets import ACCELERATIONS, PRESETS
from diffusers_mixgrpo.training.phase_timer import PhaseTimer
from diffusers_mixgrpo.training.preflight_report import PreflightReport


METHODS = ("dancegrpo", "flow-grpo", "mixgrpo", "mixgrpo-flash", "mixgrpo-flash-star")
OPTIONS = tuple(ACCELERATIONS)
TEXT_ENCODERS = ("one_layer", "full", "full_4bit")
GROW = {
    "num_generations": (4, 8, 12, 24),
    "num_inference_steps": (10, 15, 25, 50),
    "window_size": (1, 2, 4, 8),
    "size": (32, 64, 96, 128),
}
PHASE_PARTS = {"decoding": "decode", "reward": "reward"}  # the engine's phases that are one part as a whole
TOY_DEFAULTS = {
    "prompts": 4,
    "size": 64,
    "max_sequence_length": 12,
    "lora_rank": 16,
    "rounds": 3,
    "window_stride": 1,
    "options": list(OPTIONS),
}
FLUX_DEV_DEFAULTS = {
    "prompts": 1,
    "size": 720,
    "max_sequence_length": 512,
    "lora_rank": 64,
    "rounds": 1,
    "window_stride": 0,
    "options": ["shared-prefix"],
}


def flag(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class BenchmarkArguments:
    presets: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to time."})
    options: list[str] | None = flag("Some of off, shared-prefix, exact and all.")
    prompts: int | None = flag("Prompts per iteration. 4 on the toy, 1 otherwise.")
    num_generations: int = flag("Images per prompt G.", 12)
    num_inference_steps: int = flag("Denoising steps T.", 25)
    window_size: int = flag("Window size w of the MixGRPO presets.", 4)
    updates: int = flag("Optimizer steps per iteration under all options except exact.", 4)
    size: int | None = flag("Height and width in pixels. 64 on the toy, 720 otherwise.")
    max_sequence_length: int | None = flag("Text tokens per prompt. 12 on the toy, 512 otherwise.")
    rounds: int | None = flag("Repetitions. 3 on the toy, 1 otherwise.")
    window_stride: int | None = flag("Steps between timed window positions; 0 times only the middle one.")
    batch_size: int | None = flag("Images per forward pass. All images of an iteration if unset.")
    replay_batch_size: int | None = flag("Transitions per forward pass of the replay. `batch_size` if unset.")
    full: bool = flag("Train all weights instead of a LoRA.", False)
    grow: bool = flag("Time growing numbers of G, T, w and pixels instead.", False)
    flux_dev: bool = flag("Use a transformer of FLUX.1-dev's size with random weights.", False)
    flux_dev_layers: list[int] | None = flag("Its numbers of double and single blocks. 19 38 if unset.")
    flux_dev_heads: int = flag("Its number of attention heads, of dimension 128.", 24)
    compile: bool = flag("Compile the transformer's blocks.", False)
    attention_backend: str | None = flag("A diffusers attention backend.")
    gradient_checkpointing: bool = flag("Recompute activations in the backward pass to save memory.", False)
    load_in_4bit: bool = flag("With `flux_dev`: NF4 weights, with bitsandbytes.", False)
    text_encoders: str = flag("With `flux_dev`: one_layer, full (T5-XXL and CLIP-L) or full_4bit.", "one_layer")
    lora_rank: int | None = flag("Rank of the LoRA. 16 on the toy, 64 otherwise.")
    settings: str = flag("Further arguments of MixGRPOConfig for all cases, as JSON.", "{}")
    preflight: bool = flag("Compare the preflight check's peak memory and seconds.", False)
    memory_gb: float | None = flag("Use no more memory of the GPU than this.")
    output: str | None = flag("JSON file. The figure is saved next to it, as .png.")

    def __post_init__(self) -> None:
        for name, default in (FLUX_DEV_DEFAULTS if self.flux_dev else TOY_DEFAULTS).items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        self.presets = _in_order("presets", self.presets, METHODS)
        self.options = _in_order("options", self.options, OPTIONS)
        if self.load_in_4bit and (self.full or not self.flux_dev):
            raise ValueError(
                f"`load_in_4bit` must be False with `flux_dev={self.flux_dev}` and `full={self.full}`, got True. Use "
                "it with `flux_dev` and without `full`."
            )
        if self.text_encoders not in TEXT_ENCODERS:
            raise ValueError(f"`text_encoders` must be among {', '.join(TEXT_ENCODERS)}, got {self.text_encoders!r}.")
        if self.images % self.updates:
            raise ValueError(
                f"`updates` must divide prompts * num_generations = {self.images}, got {self.updates}. Use 1 or a "
                "divisor."
            )

    @property
    def images(self) -> int:
        """Images per iteration."""
        return self.prompts * self.num_generations


def _in_order(name: str, chosen: list[str], choices: Sequence[str]) -> list[str]:
    """The chosen ones in the order of `choices`."""
    if unknown := sorted(set(chosen) - set(choices)):
        raise ValueError(f"`{name}` must be among {', '.join(choices)}, got {', '.join(unknown)}.")
    return [choice for choice in choices if choice in chosen]


@dataclass(frozen=True)
class Case:
    """One thing to time: a preset, the settings that differ from it, and the window positions of one round."""

    preset: str
    settings: dict[str, Any]
    positions: Sequence[int]


def main(argv: list[str] | None = None) -> None:
    for library in (diffusers_logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    (args,) = transformers.HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    results = {"command": shlex.join(sys.argv[1:] if argv is None else argv), "setting": dataclasses.asdict(args)}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        results["machine"] = machine(bench.device)
        results["matmul_peak_tflops"] = matmul_peak(bench.device)
        results |= time_growth(bench, args) if args.grow else time_presets(bench, args)
    print(in_markdown(results))
    if args.output:
        file = Path(args.output)
        figure = file.with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1), encoding="utf-8")
        draw = draw_growth if args.grow else draw_presets
        draw(results, figure)
        print(f"\nWritten to {file} and {figure}.")


# ---- Cases ----


def time_presets(bench: "Bench", args: BenchmarkArguments) -> dict[str, Any]:
    """All presets under all options and, on the toy, one image and one step at a time."""
    cases = {(option, preset): make_case(args, preset, option) for option in args.options for preset in args.presets}
    has_one_by_one = "mixgrpo" in args.presets and not args.flux_dev
    if has_one_by_one:
        cases["one-by-one", "mixgrpo"] = make_case(args, "mixgrpo", "one-by-one")
    entries = bench.measure(cases)
    options = {option: {preset: entries[option, preset] for preset in args.presets} for option in args.options}
    first = args.options[0]
    for group in options.values():
        for entry in group.values():
            compare(entry, options[first].get("dancegrpo"), "ratio_to_dancegrpo")
            compare(entry, group.get("dancegrpo"), "ratio_under_same_options")
    # The baselines as published, MixGRPO with the options that do not change its result
    exact = next((option for option in ("exact", "shared-prefix") if option in options), first)
    presets = {}
    for preset in args.presets:
        option = exact if preset in PUBLISHED else first
        presets[preset] = {"options": option, **options[option][preset]}
    results: dict[str, Any] = {"presets": presets, "options": options}
    if has_one_by_one:
        slow = entries["one-by-one", "mixgrpo"]
        batched = options["shared-prefix" if "shared-prefix" in options else first]["mixgrpo"]
        compare(slow, batched, "ratio_to_batched")
        options["one-by-one"] = {"mixgrpo": slow}
        results["one_by_one_speedup"] = slow["ratio_to_batched"]
    return results


def time_growth(bench: "Bench", args: BenchmarkArguments) -> dict[str, Any]:
    """Cost of DanceGRPO and MixGRPO as one number grows: `grow.<number>.<value>.<preset>`."""
    presets = [preset for preset in args.presets if preset in GROWTH_STYLES]
    cases = {}
    for axis, values in GROW.items():
        for value in values:
            changed = dataclasses.replace(args, **{axis: value}, window_stride=0)
            cases |= {(axis, value, preset): make_case(changed, preset, "shared-prefix") for preset in presets}
    grow: dict[str, dict[str, dict[str, Any]]] = {}
    for (axis, value, preset), entry in bench.measure(cases).items():
        grow.setdefault(axis, {}).setdefault(str(value), {})[preset] = entry
    return {"grow": grow}


def make_case(args: BenchmarkArguments, preset: str, option: str) -> Case:
    """The preset at this size under an option. Its window is frozen; the benchmark moves it."""
    is_one_by_one = option == "one-by-one"
    settings: dict[str, Any] = {
        "num_generations": args.num_generations,
        "num_inference_steps": args.num_inference_steps,
        "max_sequence_length": args.max_sequence_length,
        "height": args.size,
        "width": args.size,
        "window_strategy": "frozen",
    }
    if PRESETS[preset]["window_size"] != -1:
        settings["window_size"] = args.window_size
    settings |= ACCELERATIONS["off" if is_one_by_one else option]
    if args.full:
        settings["merge_lora"] = False
    updates = 1 if settings.get("reuse_rollout_graph") else args.updates
    batch_size = args.batch_size or args.images
    settings["steps_per_generation"] = updates
    settings["per_device_train_batch_size"] = args.images // updates
    settings["sample_batch_size"] = 1 if is_one_by_one else batch_size
    settings["replay_batch_size"] = 1 if is_one_by_one else args.replay_batch_size or batch_size
    settings |= json.loads(args.settings)

    last = args.num_inference_steps - 1 - args.window_size
    if is_one_by_one or not args.window_stride:
        positions = [last // 2]
    else:
        positions = [*range(0, last, args.window_stride), last]
    if PRESETS[preset]["window_strategy"] == "frozen" and not is_one_by_one:
        positions = [0] * min(3, len(positions))
    return Case(preset, settings, positions)


class Bench:
    """Runs iterations of cases, all with the same pipeline."""

    def __init__(self, args: BenchmarkArguments, folder: str) -> None:
        self.args = args
        self.folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = build_flux_dev(args, self.device) if args.flux_dev else toy.load()
        self.score: Callable[..., list[float]] | None = None if args.flux_dev else toy.toy_reward
        if args.memory_gb is not None and self.device.type == "cuda":
            # Only now, since quantized weights were larger while they were made, unlike those of a file.
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(memory_fraction(args.memory_gb))
        self.stopwatch = Stopwatch(self.device)
        self.stopwatch.watch(self.pipe.transformer)
        self.trainers: dict[Any, MixGRPOTrainer] = {}
        self.preflights: dict[Any, PreflightReport] = {}
        # Each `train()` collects garbage, which takes as long as an iteration if it visits all objects so far.
        gc.collect()
        gc.freeze()

    def measure(self, cases: dict[Any, Case]) -> dict[Any, dict[str, Any]]:
        """One entry per case. On the toy the cases take turns; a large model is trained case by case."""
        records: dict[Any, list[list[dict[str, Any]]]] = {key: [[] for _ in range(self.args.rounds)] for key in cases}
        turns = []
        for key, case in cases.items():
            for number in range(self.args.rounds):
                for index, position in enumerate(case.positions):
                    turns.append((number, index / len(case.positions), key, position))
        if not self.args.flux_dev:
            turns.sort(key=lambda turn: turn[:2])
        failed = set()
        for number, _, key, position in tqdm(turns):
            if key in failed:
                continue
            try:
                records[key][number].append(self.run(key, cases[key], position))
            except torch.OutOfMemoryError:
                failed.add(key)
                self.pipe.transformer.zero_grad()
        entries = {}
        for key, case in cases.items():
            if key in failed:
                entries[key] = {"error": "out of memory"}
            else:
                entries[key] = self._entry(case, records[key]) | self._findings_of_preflight(key)
        return entries

    def run(self, key: Any, case: Case, position: int) -> dict[str, Any]:
        """One iteration with the window at `position`. To warm up, the first of a case runs twice if that is cheap."""
        is_new = key not in self.trainers
        if is_new:
            if self.args.flux_dev:  # the optimizer's moments alone are several GB
                self.trainers.clear()
                gc.collect()
                torch.cuda.empty_cache()
            self.trainers[key] = self.make_trainer(case)
            if self.args.preflight:
                self.preflights[key] = self.trainers[key].preflight()
        trainer = self.trainers[key]
        engine = trainer.engine
        engine.window_schedule = dataclasses.replace(engine.window_schedule, start=position)
        self.stopwatch.engine = engine
        warms_up = is_new and (not self.args.flux_dev or self.args.compile)
        for _ in range(1 + warms_up):
            trainer.train()
        # Of the first update's transitions: the effect of precision and batch shapes alone.
        deviation = trainer.state.log_history[-1]["ratio/on_policy_max_deviation"]
        return self.stopwatch.record | {"ratio_deviation": deviation}

    def reward(self, prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
        """The score and a small term that differs between images: no advantage is 0, so every image is replayed."""
        scores = self.score(prompts, images) if self.score else [0.0] * len(images)
        differences = np.random.default_rng(0).normal(scale=1e-3, size=len(images)).tolist()
        return [score + difference for score, difference in zip(scores, differences, strict=True)]

    def make_trainer(self, case: Case) -> MixGRPOTrainer:
        args = self.args
        settings: dict[str, Any] = {
            "max_steps": case.settings["steps_per_generation"],
            "compile_repeated_blocks": args.compile,
            "attention_backend": args.attention_backend,
            "use_cpu": self.device.type == "cpu",
            "dataloader_pin_memory": False,
            "output_dir": self.folder,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "logging_images_steps": None,
            "disable_tqdm": True,
        }
        if args.gradient_checkpointing:
            settings["gradient_checkpointing"] = True
        config = MixGRPOConfig.from_preset(case.preset, **(settings | case.settings))
        # Later trainers go on with the LoRA of the first one.
        has_lora = bool(getattr(self.pipe.transformer, "peft_config", None))
        trainer = MixGRPOTrainer(
            model=self.pipe,
            reward_funcs=self.reward,
            args=config,
            train_dataset=[{"prompt": text} for text in toy.prompts("train", config.prompts_per_iteration)],
            peft_config=None if has_lora or args.full else LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank),
            callbacks=[StopwatchCallback(self.stopwatch)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.engine.timer = self.stopwatch
        trainer.accelerator.backward = self.stopwatch.during_backward(trainer.accelerator.backward)
        return trainer

    def _findings_of_preflight(self, key: Any) -> dict[str, float]:
        report = self.preflights.get(key)
        if report is None:
            return {}
        findings = {"preflight_seconds": report.seconds_per_iteration}
        if report.memory_peak is not None:
            findings["preflight_memory_gb"] = report.memory_peak / 1e9
        return findings

    def _entry(self, case: Case, records: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """The round of median time, and the times of all rounds."""
        means = [mean_record(records_of_round) for records_of_round in records]
        entry = sorted(means, key=lambda mean: mean["seconds_per_iteration"])[(len(means) - 1) // 2]
        seconds = entry["seconds_per_iteration"]
        in_transformer = entry.pop("forward_seconds") + entry["parts"]["replay_backward"]
        entry["transformer_share"] = in_transformer / seconds
        entry["updates"] = case.settings["steps_per_generation"]
        entry["ratio_deviation"] = max(record["ratio_deviation"] for of_round in records for record in of_round)
        if "ode_cache" not in case.settings:  # with a cache, a forward pass skips most of the blocks
            flops = iteration_flops(self.pipe, case.settings, entry["passes"], self.args.full)
            entry["tflops"] = flops / seconds / 1e12
            entry["tflops_in_transformer"] = flops / in_transformer / 1e12
        for name in ("seconds_per_iteration", "cpu_seconds_per_iteration"):
            entry[f"{name}_of_rounds"] = [mean[name] for mean in means]
        return entry


# ---- Timing ----


class Stopwatch(PhaseTimer):
    """
    Splits the time of an iteration into parts. A part lasts until the next one begins, so they add up to the whole.

    It takes the place of the engine's timer, whose phases it refines. On a GPU it waits for the device between parts.

    Attributes:
        record (`dict[str, Any]`): The measurements of the last iteration.
        engine ([`~diffusers_mixgrpo.training.engine.Engine`]): The engine whose iteration is timed.
        phase_name (`str`): The engine's current phase, or `""`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.engine: Any = None
        self.record: dict[str, Any] = {}
        self.phase_name = ""
        self._is_running = False
        self._part = "rest"
        self._start = 0.0
        self._cpu_start = 0.0
        self._part_start = 0.0
        self._forward_start = 0.0

    def watch(self, transformer: torch.nn.Module) -> None:
        """Time the forward passes of a module."""
        transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        transformer.register_forward_hook(self._after_forward)

    def begin_iteration(self) -> None:
        self.record = {
            "seconds_per_iteration": 0.0,
            "cpu_seconds_per_iteration": 0.0,
            "forward_seconds": 0.0,
            "parts": dict.fromkeys(PARTS, 0.0),
            "passes": dict.fromkeys(PASSES, 0),
        }
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def begin_step(self) -> None:
        self._is_running = True
        self._part = "rest"
        self._start = self._now()
        self._cpu_start = time.process_time()
        self._part_start = self._start

    def end_step(self) -> None:
        self._switch("rest")
        self._is_running = False
        self.record["seconds_per_iteration"] += self._part_start - self._start
        self.record["cpu_seconds_per_iteration"] += time.process_time() - self._cpu_start
        if self.device.type == "cuda":
            self.record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phase_name = name
        if name in PHASE_PARTS:
            self._switch(PHASE_PARTS[name])
        try:
            with super().phase(name):
                yield
        finally:
            self.phase_name = ""
            if name in PHASE_PARTS:
                self._switch("rest")

    def during_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed. The time after it is the optimizer's, until the next part begins."""

        def timed_backward(*args: Any, **kwargs: Any) -> Any:
            self._switch("replay_backward")
            result = backward(*args, **kwargs)
            self._switch("optimizer")
            return result

        return timed_backward

    def _before_forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._is_running:
            part = self._part_of_forward()
            self._switch(part)
            self.record["passes"][part] += kwargs["hidden_states"].shape[0]
            self._forward_start = self._part_start

    def _after_forward(self, module: Any, args: Any, output: Any) -> None:
        if self._is_running:
            self.record["forward_seconds"] += self._now() - self._forward_start

    def _part_of_forward(self) -> str:
        if self.phase_name == "training":
            return "replay_forward"
        scheduler = self.engine.scheduler
        step = scheduler.step_index or 0  # None before the first step
        if step in scheduler.window:
            return "window"
        return "prefix" if step < scheduler.window.start else "suffix"

    def _switch(self, part: str) -> None:
        if self._is_running:
            now = self._now()
            self.record["parts"][self._part] += now - self._part_start
            self._part = part
            self._part_start = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class StopwatchCallback(TrainerCallback):
    """Starts and stops the stopwatch with each optimizer step of a trainer."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.stopwatch.begin_iteration()
        self.stopwatch.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopwatch.end_step()


def mean_record(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number over iterations."""
    mean: dict[str, Any] = {}
    for name, first in records[0].items():
        values = [record[name] for record in records]
        mean[name] = mean_record(values) if isinstance(first, dict) else statistics.fmean(values)
    return mean


def compare(entry: dict[str, Any], base: dict[str, Any] | None, name: str) -> None:
    """Add the ratios of wall time and CPU time: the median over rounds of `entry / base`, None if one is missing."""
    for clock in ("", "cpu_"):
        key = f"{clock}seconds_per_iteration_of_rounds"
        own_times = entry.get(key, [])
        base_times = base.get(key, []) if base else []
        ratios = [own / other for own, other in zip(own_times, base_times, strict=False)]
        entry[clock + name] = statistics.median(ratios) if ratios else None


def memory_fraction(gb: float) -> float:
    """The part of the GPU's memory that is `gb` GB."""
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    if gb > total:
        raise ValueError(f"`memory_gb` must be at most the GPU's {total:.1f}, got {gb}. Leave it out.")
    return gb / total


def matmul_peak(device: torch.device) -> float:
    """TFLOP/s of the fastest of several large matrix products: bfloat16 on a GPU, float32 on a CPU."""
    is_gpu = device.type == "cuda"
    size = 8192 if is_gpu else 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if is_gpu else torch.float32)
    seconds = []
    for _ in range(13):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, threads: {torch.get_num_threads()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
