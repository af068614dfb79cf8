"""The soak's verdict on records and results that are made up, and a short soak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch
from PIL import Image


def records(run="killed", process=0, **series):
    """One record per value; what has no series stays the same."""
    usual = {"rss": 600_000_000, "threads": 6, "files": 12}
    count = len(next(iter(series.values())))
    rows = []
    for i in range(count):
        values = {name: series[name][i] if name in series else usual[name] for name in usual}
        rows.append({"run": run, "process": process, "iteration": 10 * (i + 1), "age": 10 * (i + 1)} | values)
    return rows


@pytest.mark.parametrize(
    ("resource", "values"),
    [
        ("rss", [600e6, 610e6, 620e6, 631e6]),
        ("rss", [600e6, 640e6, 600e6, 600e6]),
        ("threads", [6, 6, 7, 7]),
        ("threads", [6, 11, 6, 6]),
        ("files", [12, 12, 13, 14]),
        ("files", [12, 25, 12, 12]),
    ],
)
def test_growth_is_found(resource, values):
    (found,) = soak.growth(records(**{resource: values}), warmup=0)
    assert found.startswith(f"killed run, process 0: {'memory' if resource == 'rss' else resource}")


def test_what_is_not_growth():
    """The warm-up, less than 5% of memory, and a blocked thread with its event loop, which end."""
    rows = records(
        rss=[100e6, 300e6, 600e6, 620e6, 629e6, 615e6], threads=[1, 3, 6, 7, 6, 6], files=[3, 9] + [12, 15] * 2
    )
    assert soak.growth(rows, warmup=30) == []
    assert soak.growth(rows, warmup=0) != []
    assert soak.after_warmup(rows, warmup=40) == {}  # too few to judge


def test_processes_are_judged_by_themselves():
    first = records(rss=[600e6] * 4)
    second = records(process=1, rss=[900e6] * 4)
    assert soak.growth([*first, *second], warmup=0) == []


def test_differences_are_named():
    first = {"weights": {"a": torch.ones(2)}, "logs": [{"reward": 1.0}, {"reward": float("nan")}], "steps": (1, None)}
    second = {"weights": {"a": torch.ones(2)}, "logs": [{"reward": 1.0}, {"reward": float("nan")}], "steps": (1, None)}
    assert soak.differences(first, second) == []
    second["weights"]["a"] = torch.tensor([1.0, 1.0 + 2**-23])
    second["logs"][0] = {"reward": 1}
    second["logs"][1] = {"reward": 0.5}
    second["steps"] = (1,)
    assert soak.differences(first, second) == ["weights/a", "logs/0/reward", "logs/1/reward", "steps"]
    assert soak.differences({"a": 1}, {"b": 1}, "logs") == ["logs"]


def test_leftovers_are_named(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "_saving").mkdir()
    found = soak.leftovers(tmp_path)
    assert found[0] == "_saving is left in the output folder" and "more than 2 checkpoints" in found[1]


def test_a_reward_hangs_on_the_same_images_always():
    groups = [[Image.new("RGB", (4, 4), (red, i, 0)) for i in range(soak.GROUP)] for red in range(200)]
    hangs = [[soak.Hanging(20, salt).hangs(images) for images in groups] for salt in (1, 1, 2)]
    assert hangs[0] == hangs[1] != hangs[2]
    assert all(2 <= sum(one) <= 30 for one in hangs)  # 10 on average
    assert not soak.Hanging(1, 1).hangs(groups[0][:2])


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    """Two kills in twelve iterations, and rewards that hang."""
    flags = "--iterations 12 --kill_every 4 --save_every 2 --hang_every 4 --record_every 1 --warmup 100"
    done = subprocess.run(
        [sys.executable, Path(soak.__file__), *flags.split(), "--output", tmp_path], capture_output=True, text=True
    )
    text = (tmp_path / "summary.md").read_text()
    assert done.returncode == 0 and "passed" in text, done.stdout + done.stderr
    assert "- 2 kills, " in text and "SIGKILL after step" in text and "SIGTERM after step" in text
    found = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {record["process"] for record in found if record["run"] == "killed"} == {0, 1, 2}
