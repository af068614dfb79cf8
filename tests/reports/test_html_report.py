import base64
import io
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from example_run import TEXTS
from PIL import Image

from diffusers_mixgrpo.reports.embedded_images import embed
from diffusers_mixgrpo.reports.html_report import MAX_BYTES, duration, write_report
from diffusers_mixgrpo.reports.line_charts import short
from diffusers_mixgrpo.reports.report_images import FRAME_SIZE, GROUP_SIZE, SLIDER_SIZE


VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "path", "source", "wbr"}


class Page(HTMLParser):
    """The text and the elements of a page. Fails where an element is not closed in its place."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


@pytest.fixture
def run(first_run, tmp_path) -> Path:
    """A copy of the run, to change."""
    return shutil.copytree(first_run, tmp_path / "my-run")


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- What the page shows ----


def test_the_page_is_whole_and_has_the_numbers_of_the_log(run):
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    evaluations = [entry for entry in history(run) if "eval_reward" in entry]
    first, last = evaluations[0], evaluations[-1]
    assert (first["step"], last["step"]) == (0, 8)
    assert f"{first['eval_reward']:.3f} ± {first['eval_reward_se']:.3f}" in page.text
    assert f"{last['eval_reward']:.3f} ± {last['eval_reward_se']:.3f}" in page.text
    assert f"{last['eval_reward'] - first['eval_reward']:+.3f}" in page.text
    assert f"{len(TEXTS)} prompts not trained on" in page.text
    for entry in history(run):  # in the tables under the charts
        for name in ("reward", "grad_norm", "reward_std", "eval_rewards/blueness/mean"):
            if name in entry:
                assert short(entry[name]) in page.text, (name, entry["step"])
    assert "A LoRA of rank 4 for a local FluxPipeline (miniature)" in page.text and "to raise redness" in page.text
    assert "8 of 8, finished" in page.text
    assert "torch 2.0" in page.text


def test_the_points_of_a_chart_are_those_of_the_log(run):
    page = Page(write_report(run))
    charts = [json.loads(a["data-series"]) for _, a in page.elements if "data-series" in a]
    reward = next(chart for chart in charts if [line["label"] for line in chart][:1] == ["training prompts"])
    logged = [(entry["step"], entry["reward"]) for entry in history(run) if "reward" in entry]
    points = reward[0]["points"]
    assert [(point[0], point[3]) for point in points] == [(step, short(value)) for step, value in logged]
    lowest, highest = min(logged, key=lambda p: p[1]), max(logged, key=lambda p: p[1])
    heights = {point[0]: point[2] for point in points}
    assert heights[highest[0]] == max(heights.values()) and heights[lowest[0]] == min(heights.values())


def test_rewards_that_are_never_trained_on_are_marked(run):
    text = Page(write_report(run)).text
    assert re.search(r"redness\s+trained, weight 1", text)
    assert re.search(r"blueness\s+never trained on", text)


def test_images_with_alternative_texts_and_advantages(run):
    page = Page(write_report(run))
    images = page.all("img")
    assert all(image["src"].startswith("data:image/webp;base64,") for image in images)
    assert all(image["alt"] and image["width"] and image["height"] for image in images)
    # Of each of 5 prompts 2 images for the slider, and 5 of the steps 0, 2, 4, 6, 8. Two groups of 4 at two steps.
    assert len(images) == 5 * (2 + 5) + 2 * 2 * 4
    assert len(page.all("input", type="range")) == 5
    record = json.loads((run / "images" / "step_000008.json").read_text())
    for group in record["groups"]:
        for image in group["images"]:
            assert f"{image['advantage']:+.2f}" in page.text


def test_the_page_loads_nothing(run):
    page = Page(write_report(run))
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy and "img-src data:" in policy
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
    assert not re.search(r"@import|url\(", (run / "report.html").read_text())


def test_settings_that_differ_from_the_defaults_come_first(run):
    text = Page(write_report(run)).text
    differ, rest = text.split("At their defaults")
    differ = differ.split("Different from the defaults")[1]
    assert "num_generations 4 12" in re.sub(r"\s+", " ", differ)
    assert "learning_rate 0.001 1e-05" in differ
    assert "eta" not in differ.split() and "eta 0.5 0.5" in rest
    assert "hub_token" not in text and "output_dir" not in differ


def test_an_untouched_configuration_differs_from_no_default(tmp_path):
    from diffusers_mixgrpo import MixGRPOConfig
    from diffusers_mixgrpo.reports.settings_table import setting_groups

    groups = setting_groups([MixGRPOConfig(output_dir=str(tmp_path)).to_dict()])
    different = [setting for group in groups if group.title.startswith("Different") for setting in group.settings]
    assert different == []
    assert [group.title for group in groups] == ["At their defaults, or following from other settings"]


# ---- Unfinished and broken folders ----


def test_an_unfinished_run_with_a_line_that_is_being_written(run):
    lines = (run / "history.jsonl").read_text().splitlines()
    (run / "history.jsonl").write_text("\n".join(lines[:4]) + '\n{"reward": 0.12, "st')
    text = Page(write_report(run)).text
    assert "The run is unfinished" in text
    assert "The last line of history.jsonl is cut off" in text


def test_broken_lines_and_values_that_are_no_numbers(run):
    entries = history(run)
    lines = [json.dumps(entry) for entry in entries]
    lines[1:1] = [
        "not json",
        "[1, 2]",
        '{"step": 1, "reward": NaN, "grad_norm": Infinity, "loss": "x"}',
        '{"reward": 1}',
    ]
    (run / "history.jsonl").write_text("\n".join(lines) + "\n")
    page = Page(write_report(run))
    assert "Lines of history.jsonl that are not JSON are left out: 1, at 2." in page.text
    shown = [a[name] for _, a in page.elements for name in ("data-series", "d", "aria-label", "style") if name in a]
    assert not [text for text in shown if re.search(r"\b(nan|inf|infinity)\b", text, re.IGNORECASE)]


def test_a_folder_with_nothing_but_checkpoints(run):
    state = {"global_step": 8, "max_steps": 16, "log_history": history(run)}
    older = state | {"global_step": 4, "log_history": history(run)[:2]}
    for step, content in ((4, older), (8, state)):
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(content))
    (run / "history.jsonl").unlink()
    (run / "run.json").unlink()
    shutil.rmtree(run / "images")
    page = Page(write_report(run))
    assert "There is no history.jsonl: the curves come from checkpoint-8/trainer_state.json" in page.text
    assert "There is no run.json" in page.text and "settings of the run are not recorded" in page.text
    assert "No images were logged" in page.text
    assert page.all("svg") and not page.all("img")
    assert short([entry for entry in state["log_history"] if "reward" in entry][-1]["reward"]) in page.text


def test_a_resumed_run_counts_its_later_entries(run):
    entries = [entry for entry in history(run) if "train_runtime" not in entry]
    again = [entry | {"reward": 0.7654} if "reward" in entry else entry for entry in entries if entry["step"] > 2]
    (run / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, *again]))
    page = Page(write_report(run))
    charts = [json.loads(a["data-series"]) for _, a in page.elements if "data-series" in a]
    reward = next(chart for chart in charts if chart[0]["label"] == "training prompts")[0]["points"]
    steps = [point[0] for point in reward]
    assert steps == sorted(set(steps))
    assert {point[3] for point in reward if point[0] > 2} == {"0.7654"}


def test_the_summary_adds_the_evaluations_around_the_training(run):
    entries = [entry for entry in history(run) if "eval_reward" not in entry]
    (run / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    summary = {"reward_before": 0.1, "reward_before_se": 0.01, "reward_after": 0.2, "reward_after_se": 0.01}
    (run / "summary.json").write_text(json.dumps(summary | {"optimizer_steps": 8, "eval_prompts": 40}))
    text = Page(write_report(run)).text
    assert "rose from 0.100 ± 0.010 to 0.200 ± 0.010 (mean ± standard error, 40 prompts not trained on)" in text
    # 0.1 / sqrt(2 * 0.01^2)
    assert f"{0.1 / math.hypot(0.01, 0.01):.1f} standard errors of the difference" in text


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_folders_that_are_no_run_are_refused(tmp_path, what):
    folder = tmp_path / "folder"
    if what == "file":
        folder.write_text("x")
    if what == "empty":
        folder.mkdir()
    error = ValueError if what == "empty" else FileNotFoundError
    with pytest.raises(error, match="`folder` must be the `output_dir` of a training run"):
        write_report(folder)
    assert not folder.is_dir() or os.listdir(folder) == []


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"settings": 3, "reward_names": {"a": 1}, "is_lora": []}', "[" * 100000]
)
def test_a_run_json_of_another_form(run, content):
    (run / "run.json").write_text(content)
    change_json(
        run / "images" / "step_000004.json", samples=[3, {"file": 5, "prompt": ["x"], "reward": "high"}], groups=7
    )
    Page(write_report(run))


def test_images_that_cannot_be_read(run):
    (run / "images" / "step_000000" / "sample_00.webp").write_bytes(b"RIFF broken")
    (run / "images" / "step_000008" / "sample_01.webp").unlink()
    (run / "images" / "step_000004.json").write_text("{")
    page = Page(write_report(run))
    assert len(page.all("input", type="range")) == 3
    assert "images/step_000004.json could not be read" in page.text


# ---- What must not be trusted ----


HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "{{ 7*7 }}",
]


def test_texts_are_escaped(run):
    entries = history(run)
    for entry in entries:
        entry["rewards/<b>x</b>/mean"] = 0.5
    (run / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    change_json(run / "run.json", base_model=HOSTILE[0], pipeline=HOSTILE[2], versions={HOSTILE[1]: HOSTILE[2]})
    change_json(run / "run.json", reward_names=["redness", HOSTILE[2]], eval_reward_names=[HOSTILE[1]])
    change_json(run / "run.json", settings={"<i>": HOSTILE[1], "eta": HOSTILE[2]})
    for path in (run / "images").glob("*.json"):
        record = json.loads(path.read_text())
        for sample, prompt in zip(record["samples"], HOSTILE, strict=False):
            sample["prompt"] = prompt
            sample["rewards"] = {HOSTILE[2]: 1.0}
        for group in record["groups"]:
            group["prompt"] = HOSTILE[1]
            group["which"] = HOSTILE[2]
        path.write_text(json.dumps(record))
    page = Page(write_report(run))
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not page.all("b") and not page.all("i")
    for text in HOSTILE:
        assert text in page.text


@pytest.mark.parametrize("way", ["parent", "absolute", "link"])
def test_files_outside_the_images_are_not_read(run, tmp_path, way):
    secret = tmp_path / "secret.webp"
    Image.new("RGB", (32, 32), "red").save(secret, lossless=True)
    file = {"parent": "../../secret.webp", "absolute": str(secret), "link": "link.webp"}[way]
    if way == "link":
        (run / "images" / file).symlink_to(secret)
    before = len(Page(write_report(run)).all("img"))
    path = run / "images" / "step_000008.json"
    record = json.loads(path.read_text())
    record["samples"][0]["file"] = file
    path.write_text(json.dumps(record))
    page = Page(write_report(run))
    assert len(page.all("img")) == before - 3  # the slider's two, and the last one of the film
    assert "Image files outside images/ are not read: 1, " in page.text


def test_secrets_are_not_shown(run):
    settings = json.loads((run / "run.json").read_text())["settings"]
    secret = "hf_abcdefghijklmnop"
    settings |= {"hub_token": secret, "reward_init_kwargs": {"judge": {"api_key": secret}}}
    change_json(run / "run.json", settings=settings)
    assert secret not in write_report(run).read_text()


# ---- Size ----


def noise(width: int, height: int) -> Image.Image:
    """An image that cannot be compressed."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("limit", [SLIDER_SIZE, FRAME_SIZE, GROUP_SIZE])
