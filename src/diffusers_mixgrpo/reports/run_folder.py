"""
What a run writes in its `output_dir` for people and programs to read, also while it trains:

    run.json                     what the run is
    history.jsonl                its log, one JSON object per event
    images/step_000000.png       a grid of the images of fixed prompts and seeds
    images/step_000000.json      these images and the best and the worst group trained on, with their scores
    images/step_000000/*.webp    the images
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..mixgrpo_config import MixGRPOConfig
from ..policies import PipelinePolicy
from ..policies.preparation import TrainedWeights
from ..training.samples import Sample, Samples


logger = logging.get_logger(__name__)

PACKAGES = ("diffusers-mixgrpo", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
_STEP = re.compile(r"step_(\d{6,})(\.png|\.json)?")
_LOSSLESS = 256 * 256  # pixels; a lossless file of a larger image would be large


class RunFolder(TrainerCallback):
    """
    Writes `run.json` when training begins, and `history.jsonl` as the trainer logs. The first rank alone writes.

    A resumed run continues the files of the run before: log entries and images after the checkpoint are dropped. A
    new run in the same folder replaces them. Entries of evaluations before training are written when it begins. A
    disk that is full costs what could not be written, and not the run.

    Args:
        output_dir (`str`): The folder.
        facts (`dict`): What [`run_facts`] returns.
    """

    def __init__(self, output_dir: str, facts: Mapping[str, Any]) -> None:
        self.folder = Path(output_dir)
        self.facts = facts
        self._before_training: list[str] = []
        self._has_begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        history = self.folder / "history.jsonl"
        lines = self._before_training
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if state.global_step > 0:
                old = history.read_text().splitlines() if history.is_file() else map(_as_json, state.log_history)
                lines = [line for line in old if _step_of(line) <= state.global_step]
            _replace(history, "".join(f"{line}\n" for line in lines))
            started = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
            _replace(self.folder / "run.json", _as_json({**self.facts, **started}, indent=2) + "\n")
            _remove_images(self.folder / "images", state.global_step)
        except OSError as error:
            logger.warning(f"The files of the run in {self.folder} could not be written: {error}")
        self._before_training = []
        self._has_begun = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        line = _as_json(state.log_history[-1])
        if not self._has_begun:
            self._before_training.append(line)
            return
        try:
            with open(self.folder / "history.jsonl", "a") as file:
                file.write(f"{line}\n")
        except OSError as error:
            logger.warning(f"Step {state.global_step}: the log could not be written to {self.folder}: {error}")


def run_facts(
    policy: PipelinePolicy,
    settings: MixGRPOConfig,
    weights: TrainedWeights,
    reward_names: Sequence[str],
    reward_weights: Sequence[float],
    eval_reward_names: Sequence[str],
    num_processes: int,
) -> dict[str, Any]:
    """What a run is, for `run.json`. It holds no secrets."""
    pipe = policy.pipe
    base = pipe.config.get("_name_or_path")
    rank = pipe.transformer.peft_config[weights.adapter_name].r if weights.is_lora else None
    return {
        # Of a folder only its name, since the file may be published
        "base_model": Path(base).resolve().name if base and os.path.isdir(base) else base,
        "pipeline": type(pipe).__name__,
        "family": policy.family,
        "reward_names": list(reward_names),
        "reward_weights": list(reward_weights),
        "eval_reward_names": list(eval_reward_names),
        "is_lora": weights.is_lora,
        "lora_rank": rank,
        "settings": settings.to_dict(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "num_processes": num_processes,
    }


def save_samples(samples: Samples, grid: Image.Image, output_dir: str | os.PathLike) -> None:
    """
    Write the images of one step and their scores.

    Raises:
        `OSError`: If they could not be written.
    """
    name = f"step_{samples.step:06d}"
    folder = Path(output_dir) / "images"
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    grid.save(folder / f"{name}.png")
    groups = [
        {
            "which": group.which,
            "prompt": group.samples[0].prompt,
            "window_start": group.window_start,
            "images": _write_images(folder, name, group.which, group.samples, ("advantage",)),
        }
        for group in samples.groups
    ]
    fixed = _write_images(folder, name, "sample", samples.fixed, ("prompt", "seed"))
    # Last, so that a reader of the file finds the images.
    record = {"step": samples.step, "samples": fixed, "groups": groups}
    _replace(folder / f"{name}.json", _as_json(record, indent=1) + "\n")


def _write_images(
    folder: Path, name: str, prefix: str, samples: Sequence[Sample], fields: Sequence[str]
) -> list[dict[str, Any]]:
    entries = []
    for i, sample in enumerate(samples):
        file = f"{name}/{prefix}_{i:02d}.webp"
        _write_image(folder / file, sample.image)
        own = {field: getattr(sample, field) for field in fields}
        entries.append(own | {"file": file, "reward": sample.reward, "rewards": sample.rewards})
        if sample.condition is not None:
            entries[-1]["condition"] = f"{name}/edited_{i:02d}.webp"
            _write_image(folder / entries[-1]["condition"], sample.condition)
    return entries


def _write_image(path: Path, image: Image.Image) -> None:
    image.convert("RGB").save(path, lossless=image.width * image.height <= _LOSSLESS, quality=90)


def _remove_images(folder: Path, step: int) -> None:
    """Remove the images of an earlier run after `step`, or of all steps if it is 0. Other files stay."""
    for path in folder.glob("step_*"):
        match = _STEP.fullmatch(path.name)
        if match is None or (step > 0 and int(match[1]) <= step):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old or the new one whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _as_json(value: Any, indent: int | None = None) -> str:
    """JSON with null for numbers that JSON does not have, and text for objects that it does not know."""
    return json.dumps(_plain(value), allow_nan=False, default=str, indent=indent, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _step_of(line: str) -> float:
    """The step of a log entry; infinite for a line that was cut when the disk was full or the process was killed."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
