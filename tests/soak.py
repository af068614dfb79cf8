"""
A soak: a long run of the miniature pipeline that is killed again and again, and the same run left alone.

    python tests/soak.py --output outputs/soak
    python tests/soak.py --iterations 600 --kill_every 100 --output outputs/soak

About every `kill_every` iterations the process is killed, by SIGKILL and SIGTERM in turns, at a random moment. Another
process resumes the run. Two async rewards hang now and then for longer than `reward_timeout`: one awaits, the other
blocks its thread. Each process records its memory, threads and open files.

At the end both runs must have the same weights, optimizer state and logs, bit for bit, and no process may grow. The
output folder holds `records.jsonl`, `summary.md`, the processes' output, and `soak.png` if matplotlib is installed.
"""

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median_low
from typing import Any

import psutil
import torch
from helpers import PROMPTS, make_trainer, redness, trained
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffusers_mixgrpo.rewards.runner import MAX_STUCK_THREADS
from diffusers_mixgrpo.training.checkpoints import is_whole, newest_checkpoint


STEPS_PER_ITERATION = 2
GROUP = 4
TIMEOUT = 1.5  # seconds; a call that does not hang takes milliseconds, so that a busy machine does not change scores
MOST_GROWTH = 0.05  # of a process's memory after its warm-up
FILES_OF_LOOP = 3  # an event loop's selector and its pair of sockets
# Parts of the names in the logs that are not compared: times, and the Trainer's mean loss since the last resume
NOT_COMPARED = ("time/", "runtime", "per_second", "train_loss")


@dataclass
class Options:
    """The command line."""

    iterations: int
    kill_every: int
    save_every: int
    hang_every: int
    record_every: int
    warmup: int
    seed: int
    output: Path

    def as_flags(self) -> list[str]:
        return [part for name, value in vars(self).items() for part in (f"--{name}", str(value))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A long run that is killed again and again, and its straight twin.")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--kill_every", type=int, default=200, help="Iterations between kills.")
    parser.add_argument("--save_every", type=int, default=20, help="Iterations between checkpoints.")
    parser.add_argument("--hang_every", type=int, default=100, help="Mean number of reward calls between hangs.")
    parser.add_argument("--record_every", type=int, default=10, help="Iterations between records.")
    parser.add_argument("--warmup", type=int, default=100, help="Iterations of a process before memory must be flat.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments of the kills.")
    parser.add_argument("--output", type=Path, required=True, help="Folder, which is emptied.")
    parser.add_argument("--worker", choices=("straight", "killed"), help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    worker = given.pop("worker")
    process = given.pop("process")
    options = Options(**given)
    if worker is not None:
        work(options, worker, process)
        return 0
    return soak(options)


# ---- The run ----


class Hanging:
    """An async reward that hangs on some images: always on the same ones, wherever the run was interrupted."""

    def __init__(self, hang_every: int, salt: int) -> None:
        self.hang_every = hang_every
        self.salt = salt

    def hangs(self, images: list[Image.Image]) -> bool:
        digest = zlib.crc32(b"".join(image.tobytes() for image in images), self.salt)
        return len(images) == GROUP and digest % self.hang_every == 0


class Awaits(Hanging):
    """Hangs so that its event loop can stop it."""

    async def __call__(self, prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float]:
        if self.hangs(images):
            await asyncio.sleep(3600)
        return redness(prompts, images)


class Blocks(Hanging):
    """
    Blocks its thread. Only the first of an iteration's two calls does, which holds up the second: if the second one
    blocked, it would depend on the moment whether the first is finished.
    """

    def __init__(self, hang_every: int, salt: int) -> None:
        super().__init__(hang_every, salt)
        self.calls = 0

    async def __call__(self, prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float]:
        if len(images) != GROUP:
            return [0.0] * len(images)  # the trial on gray images, or an evaluation
        self.calls += 1
        if self.calls % 2 and self.hangs(images):
            self.calls += 1  # the runner drops the second call, which waits for this one
            time.sleep(3 * TIMEOUT)
        return [-score for score in redness(prompts, images)]


class Recorder(TrainerCallback):
    """Tells the parent process how far the run is, and records what this process uses."""

    def __init__(self, options: Options, run: str, process: int) -> None:
        self.options = options
        self.labels = {"run": run, "process": process}
        self.age = 0
        self.progress = open(options.output / f"{run}.progress", "w", encoding="utf-8")
        self.records = open(options.output / "records.jsonl", "a", encoding="utf-8")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.seek(0)
        self.progress.write(f"{state.global_step:10d}")
        self.progress.flush()
        iteration, inside = divmod(state.global_step, STEPS_PER_ITERATION)
        if inside:
            return
        self.age += 1
        if iteration % self.options.record_every == 0:
            own = psutil.Process()
            record = self.labels | {
                "iteration": iteration,
                "age": self.age,
                "time": time.time(),
                "rss": own.memory_info().rss,
                "threads": own.num_threads(),
                "files": own.num_fds(),
            }
            self.records.write(json.dumps(record) + "\n")
            self.records.flush()


def work(options: Options, run: str, process: int) -> None:
    """Train from the newest checkpoint, or from the beginning, to the end."""
    folder = options.output / run
    saves = STEPS_PER_ITERATION * options.save_every
    trainer = make_trainer(
        folder,
        rewards=[redness, Awaits(options.hang_every, 1), Blocks(options.hang_every, 2)],
        eval_dataset=PROMPTS[:2],
        callbacks=[Recorder(options, run, process)],
        max_steps=STEPS_PER_ITERATION * options.iterations,
        steps_per_generation=STEPS_PER_ITERATION,
        num_generations=GROUP,
        sample_batch_size=GROUP,
        reward_weights=[1.0, 0.5, 0.25],
        reward_timeout=TIMEOUT,
        max_reward_failure_rate=1.0,
        save_strategy="steps",
        save_steps=saves,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=5 * saves,
        logging_images_steps=5 * saves,
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder) is not None)
    end = {
        "weights": trained(trainer),
        "optimizer": trainer.optimizer.state_dict(),
        "logs": [comparable(entry) for entry in trainer.state.log_history],
    }
    torch.save(end, options.output / f"{run}.pt")


