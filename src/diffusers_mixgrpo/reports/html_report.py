"""[`write_report`]: a training run, or two, as one HTML page that needs no other file and no network."""

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from . import report_charts, report_images
from .line_charts import short
from .logged_run import LoggedRun, as_number, as_object, as_text, read_run
from .run_findings import (
    Headline,
    comparison,
    headline,
    is_finished,
    reward_weights,
    total_steps,
)
from .run_warnings import warnings
from .settings_table import setting_groups


REPORT_NAME = "report.html"
COMPARISON_NAME = "comparison.html"
MAX_BYTES = 8_000_000
"""No page is larger, whatever the size of the run: images, points and texts are limited."""

TEMPLATES = Path(__file__).parent / "html"


def write_report(folder: str | os.PathLike, other: str | os.PathLike | None = None) -> Path:
    """
    Write the report of a run into its folder, also while it trains and of a run that was interrupted.

    It is one page of at most 8 MB with all of its images, which opens in a browser without a network.

    Args:
        folder (`str` or `os.PathLike`): The `output_dir` of the run. What is missing there is named in the report.
        other (`str` or `os.PathLike`, *optional*): That of a second run to compare with.

    Returns:
        `Path`: The page, `report.html` in `folder`, or `comparison.html` with another run.

    Raises:
        `FileNotFoundError`: If a folder does not exist.
        `ValueError`: If a folder holds nothing of a run.
    """
    runs = [read_run(Path(path)) for path in (folder, other) if path is not None]
    path = runs[0].path / (REPORT_NAME if other is None else COMPARISON_NAME)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(render(runs), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render(runs: Sequence[LoggedRun]) -> str:
    """The page of one run, or of two."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.jinja").render(
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        **_content(runs),
    )


def _content(runs: Sequence[LoggedRun]) -> dict[str, Any]:
    """Everything that the template shows."""
    names = _distinct_names(runs)
    is_comparison = len(runs) > 1
    settings = [run.settings for run in runs]
    has_phases = any(report_charts.phases(run) for run in runs)
    return {
        "title": " and ".join(names),
        "is_comparison": is_comparison,
        "runs": [_run(run, name, index) for index, (run, name) in enumerate(zip(runs, names, strict=True))],
        "headline": comparison(*runs) if is_comparison else headline(runs[0]),
        "reward_charts": report_charts.reward_charts(runs),
        "charts_by_reward": report_charts.charts_by_reward(runs),
        "window_charts": report_charts.window_charts(runs),
        "optimization_charts": report_charts.optimization_charts(runs),
        "charts_by_window": report_charts.charts_by_window(runs),
        "nfe_charts": report_charts.nfe_charts(runs),
        "has_phases": has_phases,
        "pairs": report_images.pairs(runs),
        "films": report_images.films(runs),
        "prompt_count": report_images.prompt_count(runs),
        "groups": report_images.groups(runs),
        "setting_groups": setting_groups(settings) if any(settings) else [],
    }


def _distinct_names(runs: Sequence[LoggedRun]) -> list[str]:
    """The names of the folders, with those above them where they are the same."""
    if len({run.name for run in runs}) == len(runs):
        return [run.name for run in runs]
    return ["/".join(run.path.parts[-2:]) for run in runs]


def _run(run: LoggedRun, name: str, index: int) -> dict[str, Any]:
    """What the page says about one run."""
    found: Headline = headline(run)
    versions = [(str(key), str(value)[:60]) for key, value in as_object(run.info.get("versions")).items()]
    return {
        "name": name,
        "letter": "AB"[index],
        "color": 2 * index,
        "description": _description(run),
        "headline": found,
        "tiles": _tiles(run, found),
        "warnings": warnings(run),
        "gaps": [report_images.clipped(gap) for gap in run.gaps],
        "phases": report_charts.phases(run),
        "times": _times(run),
        "versions": versions[:40],
        "started": as_text(run.info.get("started"))[:40],
    }


def _description(run: LoggedRun) -> str:
    """What was trained, in a sentence."""
    base = as_text(run.info.get("base_model")) or "a base model that is not recorded"
    pipeline = as_text(run.info.get("pipeline"))
    model = report_images.clipped(base, 120) + (f" ({pipeline[:60]})" if pipeline else "")
    if pipeline and "/" not in base and run.info.get("base_model"):  # a folder: the Hub's names have an owner
        model = f"a local {pipeline[:60]} ({report_images.clipped(base, 120)})"
    rank = as_number(run.info.get("lora_rank"))
    kind = "A policy from"
    if run.info.get("is_lora") is True:
        kind = "A LoRA for" if rank is None else f"A LoRA of rank {int(rank)} for"
    elif run.info.get("is_lora") is False:
        kind = "All weights of the transformer of"
    weights = reward_weights(run)
    trained = [name[:60] for name, weight in weights.items() if weight]
    others = [name[:60] for name, weight in weights.items() if weight == 0]
    unknown = [name[:60] for name, weight in weights.items() if weight is None]
    sentence = f"{kind} {model}, trained with MixGRPO"
    sentence += f" to raise {_listed(trained)}." if trained else "."
    if unknown:
        sentence += f" The weights of its rewards are not recorded: {_listed(unknown)}."
    if others:
        sentence += f" Never trained on, only measured: {_listed(others)}."
    return sentence


def _listed(names: Sequence[str]) -> str:
    shown = [*names[:5], *([f"{len(names) - 5} more"] if len(names) > 5 else [])]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _tiles(run: LoggedRun, found: Headline) -> list[dict[str, str]]:
    """The most important numbers, each with a label, a note and perhaps a verdict."""
    tiles = []
    if (change := found.change) is not None:
        errors = "no standard error" if change.errors is None else f"{change.errors:+.1f} standard errors"
        tiles += [
            {"label": "Held-out reward, before", "value": str(change.before), "note": f"step {change.before.step}"},
            {"label": "Held-out reward, after", "value": str(change.after), "note": f"step {change.after.step}"},
            {"label": "Change", "value": f"{change.difference:+.3f}", "note": errors, "verdict": found.verdict},
        ]
    total = total_steps(run)
    steps = f"of {total:,}" if total is not None else "total not recorded"
    state = "finished" if is_finished(run) else "unfinished"
    done = max(run.last_step, int(as_number(run.summary.get("optimizer_steps")) or 0))
    tiles.append({"label": "Optimizer steps", "value": f"{done:,}", "note": f"{steps}, {state}"})
    seconds = _training_seconds(run)
    if seconds is not None:
        tiles.append({"label": "Training time", "value": duration(seconds), "note": "wall clock"})
    return tiles


def _training_seconds(run: LoggedRun) -> float | None:
    logged = run.series("train_runtime")
    return logged[-1][1] if logged else as_number(run.summary.get("seconds"))


def _times(run: LoggedRun) -> list[tuple[str, str]]:
    """Further times and the forward passes, as rows of a table."""
    rows = []
    if (seconds := _training_seconds(run)) is not None:
        rows.append(("The training", duration(seconds)))
    evaluating = [value for name in run.names(r"eval(_.+)?_runtime") for _, value in run.series(name)]
    if evaluating:
        rows.append((f"Evaluations ({len(evaluating)})", duration(sum(evaluating))))
    for metric, label in (
        ("nfe", "Steps of a rollout, mean"),
        ("nfe_amortized", "Forward passes computed per image, mean"),
    ):
        if values := [value for _, value in run.series(metric)]:
            rows.append((label, short(round(sum(values) / len(values), 3))))
    return rows


def duration(seconds: float) -> str:
    """Seconds in words: "8.2 s", "3 min 11 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
