"""What the report says in words, from logs written here."""

from pathlib import Path

import pytest

from diffusers_mixgrpo.reports.logged_run import LoggedRun
from diffusers_mixgrpo.reports.run_findings import comparison, evaluations, headline, reward_weights
from diffusers_mixgrpo.reports.run_warnings import warnings


def run_with(*history: dict, **parts) -> LoggedRun:
    return LoggedRun(Path("run"), list(history), **({"summary": {"optimizer_steps": 8}} | parts))


def evaluation(step: int, mean: float, error: float | None = 0.03, **metrics: float) -> dict:
    errors = {} if error is None else {"eval_reward_se": error}
    return {"step": step, "eval_reward": mean, **errors, **metrics}


# ---- Headline ----


@pytest.mark.parametrize(
    ("after", "verdict", "words"),
    [
        # Standard error of the difference: 0.05
        (0.75, "gain", "rose from 0.500 ± 0.030 to 0.750 ± 0.040"),
        (0.25, "loss", "fell from 0.500 ± 0.030 to 0.250 ± 0.040"),
        (0.59, "noise", "within the noise"),
        (0.41, "noise", "within the noise"),
    ],
)
def test_a_change_is_named_by_its_standard_errors(after, verdict, words):
    found = headline(run_with(evaluation(0, 0.5), evaluation(8, after, 0.04)))
    assert found.verdict == verdict
    assert words in found.sentence
    assert found.change.errors == pytest.approx((after - 0.5) / 0.05)
    assert f"{abs(after - 0.5) / 0.05:.1f} standard errors" in found.sentence
    assert "number of prompts is not recorded" in found.sentence


def test_without_a_standard_error_nothing_is_claimed():
    found = headline(run_with(evaluation(0, 0.5, None), evaluation(8, 0.9, None)))
    assert found.verdict == "unknown" and "may be noise" in found.sentence


def test_without_an_evaluation_the_training_reward_is_named_with_care():
    rewards = [{"step": step, "reward": 0.1 * step} for step in range(1, 9)]
    found = headline(run_with(*rewards))
    assert found.verdict == "unknown"
    assert "no evaluation on held-out prompts" in found.sentence
    assert "0.100 in the first log entry and 0.800 in the last" in found.sentence
    assert "says little about other prompts" in found.sentence


def test_one_evaluation_is_no_comparison():
    found = headline(run_with(evaluation(4, 0.5)))
    assert "one evaluation, after step 4" in found.sentence and found.change is None


def test_evaluations_that_do_not_cover_the_run():
    found = headline(run_with(evaluation(2, 0.1), evaluation(4, 0.9), {"step": 8, "reward": 0.5}))
    assert "The first evaluation is after step 2, not of the untrained model" in found.sentence
    assert "The last evaluation is after step 4; the logs go on to step 8" in found.sentence


def test_several_datasets_and_the_moving_average():
    entry = {"eval_ema_reward": 0.9, "eval_faces_reward": 0.4, "eval_faces_ema_reward": 0.8}
    found = headline(run_with({"step": 0, **entry}, {"step": 8, **entry, "eval_faces_reward": 0.5}))
    assert "held-out prompts (faces)" not in found.sentence  # the only one that is no moving average
    assert "from 0.4 to 0.5" in found.sentence


def test_the_number_of_prompts_from_the_error_of_one_reward():
    metrics = {"eval_rewards/sharp/std": 0.24, "rewards/sharp/mean": 0.5}
    run = run_with(evaluation(0, 0.5, 0.03, **metrics))
    assert evaluations(run)[0].count == round((0.24 / 0.03) ** 2) == 64


def test_the_number_of_prompts_from_the_guard():
    guard = {"HackingGuard": {"args": {}, "attributes": {"baselines": {"eval": {"reward": [0.5, 0.3, 253]}}}}}
    run = run_with(evaluation(0, 0.5), state={"stateful_callbacks": guard})
    assert evaluations(run)[0].count == 253


def test_two_runs_are_compared_with_the_error_of_their_difference():
    first = run_with(evaluation(0, 0.5), evaluation(8, 0.6, 0.03))
    second = run_with(evaluation(0, 0.5), evaluation(8, 0.9, 0.04))
    found = comparison(first, second)
    assert "B is ahead by 0.300, 6.0 standard errors" in found.sentence
    assert "another training seed changes the result too" in found.sentence
    assert "A is ahead" in comparison(second, first).sentence
    assert "within the noise" in comparison(first, first).sentence
    assert "cannot be compared" in comparison(first, run_with({"step": 1, "reward": 0.5})).sentence


# ---- Rewards ----


@pytest.mark.parametrize("names", [["a", "b"], [["a", "b"], ["a"]]])
def test_weights(names):
    info = {"reward_names": names, "reward_weights": [2.0, 0.0], "eval_reward_names": ["c"]}
    run = run_with({"step": 1, "eval_rewards/d/mean": 0.5}, info=info)
    assert reward_weights(run) == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}


