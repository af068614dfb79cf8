"""All checks of this project that need a GPU, in one command.

    python examples/studies/gpu_checks.py --output outputs/gpu_checks

It trains a transformer of FLUX.1-dev's size with random weights (LoRA of rank 64, 720x720 pixels, G = 12, T = 25), so
nothing is downloaded. 80 GB of GPU memory, 64 GB of RAM, and bitsandbytes for the 4-bit checks are enough for all:

- `presets`: three iterations of each method.
- `no-checkpointing`, `compile`, and `backend-<name>` for each attention backend: MixGRPO under one other option.
- `recipe-24`, `recipe-48`, `recipe-80`: the recipes of docs/recipes.md with as much memory as they are for, with
  text encoders of full size.
- `resume`: a run that is resumed from its first iteration's checkpoint against the same run left alone.

Each check runs in its own process, and the report names those that fail. Written to the output folder: a JSON file per
check, `gpu_checks.json` with all of them, and `gpu_checks.md`, a table for docs/performance.md. `--only` repeats some
checks and keeps the results of the others. `--small` runs the same code with a small transformer, on a CPU too.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from diffusers_mixgrpo.presets import METHOD_NAMES


EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

import benchmark_iteration as benchmark  # noqa: E402
from benchmark_report import in_rows  # noqa: E402


DOCUMENT = EXAMPLES.parent / "docs" / "recipes.md"
BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient")
RECIPES = (24, 48, 80)
SMALL = "--flux_dev_layers 1 1 --flux_dev_heads 1 --size 32 --max_sequence_length 12 --num_generations 2 "
SMALL += "--num_inference_steps 4 --window_size 1 --updates 2"
# Of a recipe: what the random transformer and its prompts do not need
NOT_NEEDED = ("pretrained_model_name_or_path", "reward_funcs", "dataset_name", "output_dir", "bf16", "max_steps")


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["resume"]:
        check_resume(argv[1:])
        return
    parser = argparse.ArgumentParser(description="All checks of this project that need a GPU.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for the results.")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="Run these checks alone.")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, help="Attention backends of diffusers.")
    parser.add_argument("--small", action="store_true", help="A small transformer, to try the script.")
    parser.add_argument("--same_process", action="store_true", help="No processes of their own, to try the script.")
    args = parser.parse_args(argv)
    checks = all_checks(args.backends)
    if unknown := sorted(set(args.only or ()) - set(checks)):
        parser.error(f"`only` must be among {', '.join(checks)}, got {', '.join(unknown)}.")
    if not args.small and not torch.cuda.is_available():
        parser.error("`small` must be set without a GPU, got False. A transformer of FLUX.1-dev's size needs a GPU.")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.only or checks:
        flags = [*checks[name], *(SMALL.split() if args.small else ())]
        print(f"== {name}: {shlex.join(flags)}", flush=True)
        start = time.perf_counter()
        result = run_check(name, flags, args.output / f"{name}.json", args.same_process)
        result |= {"flags": shlex.join(flags), "minutes": (time.perf_counter() - start) / 60}
        (args.output / f"{name}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        write_report(args.output, list(checks))
    print((args.output / "gpu_checks.md").read_text(encoding="utf-8"))


# ---- The checks ----


def all_checks(backends: Sequence[str]) -> dict[str, list[str]]:
    """The flags of `benchmark_iteration.py` for each check, by its name."""
    base = ["--flux_dev", "--preflight"]
    saving = [*base, "--gradient_checkpointing", "--replay_batch_size", "6", "--rounds", "3"]
    one = ["--presets", "mixgrpo"]
    checks = {
        "presets": saving,
        "no-checkpointing": [*base, *one, "--replay_batch_size", "1", "--rounds", "3"],
        "compile": [*saving, *one, "--compile"],
    }
    for backend in backends:
        checks[f"backend-{backend}"] = [*saving, *one, "--attention_backend", backend]
    for gb in RECIPES:
        recipe = recipe_flags(DOCUMENT.read_text(encoding="utf-8"), gb)
        checks[f"recipe-{gb}"] = [*base, *one, "--rounds", "3", "--memory_gb", str(gb), *recipe]
    checks["resume"] = ["--flux_dev", *one, "--gradient_checkpointing", "--replay_batch_size", "6"]
    return checks


def recipe_flags(document: str, gb: int) -> list[str]:
    """A recipe of docs/recipes.md as flags of `benchmark_iteration.py`."""
    settings: dict[str, Any] = {}
    for title in ("All recipes begin with:", f"### {gb} GB"):
        block = re.search(rf"{re.escape(title)}$.*?^```yaml$(.*?)^```$", document, re.MULTILINE | re.DOTALL)
        if block is None:
            raise ValueError(f"docs/recipes.md must have a recipe under {title!r}, got none.")
        settings |= yaml.safe_load(block[1])
    for name in NOT_NEEDED:
        settings.pop(name, None)
    rank = settings.pop("lora_rank", 64)
    settings.pop("lora_alpha", None)  # costs nothing
    size = settings.pop("height", 720)
    settings.pop("width", None)
    quantized = settings.pop("quantization", {}).get("components_to_quantize", [])
    encoders = "full_4bit" if "text_encoder_2" in quantized else "full"
    flags = ["--lora_rank", str(rank), "--size", str(size), "--text_encoders", encoders]
    if "transformer" in quantized:
        flags.append("--load_in_4bit")
    for name, flag in (
        ("compile_repeated_blocks", "--compile"),
        ("gradient_checkpointing", "--gradient_checkpointing"),
    ):
        if settings.pop(name, False):
            flags.append(flag)
    return [*flags, "--settings", json.dumps(settings)]


def run_check(name: str, flags: list[str], file: Path, same_process: bool) -> dict[str, Any]:
    """The results of a check, or its error."""
    file.unlink(missing_ok=True)
    flags = [*flags, "--output", str(file)]
    if same_process:
        try:
            check_resume(flags) if name == "resume" else benchmark.main(flags)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
    else:
        script = [__file__, "resume"] if name == "resume" else [str(EXAMPLES / "benchmark_iteration.py")]
        done = subprocess.run([sys.executable, *script, *flags], stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(file.read_text(encoding="utf-8"))


def check_resume(argv: Sequence[str]) -> None:
    """Two iterations, then the second one again from the first one's checkpoint."""
    parser = transformers.HfArgumentParser(benchmark.BenchmarkArguments)
    (args,) = parser.parse_args_into_dataclasses(list(argv))
    with tempfile.TemporaryDirectory() as folder:
        bench = benchmark.Bench(args, folder)
        case = benchmark.make_case(args, "mixgrpo", "shared-prefix")
        case.settings.update(save_strategy="steps", save_steps=args.updates, max_steps=2 * args.updates)
        straight = train(bench, case, None)
        resumed = train(bench, case, f"{folder}/checkpoint-{args.updates}")
        before = train(bench, case, f"{folder}/checkpoint-{args.updates}", max_steps=args.updates)
        results = {
            "machine": benchmark.machine(bench.device),
            "resume": {
                "difference": largest_difference(straight, resumed),
                "size_of_update": largest_difference(straight, before),
            },
        }
    Path(args.output).write_text(json.dumps(results), encoding="utf-8")