def comparable(entry: dict[str, Any]) -> dict[str, Any]:
    """The values of a log entry that must be the same in both runs."""
    return {name: value for name, value in entry.items() if not any(part in name for part in NOT_COMPARED)}


# ---- The kills ----


def soak(options: Options) -> int:
    """Make both runs, and judge them. Returns the exit status: 0 if everything is as it should be."""
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    start = time.monotonic()
    straight = run_worker(options, "straight", 0)
    problems = [] if straight == 0 else [f"the straight run ended with status {straight}"]
    kills = kill_again_and_again(options, problems)
    records = [json.loads(line) for line in (options.output / "records.jsonl").read_text().splitlines()]
    ends = {run: options.output / f"{run}.pt" for run in ("straight", "killed")}
    logs: list[dict[str, Any]] = []
    if all(path.exists() for path in ends.values()):
        first, second = (torch.load(path, weights_only=True) for path in ends.values())
        problems += [f"{name} differs between the runs" for name in differences(first, second)]
        logs = first["logs"]
    problems += growth(records, options.warmup)
    problems += leftovers(options.output / "killed")
    text = summarize(options, records, kills, logs, problems, time.monotonic() - start)
    (options.output / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    plot(records, kills, options.output / "soak.png")
    return 1 if problems else 0


def kill_again_and_again(options: Options, problems: list[str]) -> list[dict[str, Any]]:
    """Run to the end with kills on the way. Returns each kill: its signal, the step, and that of the checkpoint."""
    moments = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    # Anywhere between two checkpoints
    targets: list[int | None] = []
    for iteration in range(options.kill_every, options.iterations, options.kill_every):
        targets.append(STEPS_PER_ITERATION * iteration + moments.randrange(STEPS_PER_ITERATION * options.save_every))
    for process, target in enumerate([*targets, None]):
        number = signal.SIGTERM if process % 2 else signal.SIGKILL
        moment = moments.random()
        if target is not None and number == signal.SIGTERM:
            # It saves, so inside an iteration there is more to get wrong.
            target = target - target % STEPS_PER_ITERATION + 1
            moment = 0.0
        status = run_worker(options, "killed", process, target, number, moment)
        if target is None:
            expected = 0
        else:
            expected = 128 + number if number == signal.SIGTERM else -number
            checkpoint = newest_checkpoint(options.output / "killed")
            saved = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
            kills.append({"signal": number.name, "step": read_progress(options, "killed"), "saved": saved})
        if status != expected:
            problems.append(f"process {process} ended with status {status} instead of {expected}")
            break
    return kills


def run_worker(
    options: Options,
    run: str,
    process: int,
    target: int | None = None,
    number: signal.Signals = signal.SIGKILL,
    moment: float = 0.0,
) -> int:
    """
    Run one process to its end, or until a signal after optimizer step `target`. Returns its status.

    Args:
        moment (`float`): When to send the signal: part of a step's time, after `target`.
    """
    (options.output / f"{run}.progress").unlink(missing_ok=True)
    command = [sys.executable, __file__, *options.as_flags(), "--worker", run, "--process", str(process)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open(options.output / f"{run}-{process}.log", "wb") as log:
        worker = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            if target is not None:
                seconds = wait_for(worker, options, run, target)
                time.sleep(moment * seconds)
                worker.send_signal(number)
            return worker.wait()
        finally:
            worker.kill()


def wait_for(worker: subprocess.Popen, options: Options, run: str, target: int) -> float:
    """Wait for the end of an optimizer step, or of the process. Returns the seconds of a step."""
    first: tuple[int, float] | None = None
    while worker.poll() is None:
        step = read_progress(options, run)
        now = time.monotonic()
        if step >= 0 and first is None:
            first = (step, now)
        if first is not None and step >= target:
            return (now - first[1]) / max(1, step - first[0])
        time.sleep(0.02)
    return 0.0


def read_progress(options: Options, run: str) -> int:
    """The last finished optimizer step of a run's process, or -1."""
    try:
        return int((options.output / f"{run}.progress").read_text())
    except (OSError, ValueError):
        return -1


# ---- The verdict ----


def growth(records: list[dict[str, Any]], warmup: int) -> list[str]:
    """Processes whose memory, threads or open files grow after their warm-up."""
    found = []
    for name, after in after_warmup(records, warmup).items():
        memory = [record["rss"] for record in after]
        if max(memory) - min(memory) > MOST_GROWTH * memory[0]:
            found.append(f"{name}: memory between {min(memory) / 1e6:.0f} and {max(memory) / 1e6:.0f} MB")
        # A thread that a reward blocks, and its event loop, are there for a while, so the usual numbers are compared.
        half = len(after) // 2
        for resource, tolerance in (("threads", MAX_STUCK_THREADS), ("files", MAX_STUCK_THREADS * FILES_OF_LOOP)):
            numbers = [record[resource] for record in after]
            if median_low(numbers[half:]) > median_low(numbers[:half]) or max(numbers) - min(numbers) > tolerance:
                found.append(f"{name}: {resource} from {min(numbers)} to {max(numbers)}, at the end {numbers[-1]}")
    return found


def after_warmup(records: list[dict[str, Any]], warmup: int) -> dict[str, list[dict[str, Any]]]:
    """The records of each process after its warm-up, by its name. Those with less than four are left out."""
    chosen = {}
    for (run, process), group in groupby(records, key=lambda record: (record["run"], record["process"])):
        after = [record for record in group if record["age"] >= warmup]
        if len(after) >= 4:
            chosen[f"{run} run, process {process}"] = after
    return chosen


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """The names of values that are not the same, bit for bit. NaN is the same as NaN."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        pairs = [(f"{name}/{key}", first[key], second[key]) for key in first]
    elif isinstance(first, (list, tuple)) and isinstance(second, type(first)) and len(first) == len(second):
        pairs = [(f"{name}/{i}", *pair) for i, pair in enumerate(zip(first, second, strict=True))]
    else:
        return [] if is_same(first, second) else [name.strip("/")]
    return [found for key, one, other in pairs for found in differences(one, other, key)]


def is_same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first):
        return math.isnan(second)
    return type(first) is type(second) and bool(first == second)


def leftovers(folder: Path) -> list[str]:
    """What a killed run has left behind in its folder beside at most two whole checkpoints."""
    names = sorted(path.name for path in folder.glob("*") if path.is_dir() and path.name != "images")
    checkpoints = [name for name in names if is_whole(folder / name)]
    found = [f"{name} is left in the output folder" for name in names if name not in checkpoints]
    return found + ([f"more than 2 checkpoints are left: {checkpoints}"] if len(checkpoints) > 2 else [])


def summarize(
    options: Options,
    records: list[dict[str, Any]],
    kills: list[dict[str, Any]],
    logs: list[dict[str, Any]],
    problems: list[str],
    seconds: float,
) -> str:
    """The summary, in Markdown."""
    unscored = {}
    for name in ("Awaits", "Blocks"):
        unscored[name] = int(sum(entry.get(f"rewards/{name}/failed", 0) for entry in logs))
    lines = [
        f"# Soak of {options.iterations} iterations: {'failed' if problems else 'passed'}",
        "",
        f"- {len(kills)} kills, {STEPS_PER_ITERATION} optimizer steps per iteration: "
        + ", ".join(f"{kill['signal']} after step {kill['step']} (resumed from {kill['saved']})" for kill in kills),
        f"- {options.iterations * 2 * GROUP} images, of which the reward that awaits did not score "
        f"{unscored['Awaits']}, and the one that blocks {unscored['Blocks']}",
        f"- {len(logs)} entries of the logs, weights and optimizer state compared bit for bit",
        f"- {seconds / 60:.1f} minutes in all",
        "",
        f"After the first {options.warmup} iterations of each process:",
        "",
        "| process | iterations | memory (MB) | spread | threads | open files |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, after in after_warmup(records, options.warmup).items():
        ranges = {key: (min(r[key] for r in after), max(r[key] for r in after)) for key in ("rss", "threads", "files")}
        low, high = ranges["rss"]
        lines.append(
            f"| {name} | {after[0]['iteration']}-{after[-1]['iteration']} | {low / 1e6:.0f}-{high / 1e6:.0f} | "
            f"{(high - low) / after[0]['rss']:.1%} | {'-'.join(map(str, ranges['threads']))} | "
            f"{'-'.join(map(str, ranges['files']))} |"
        )
    lines += ["", "Problems:" if problems else "No problems.", *(f"- {problem}" for problem in problems[:20])]
    if len(problems) > 20:
        lines.append(f"- and {len(problems) - 20} more")
    return "\n".join(lines) + "\n"


def plot(records: list[dict[str, Any]], kills: list[dict[str, Any]], path: Path) -> None:
    """Memory, threads and open files of both runs, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(9, 7), sharex=True, layout="constrained")
    colors = {"straight": "#0072b2", "killed": "#d55e00"}
    for axis, (key, scale, label) in zip(
        axes, [("rss", 1e6, "memory (MB)"), ("threads", 1, "threads"), ("files", 1, "open files")], strict=True
    ):
        for run, color in colors.items():
            for process in sorted({record["process"] for record in records if record["run"] == run}):
                own = [record for record in records if (record["run"], record["process"]) == (run, process)]
                iterations = [record["iteration"] for record in own]
                values = [record[key] / scale for record in own]
                axis.plot(iterations, values, color=color, label=run if process == 0 else None)
        for kill in kills:
            axis.axvline(kill["step"] / STEPS_PER_ITERATION, color="black", linewidth=0.5, linestyle="dotted")
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.2 * max(record[key] for record in records) / scale)
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("iteration")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