def test_weights_whose_order_is_not_known():
    """The logs have the rewards in the order of the alphabet, the weights are in that of the functions."""
    entry = {"step": 1, "rewards/a/mean": 0.1, "rewards/b/mean": 0.1}
    run = run_with(entry, settings={"reward_weights": [1.0, 0.0]})
    assert reward_weights(run) == {"a": None, "b": None}
    script = {"reward_funcs": ["module:b", "module:a"]}
    run = run_with(entry, settings={"reward_weights": [1.0, 0.0]}, summary={"configuration": {"script": script}})
    assert reward_weights(run) == {"b": 1.0, "a": 0.0}


def test_weights_that_are_not_recorded():
    run = run_with({"step": 1, "rewards/a/mean": 0.1, "rewards/b/mean": 0.1, "eval_x_rewards/c/mean": 0.2})
    assert reward_weights(run) == {"a": 0.5, "b": 0.5, "c": 0.0}


# ---- Warnings ----


QUIET = {
    "reward": 0.5,
    "clip_ratio/region_mean": 0.1,
    "clip_ratio_by_window/00": 0.1,
    "frac_reward_zero_std": 0.2,
    "nonfinite/steps": 0.0,
    "nonfinite/images": 0.0,
    "rewards/a/failed": 0.0,
    "ratio/on_policy_max_deviation": 1e-6,
    "eval_alarms": 0.0,
}
SETTINGS = {"max_steps": 8, "epsilon": 1e-4, "loss_type": "grpo"}


def test_a_quiet_run_has_no_warnings():
    run = run_with({"step": 4, **QUIET}, {"step": 8, **QUIET}, evaluation(8, 0.5), settings=SETTINGS)
    assert warnings(run) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_ratio/region_mean": 0.6}, "More than 50% of the transitions were clipped in 50% of the log entries"),
        ({"clip_ratio_by_window/07": 0.9}, "clipped where the window starts at step 7"),
        ({"frac_reward_zero_std": 0.9}, "In more than 80% of the groups all images had the same reward, in 50%"),
        ({"nonfinite/steps": 0.5}, "Gradients were infinite or NaN in 1 log entry, first at step 8"),
        ({"nonfinite/images": 3.0}, "Images were infinite or NaN in 1 log entry, first at step 8"),
        ({"rewards/a/failed": 5.0}, "a could not score all images in 1 log entry: up to 5 images at step 8"),
        ({"eval_rewards/b/failed": 2.0}, "b could not score all images in 1 evaluation"),
        ({"ratio/on_policy_max_deviation": 2e-4}, "the ratio deviated from 1 by up to 2e-4"),
    ],
)
def test_warnings_about_metrics(changes, words):
    run = run_with({"step": 4, **QUIET}, {"step": 8, **QUIET, **changes}, settings=SETTINGS)
    found = warnings(run)
    assert len(found) == 1 and words in found[0]


def test_alarms_of_the_guard_with_what_moved():
    untrained, image = "eval_rewards/true/mean", "eval_images/spread"
    run = run_with(
        evaluation(0, 0.1, 0.01, **{untrained: 0.7, image: 0.2, "eval_alarms": 0}),
        evaluation(8, 0.9, 0.01, **{untrained: 0.1, image: 0.05, "eval_alarms": 2}),
        info={"reward_names": ["red"], "eval_reward_names": ["true"]},
    )
    found = warnings(run)
    assert len(found) == 1
    assert "after step 8" in found[0]
    assert headline(run).verdict == "alarm" and "see the warnings" in headline(run).sentence
    for change in ("held-out reward 0.1 → 0.9", "true (never trained on) 0.7 → 0.1", "spread 0.2 → 0.05"):
        assert change in found[0]


def test_a_falling_held_out_reward():
    rose_and_fell = run_with(evaluation(0, 0.5), evaluation(4, 0.9), evaluation(8, 0.6))
    assert "fell after step 4, from 0.900 ± 0.030 to 0.600 ± 0.030" in warnings(rose_and_fell)[0]
    fell = run_with(evaluation(0, 0.5), evaluation(8, 0.2))
    assert "fell below its start: 0.500 ± 0.030 → 0.200 ± 0.030" in warnings(fell)[0]
    assert warnings(run_with(evaluation(0, 0.5), evaluation(8, 0.45))) == []  # noise


def test_states():
    entry = {"step": 4, "reward": 0.5}
    assert warnings(run_with(entry, summary={}, settings=SETTINGS)) == [
        "The run is unfinished: its logs end at step 4 of 8."
    ]
    end = {"step": 4, "train_runtime": 3.0}
    assert warnings(run_with(entry, end, summary={}, settings=SETTINGS)) == [
        "The training stopped early, at step 4 of 8."
    ]
    assert "several runs" in warnings(run_with(entry, summary={"optimizer_steps": 320}))[0]
    resumed = run_with(entry, end, {"step": 6, "reward": 0.5}, summary={}, settings=SETTINGS)
    assert warnings(resumed) == ["The run is unfinished: its logs end at step 6 of 8."]


def test_the_number_of_warnings_is_limited():
    failures = {f"rewards/{index}/failed": 1.0 for index in range(30)}
    found = warnings(run_with({"step": 8, **failures}))
    assert len(found) == 13 and found[-1] == "18 more warnings are not shown."


def test_a_standard_error_of_zero():
    run = run_with(evaluation(0, 0.5, 0.0), evaluation(8, 0.5, 0.0))
    assert headline(run).change.errors is None and "nan" not in headline(run).sentence