def train(
    bench: benchmark.Bench, case: benchmark.Case, checkpoint: str | None, **changes: Any
) -> dict[str, torch.Tensor]:
    """The trained weights at the end of a run."""
    trainer = bench.make_trainer(benchmark.Case(case.preset, case.settings | changes, case.positions))
    bench.stopwatch.engine = trainer.engine
    trainer.train(resume_from_checkpoint=checkpoint)
    named = trainer.pipe.transformer.named_parameters()
    return {name: weight.detach().cpu().clone() for name, weight in named if weight.requires_grad}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


# ---- The report ----


def write_report(folder: Path, names: list[str]) -> None:
    """Put the results of all checks that have been run into one JSON file and one table."""
    files = {name: folder / f"{name}.json" for name in names}
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
    (folder / "gpu_checks.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (folder / "gpu_checks.md").write_text(in_markdown(results), encoding="utf-8")


def in_markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row per check and method."""
    titles = ["check", "method", "s/iteration", "peak (GB)", "preflight (GB)", "TFLOP/s (of matmul)"]
    rows = [[*titles, "max abs(ratio - 1)"], ["---"] * 7]
    notes = []
    for name, result in results.items():
        if "error" in result:
            notes.append(f"- `{name}` failed: {result['error']}")
        if "resume" in result:
            difference, update = result["resume"]["difference"], result["resume"]["size_of_update"]
            exact = "bit for bit the same weights" if difference == 0 else f"weights that differ by {difference:.1g}"
            notes.append(f"- `{name}`: {exact}, after an iteration that changed them by {update:.1g}.")
        for entries in result.get("options", {}).values():
            for method, entry in entries.items():
                if "error" in entry:
                    notes.append(f"- `{name}`, {METHOD_NAMES[method]}: {entry['error']}")
                else:
                    rows.append([name, METHOD_NAMES[method], *numbers(entry, result["matmul_peak_tflops"])])
    machines = dict.fromkeys(result["machine"] for result in results.values() if "machine" in result)
    return "\n".join([*machines, "", in_rows(rows), "", *notes]) + "\n"


def numbers(entry: dict[str, Any], matmul_peak: float) -> list[str]:
    """The last five cells of a row."""
    memory = [f"{entry[key]:.1f}" if key in entry else "" for key in ("peak_memory_gb", "preflight_memory_gb")]
    flops = f"{entry['tflops']:.3g} ({entry['tflops'] / matmul_peak:.0%})" if "tflops" in entry else ""
    return [f"{entry['seconds_per_iteration']:.3g}", *memory, flops, f"{entry['ratio_deviation']:.1g}"]


if __name__ == "__main__":
    main()