@pytest.mark.parametrize("size", [(100, 60), (700, 900), (3, 1000)])
def test_an_image_is_bounded(tmp_path, limit, size):
    noise(*size).save(tmp_path / "noise.png")
    embedded = embed(tmp_path / "noise.png", limit)
    data = base64.b64decode(embedded.uri.removeprefix("data:image/webp;base64,"))
    assert len(data) <= 1000 * limit.kilobytes
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (embedded.width, embedded.height)
        assert max(image.size) <= limit.pixels


def test_a_small_image_is_kept_exactly(tmp_path):
    original = noise(40, 30)
    original.save(tmp_path / "noise.png")
    data = embed(tmp_path / "noise.png", FRAME_SIZE).uri.removeprefix("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(original))


@pytest.mark.slow
def test_a_large_run_is_bounded(run):
    noise(768, 512).save(run / "images" / "noise.png")
    image = {"file": "noise.png", "reward": 0.5, "rewards": {}, "advantage": 1.0}
    for step in range(0, 40, 2):
        samples = [image | {"prompt": f"{i} " + "long " * 500, "seed": i} for i in range(20)]
        groups = [
            {"which": which, "prompt": "x", "window_start": 0, "images": [image] * 24} for which in ("best", "worst")
        ]
        record = {"step": step, "samples": samples, "groups": groups}
        (run / "images" / f"step_{step:06d}.json").write_text(json.dumps(record))
    entry = next(entry for entry in history(run) if "reward" in entry)
    lines = [json.dumps(entry | {"step": step, "reward": math.sin(step)}) for step in range(1, 5001)]
    (run / "history.jsonl").write_text("\n".join(lines))
    path = write_report(run)
    assert 1_000_000 < path.stat().st_size < MAX_BYTES
    page = Page(path)
    assert "8 of 20 are shown" in page.text
    points = [json.loads(a["data-series"])[0]["points"] for _, a in page.elements if "data-series" in a]
    assert all(len(series) <= 240 for series in points)
    comparison = write_report(run, shutil.copytree(run, run.parent / "other"))
    assert 1_000_000 < comparison.stat().st_size < MAX_BYTES


# ---- Two runs ----


def test_two_runs(run, second_run):
    path = write_report(run, second_run)
    assert path == run / "comparison.html" and not (run / "report.html").exists()
    page = Page(path)
    differ = page.text.split("Different in the two runs")[1].split("Different from the defaults")[0]
    assert "learning_rate 0.001 0.002 1e-05" in differ and "window_size 2 1 4" in differ
    assert "num_generations" not in differ
    charts = [json.loads(a["data-series"]) for _, a in page.elements if "data-series" in a]
    labels = [line["label"] for line in charts[0]]
    assert labels == ["A, training prompts", "A, held-out prompts", "B, training prompts", "B, held-out prompts"]
    ends = [[e["eval_reward"] for e in history(folder) if "eval_reward" in e][-1] for folder in (run, second_run)]
    assert f"{ends[0]:.3f}" in page.text and f"{ends[1]:.3f}" in page.text
    assert len(page.all("input", type="range")) == 5


def test_two_runs_without_common_prompts(run, second_run):
    for path in (run / "images").glob("*.json"):
        record = json.loads(path.read_text())
        for sample in record["samples"]:
            sample["seed"] += 1000
        path.write_text(json.dumps(record))
    page = Page(write_report(run, second_run))
    assert not page.all("input", type="range")
    assert page.all("img")  # the groups


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.24, "8.2 s"), (59.99, "60.0 s"), (191, "3 min 11 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
