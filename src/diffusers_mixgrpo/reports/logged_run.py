"""[`read_run`]: what a training run has left in its folder, for the report. Nothing in it is trusted."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..mixgrpo_config import without_secrets


HISTORY_NAME = "history.jsonl"
INFO_NAME = "run.json"
SUMMARY_NAME = "summary.json"
STATE_NAME = "trainer_state.json"
IMAGES_FOLDER = "images"


@dataclass(frozen=True)
class LoggedImage:
    """
    An image of a run and its scores.

    Args:
        path (`Path`, *optional*): The file, inside `images/`. `None` if there is none, or if it must not be read.
        prompt (`str`): Its prompt.
        seed (`int`, *optional*): Its seed, of a fixed sample.
        reward (`float`, *optional*): The weighted reward.
        rewards (`dict[str, float]`): Each reward that could be computed.
        advantage (`float`, *optional*): Its advantage, of a training image.
        condition (`Path`, *optional*): The image that was edited, of a fixed sample.
    """

    path: Path | None
    prompt: str
    seed: int | None = None
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    advantage: float | None = None
    condition: Path | None = None


@dataclass(frozen=True)
class ImageGroup:
    """The training images of a prompt in an iteration. `which` says why they were logged: `"best"` or `"worst"`."""

    which: str
    prompt: str
    window_start: int | None
    images: list[LoggedImage]


@dataclass(frozen=True)
class ImageRecord:
    """The images that were logged at an optimizer step."""

    step: int
    samples: list[LoggedImage]
    groups: list[ImageGroup]


@dataclass
class LoggedRun:
    """
    A run, as far as its folder tells.

    Attributes:
        path (`Path`): The folder.
        history (`list[dict[str, float]]`): The logs in their order, each with a `"step"`; finite numbers only.
        info (`dict`): What the run is, from `run.json`.
        settings (`dict`): The configuration, without secrets.
        summary (`dict`): The summary that the training command writes at its end.
        state (`dict`): The newest trainer's state of a checkpoint, without its logs.
        images (`list[ImageRecord]`): The logged images by step.
        gaps (`list[str]`): What is missing or could not be read, in words.
    """

    path: Path
    history: list[dict[str, float]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    images: list[ImageRecord] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def last_step(self) -> int:
        """Optimizer steps that the logs cover."""
        return int(max((entry["step"] for entry in self.history), default=0))

    def series(self, name: str) -> list[tuple[float, float]]:
        """The step and the value of each log entry that has a metric, in their order."""
        return [(entry["step"], entry[name]) for entry in self.history if name in entry]

    def names(self, pattern: str) -> list[str]:
        """Metrics whose whole name matches a regular expression, in the order in which they first appear."""
        found = {name: None for entry in self.history for name in entry}
        return [name for name in found if re.fullmatch(pattern, name)]

    def by_window(self, name: str) -> list[tuple[float, float]]:
        """The mean of a measurement at each place of the window, by the window's first step."""
        values: dict[int, list[float]] = {}
        for metric in self.names(rf"{re.escape(name)}_by_window/\d+"):
            values[int(metric.rsplit("/", 1)[1])] = [value for _, value in self.series(metric)]
        return [(place, sum(values[place]) / len(values[place])) for place in sorted(values)]


def read_run(folder: Path) -> LoggedRun:
    """
    Read what is there of a run, also of an unfinished one.

    Raises:
        `FileNotFoundError`: If there is no such folder.
        `ValueError`: If the folder holds nothing of a run.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`folder` must be the `output_dir` of a training run, got {str(folder)!r}, which is no folder. Check the "
            f"path (working directory: {str(Path.cwd())!r})."
        )
    run = LoggedRun(folder.resolve())
    state = _newest_state(run)
    run.state = {key: value for key, value in state.items() if key != "log_history"}
    _read_history(run, state)
    run.info = without_secrets(_read_object(run, run.path / INFO_NAME, "what was trained is only partly known"))
    run.summary = _read_object(run, run.path / SUMMARY_NAME)
    configuration = as_object(run.summary.get("configuration"))
    run.settings = without_secrets(as_object(run.info.get("settings")) or as_object(configuration.get("training")))
    if not run.settings:
        run.gaps.append("The settings of the run are not recorded.")
    _read_images(run)
    if not (run.history or run.info or run.summary or run.images):
        raise ValueError(
            f"`folder` must be the `output_dir` of a training run, got {str(folder)!r}, which has no {HISTORY_NAME}, "
            f"{INFO_NAME}, {SUMMARY_NAME}, logged images, or checkpoint with a {STATE_NAME}. Pass another folder."
        )
    return run


# ---- Values from JSON ----


def as_number(value: Any) -> float | None:
    """A finite number, or `None`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _as_integer(value: Any) -> int | None:
    number = as_number(value)
    return None if number is None else int(number)


