"""The study of reward hacking: the guard rings for a reward that can be exploited, and not for an honest one."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_mixgrpo.training.hacking_guard import RISE, Summary


STUDIES = Path(__file__).parents[2] / "examples" / "studies"


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The result of the script with these flags, in this process."""
    monkeypatch.syspath_prepend(str(STUDIES))
    script = importlib.import_module("reward_hacking")

    def study(*flags):
        file = tmp_path / "figure.png"
        script.main([*flags, "--output", str(file)])
        assert np.asarray(Image.open(file)).std() > 10  # something is drawn
        return json.loads(file.with_suffix(".json").read_text())

    return study


@pytest.mark.slow
def test_a_short_run(study):
    result = study("--iterations", "2", "--eval_every", "1", "--num_eval_prompts", "4")
    assert [point["step"] for point in result["evaluations"]] == [0, 2, 4]
    assert result["baseline"]["images/dark_share"][2] == 4
    assert {"eval_rewards/redness/mean", "eval_rewards/toy_reward/mean", "eval_alarms"} <= result["evaluations"][
        0
    ].keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_reward_that_ignores_the_prompt_raises_alarms(study):
    first, *_, last = study()["evaluations"]
    assert last["eval_rewards/redness/mean"] > first["eval_rewards/redness/mean"] + 0.1
    assert last["eval_rewards/toy_reward/mean"] < 0.1 < 0.6 < first["eval_rewards/toy_reward/mean"]
    assert first["eval_alarms"] == 0 and last["eval_alarms"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_true_reward_raises_none(study):
    # All held-out prompts, or the rise would be within the noise, where the guard does not look
    result = study("--honest", "--num_eval_prompts", "253", "--eval_every", "8")
    points = result["evaluations"]
    assert points[-1]["eval_rewards/wholly_right/mean"] > points[0]["eval_rewards/wholly_right/mean"]
    count = result["baseline"]["reward"][2]
    before, after = (
        Summary(point["eval_reward"], point["eval_reward_se"] * count**0.5, count) for point in (points[0], points[-1])
    )
    assert after.errors_from(before) > RISE  # the guard has looked
    assert sum(point["eval_alarms"] for point in points) == 0
