"""The images of a report: before and after, the evolution of fixed prompts, and training groups with advantages."""

from collections.abc import Sequence
from typing import Any

from .embedded_images import Size, embed
from .line_charts import short
from .logged_run import ImageGroup, ImageRecord, LoggedImage, LoggedRun


# With these limits all images of a report take less than 6 MB as base64: see MAX_BYTES in html_report.py.
MAX_PROMPTS = 8
MAX_FRAMES = 10
MAX_GROUP_IMAGES = 12
SLIDER_SIZE = Size(pixels=640, kilobytes=90)
FRAME_SIZE = Size(pixels=192, kilobytes=12)
GROUP_SIZE = Size(pixels=256, kilobytes=20)
MAX_PROMPT_LENGTH = 300

Key = tuple[str, int | None]


def pairs(runs: Sequence[LoggedRun]) -> list[dict[str, Any]]:
    """
    Two images of each fixed prompt and seed: the first and the last of a run, or the last of two runs.

    Prompts of which an image is missing are left out.
    """
    if len(runs) == 1:
        records = _records_with_samples(runs[0])
        if len(records) < 2:
            return []
        sides = records[0], records[-1]
        names = "before", "after"
    else:
        ends = [_records_with_samples(run)[-1:] for run in runs]
        if not (ends[0] and ends[1]):
            return []
        sides = ends[0][0], ends[1][0]
        names = "A", "B"
    lefts, rights = (_by_key(record) for record in sides)
    found = []
    for key in [key for key in lefts if key in rights]:
        left, right = (
            _shown(images[key], SLIDER_SIZE, record.step, name)
            for images, name, record in zip((lefts, rights), names, sides, strict=True)
        )
        if left is not None and right is not None:
            found.append({"prompt": clipped(key[0]), "seed": key[1], "left": left, "right": right})
        if len(found) == MAX_PROMPTS:
            break
    return found


def films(runs: Sequence[LoggedRun]) -> list[dict[str, Any]]:
    """The images of each fixed prompt and seed over the steps: a strip for each run that has it."""
    keys = [_keys(run) for run in runs]
    shared = [key for key in keys[0] if all(key in others for others in keys)]
    found = []
    for key in shared[:MAX_PROMPTS]:
        strips = []
        for index, run in enumerate(runs):
            frames = _frames(run, key)
            if len(frames) > 1:
                strips.append({"letter": "AB"[index] if len(runs) > 1 else "", "frames": frames})
        if strips:
            edited = _edited(runs[0], key)
            found.append({"prompt": clipped(key[0]), "seed": key[1], "edited": edited, "strips": strips})
    return found


def prompt_count(runs: Sequence[LoggedRun]) -> int:
    """The number of fixed prompts and seeds that all runs have."""
    keys = [_keys(run) for run in runs]
    return len([key for key in keys[0] if all(key in others for others in keys)])


def groups(runs: Sequence[LoggedRun]) -> list[dict[str, Any]]:
    """The best and worst training groups: those of the first and the last record of a run, or the last of two runs."""
    found = []
    for index, run in enumerate(runs):
        records = [record for record in run.images if record.groups]
        chosen = records[-1:] if len(runs) > 1 else [*records[:1], *records[1:][-1:]]
        for record in chosen:
            for group in record.groups[:2]:
                letter = "AB"[index] if len(runs) > 1 else ""
                if (shown := _group(group, record.step, letter)) is not None:
                    found.append(shown)
    return found


def clipped(text: str, length: int = MAX_PROMPT_LENGTH) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _records_with_samples(run: LoggedRun) -> list[ImageRecord]:
    return [record for record in run.images if record.samples]


def _by_key(record: ImageRecord) -> dict[Key, LoggedImage]:
    return {(image.prompt, image.seed): image for image in record.samples}


def _keys(run: LoggedRun) -> list[Key]:
    return list(dict.fromkeys(key for record in run.images for key in _by_key(record)))


def _frames(run: LoggedRun, key: Key) -> list[dict[str, Any]]:
    """At most `MAX_FRAMES` images over the run, evenly spread, with the first and the last."""
    steps = [(record.step, _by_key(record)[key]) for record in run.images if key in _by_key(record)]
    if len(steps) > MAX_FRAMES:
        last = len(steps) - 1
        steps = [steps[round(index * last / (MAX_FRAMES - 1))] for index in range(MAX_FRAMES)]
    shown = [_shown(image, FRAME_SIZE, step) for step, image in steps]
    return [frame for frame in shown if frame is not None]


def _edited(run: LoggedRun, key: Key) -> dict[str, Any] | None:
    """The image that is edited for a fixed prompt, if there is one."""
    paths = [_by_key(record)[key].condition for record in run.images if key in _by_key(record)]
    embedded = embed(paths[0], FRAME_SIZE) if paths and paths[0] is not None else None
    return None if embedded is None else {"image": embedded, "alt": f"“{clipped(key[0], 120)}”, the image to edit"}


def _group(group: ImageGroup, step: int, letter: str) -> dict[str, Any] | None:
    """The images of a group by their advantages, of a large group those at both ends."""
    ordered = sorted(group.images, key=lambda image: -(image.advantage or 0.0))
    half = MAX_GROUP_IMAGES // 2
    chosen = ordered if len(ordered) <= MAX_GROUP_IMAGES else [*ordered[:half], *ordered[-half:]]
    shown = [_shown(image, GROUP_SIZE, step, f"{group.which} group") for image in chosen]
    images = [image for image in shown if image is not None]
    if not images:
        return None
    largest = max((abs(image.advantage) for image in group.images if image.advantage is not None), default=0.0)
    return {
        "letter": letter,
        "which": group.which,
        "step": step,
        "prompt": clipped(group.prompt),
        "window_start": group.window_start,
        "count": len(group.images),
        "images": images,
        "largest": largest,
    }


def _shown(image: LoggedImage, size: Size, step: int, which: str = "") -> dict[str, Any] | None:
    """An image with what is written about it, or `None` if its file cannot be shown."""
    embedded = embed(image.path, size) if image.path is not None else None
    if embedded is None:
        return None
    reward = "not scored" if image.reward is None else short(round(image.reward, 3))
    scores = ", ".join(f"{name} {short(round(score, 4))}" for name, score in list(image.rewards.items())[:8])
    return {
        "image": embedded,
        "step": step,
        "reward": reward,
        "scores": clipped(scores),
        "advantage": image.advantage,
        "alt": ", ".join(part for part in (f"“{clipped(image.prompt, 120)}”", which, f"step {step}") if part),
    }