# ---- Logs ----


def _newest_state(run: LoggedRun) -> dict[str, Any]:
    """The trainer's state with the most steps: of a checkpoint, or in the folder itself."""
    paths = [*run.path.glob(f"checkpoint-*/{STATE_NAME}"), run.path / STATE_NAME]
    newest: dict[str, Any] = {}
    for path in paths:
        state = _read_object(run, path)
        if (as_number(state.get("global_step")) or 0) >= (as_number(newest.get("global_step")) or 0) and state:
            newest = state | {"path": path.relative_to(run.path).as_posix()}
    return newest


def _read_history(run: LoggedRun, state: dict[str, Any]) -> None:
    path = run.path / HISTORY_NAME
    if path.is_file():
        entries = list(_json_lines(run, path))
    else:
        entries = as_list(state.get("log_history"))
        found = f"the curves come from {state['path']} and end where it ends" if entries else "there are no curves"
        run.gaps.append(f"There is no {HISTORY_NAME}: {found}.")
    for entry in entries:
        numbers = {str(name): as_number(value) for name, value in as_object(entry).items()}
        finite = {name: value for name, value in numbers.items() if value is not None}
        if "step" not in finite:
            continue
        if run.history and run.history[-1]["step"] > finite["step"]:
            # A run that was resumed repeats steps: the later entries count.
            run.history = [earlier for earlier in run.history if earlier["step"] < finite["step"]]
        run.history.append(finite)
    if path.is_file() and not run.history:
        run.gaps.append(f"{HISTORY_NAME} has no entries: there are no curves.")


def _json_lines(run: LoggedRun, path: Path) -> Iterator[Any]:
    """The objects of a file with one per line. A broken last line is one that was being written."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    broken = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            broken.append(number)
    if broken and broken[-1] == len(lines):
        broken.pop()
        run.gaps.append(f"The last line of {path.name} is cut off and is left out.")
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        run.gaps.append(f"Lines of {path.name} that are not JSON are left out: {len(broken)}, at {shown}.")


def _read_object(run: LoggedRun, path: Path, consequence: str | None = None) -> dict[str, Any]:
    """A JSON file with an object, or an empty one. `consequence` says what it means if there is none."""
    name = path.relative_to(run.path).as_posix()
    if not path.is_file():
        if consequence is not None:
            run.gaps.append(f"There is no {name}: {consequence}.")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError, OSError):
        value = None
    if not isinstance(value, dict):
        run.gaps.append(f"{name} could not be read and is left out.")
        return {}
    return value


# ---- Images ----


def _read_images(run: LoggedRun) -> None:
    folder = run.path / IMAGES_FOLDER
    records = {}
    refused: list[str] = []
    for path in sorted(folder.glob("step_*.json")):
        value = _read_object(run, path)
        step = _as_integer(value.get("step"))
        if step is None:
            continue
        samples = [_image(folder, as_object(item), refused) for item in as_list(value.get("samples"))]
        groups = [_group(folder, as_object(item), refused) for item in as_list(value.get("groups"))]
        records[step] = ImageRecord(step, samples, groups)
    run.images = [records[step] for step in sorted(records)]
    if refused:
        shown = ", ".join(repr(name[:80]) for name in refused[:3]) + (", ..." if len(refused) > 3 else "")
        run.gaps.append(f"Image files outside {IMAGES_FOLDER}/ are not read: {len(refused)}, {shown}.")
    if not run.images:
        run.gaps.append("No images were logged with their prompts and rewards.")


def _group(folder: Path, value: dict[str, Any], refused: list[str]) -> ImageGroup:
    prompt = as_text(value.get("prompt"))
    images = [_image(folder, {"prompt": prompt} | as_object(item), refused) for item in as_list(value.get("images"))]
    return ImageGroup(as_text(value.get("which")), prompt, _as_integer(value.get("window_start")), images)


def _image(folder: Path, value: dict[str, Any], refused: list[str]) -> LoggedImage:
    rewards = {str(name): as_number(score) for name, score in as_object(value.get("rewards")).items()}
    return LoggedImage(
        path=_inside(folder, value.get("file"), refused),
        prompt=as_text(value.get("prompt")),
        seed=_as_integer(value.get("seed")),
        reward=as_number(value.get("reward")),
        rewards={name: score for name, score in rewards.items() if score is not None},
        advantage=as_number(value.get("advantage")),
        condition=_inside(folder, value.get("condition"), refused),
    )


def _inside(folder: Path, file: Any, refused: list[str]) -> Path | None:
    """The path of a file, if it lies in `folder` after all links are followed."""
    if not isinstance(file, str) or not file:
        return None
    try:
        path = (folder / file).resolve()
        is_inside = path.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a null byte, or a loop of links
        is_inside = False
    if not is_inside:
        refused.append(file)
        return None
    return path
