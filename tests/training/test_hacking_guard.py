"""The guard against reward hacking: on series that are made up, and in runs of the miniature pipeline."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PROMPTS, logged, make_trainer, redness, small_config
from transformers import TrainerState

from diffusers_mixgrpo import RewardError
from diffusers_mixgrpo.training.hacking_guard import HackingGuard, Summary, find_alarms


def summary(mean, std=0.1, count=100):
    """By default with a standard error of the difference of 0.1 * sqrt(2) / 10 = 0.0141."""
    return Summary(mean, std, count)


RISEN = {"reward": summary(0.5)}, {"reward": summary(0.53)}  # 2.1 standard errors


def alarms(before, now):
    return find_alarms(RISEN[0] | before, RISEN[1] | now)


# ---- Series ----


def test_summaries():
    values = torch.tensor([1.0, math.nan, 3.0, 5.0], dtype=torch.float64)
    assert Summary.of(values) == Summary(mean=3, std=2, count=3)
    assert Summary(3, 2, 4).errors_from(Summary(1, 4, 16)) == pytest.approx(2 / math.sqrt(1 + 1))
    assert Summary(1, 0, 4).errors_from(Summary(3, 0, 4)) == -math.inf
    assert Summary(1, 0, 4).errors_from(Summary(1, 0, 4)) == 0
    assert Summary.of(values[:1]).errors_from(Summary(3, 2, 4)) == 0  # one value has no standard error


def test_a_reward_that_falls_while_the_trained_one_rises():
    (phrase,) = alarms({"rewards/judge": summary(0.7)}, {"rewards/judge": summary(0.65)})  # 3.5 standard errors
    assert phrase == "the reward `judge`, which is not trained on, fell from 0.7 to 0.65"
    assert not alarms({"rewards/judge": summary(0.7)}, {"rewards/judge": summary(0.66)})  # 2.8
    assert not alarms({"rewards/judge": summary(0.7)}, {"rewards/judge": summary(0.9)})  # it rises too


@pytest.mark.parametrize("mean, verb", [(0.31, "rose"), (0.09, "fell")])
def test_a_statistic_that_moves_while_the_reward_rises(mean, verb):
    (phrase,) = alarms({"images/dark_share": summary(0.2)}, {"images/dark_share": summary(mean)})
    assert phrase == f"`dark_share` of the images {verb} from 0.2 to {mean} (standard deviation 0.1)"


def test_a_statistic_that_stays():
    before = {"images/dark_share": summary(0.2)}
    assert not alarms(before, {"images/dark_share": summary(0.29)})  # less than a standard deviation
    # One prompt of 100 whose baseline had no variance at all
    assert not alarms({"images/dark_share": summary(0, 0)}, {"images/dark_share": summary(0.01, 0.1)})
    assert alarms({"images/dark_share": summary(0, 0)}, {"images/dark_share": summary(0.5, 0.1)})


@pytest.mark.parametrize("reward", [0.52, 0.5, 0.3, math.nan])
def test_silence_unless_the_trained_reward_rises(reward):
    before = {"reward": summary(0.5), "rewards/judge": summary(0.7), "images/spread": summary(0.2)}
    now = {"reward": summary(reward), "rewards/judge": summary(0.1), "images/spread": summary(0.9)}
    assert find_alarms(before, now) == []
    assert len(find_alarms(before, now | {"reward": summary(0.6)})) == 2


def test_series_that_only_one_evaluation_has():
    assert not alarms({"rewards/old": summary(1)}, {"rewards/new": summary(0)})


def test_honest_noise_is_silent():
    """Of 600 differences of rewards, 0.8 lie below -3 standard errors by chance. No statistic moves by a deviation."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        normal = torch.randn((6, 64), generator=generator, dtype=torch.float64)
        names = [*(f"rewards/{i}" for i in range(3)), *(f"images/{i}" for i in range(3))]
        return {"reward": Summary(0, 1, 64)} | {n: Summary.of(v) for n, v in zip(names, normal, strict=True)}

    found = [phrase for _ in range(200) for phrase in find_alarms(draw(), draw() | {"reward": Summary(9, 1, 64)})]
    assert len(found) <= 5 and not any("of the images" in phrase for phrase in found)


# ---- The guard ----


@pytest.fixture
def warnings(monkeypatch):
    """The guard's warnings."""
    texts = []
    logger = "diffusers_mixgrpo.training.hacking_guard.logger.warning"
    monkeypatch.setattr(logger, texts.append)
    return texts


def series(reward, judge):
    """Of four prompts, with some variance."""
    noise = torch.tensor([-0.01, 0, 0, 0.01], dtype=torch.float64)
    return {"reward": reward + noise, "rewards/judge": judge + noise}


def test_the_first_evaluation_of_a_prefix_is_its_baseline(tmp_path, warnings):
    settings = small_config(tmp_path)
    guard = HackingGuard()
    state = TrainerState(global_step=8)
    assert guard.judge("eval_a", series(0.4, 0.8), settings, state) == []
    assert guard.judge("eval_b", series(0.9, 0.1), settings, state) == []  # not compared with that of `eval_a`
    assert guard.judge("eval_b", series(0.95, 0.1), settings, state) == [] and not warnings
    assert len(guard.judge("eval_a", series(0.7, 0.5), settings, state)) == 1
    assert len(guard.judge("eval_a", series(0.5, 0.7), settings, state)) == 1  # against the first, not the last one
    assert len(warnings) == 2
    assert warnings[0].startswith("Step 8: `eval_a_reward` rose from 0.4 to 0.7 on held-out prompts, while the reward")
    assert "fell from 0.8 to 0.5. The policy may be exploiting the reward: look at" in warnings[0]


def test_the_state_survives_a_json_file_to_the_last_bit():
    guard = HackingGuard()
    guard.judge("eval", {"reward": torch.rand(7, dtype=torch.float64)}, small_config("."), TrainerState())
    restored = HackingGuard.from_state(json.loads(json.dumps(guard.state())))
    assert restored.baselines == guard.baselines and len(restored.baselines["eval"]["reward"]) == 3


# ---- Runs ----


class Scripted:
    """A reward whose evaluations give the means that it is told to, one after the other."""

    def __init__(self, name, *means):
        self.__name__ = name
        self.means = list(means)
        self.calls = []

    def __call__(self, prompts, images, **columns):
        self.calls.append(images)
        if len(images) != len(PROMPTS):  # neither the trial before training nor an iteration
            return redness(prompts, images)
        mean = self.means.pop(0)
        return [mean + 0.01 * i for i in range(-2, 3)]


EVERY_ITERATION = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def saved(trainer):
    return sorted(int(path.name.split("-")[1]) for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_rewards_that_are_not_trained_on(make):
    judge = Scripted("judge", 0.3, 0.7)
    trainer = make(eval_reward_funcs=[judge], eval_dataset=PROMPTS, eval_seed=3)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/judge/mean"] == pytest.approx(0.3)
    assert metrics["eval_rewards/judge/failed"] == 0 and metrics["eval_rewards/judge/std"] > 0
    assert metrics["eval_reward"] == metrics["eval_rewards/redness/mean"] and trainer.eval_rewards.shape == (1, 5)
    trainer.train()
    assert [len(images) for images in judge.calls] == [5, 2]  # the evaluation, and the trial before training
    assert not logged(trainer, "rewards/judge/mean")
    trainer.evaluate()
    expected = trainer.sample_images([row["prompt"] for row in PROMPTS])
    assert all(np.array_equal(*pair) for pair in zip(judge.calls[-1], expected, strict=True))


def test_a_broken_reward_is_found_before_training(make):
    def broken(prompts, images, **columns):
        raise KeyError("weights")

    with pytest.raises(RewardError, match="`broken` failed on two gray images before training"):
        make(eval_reward_funcs=broken, eval_dataset=PROMPTS).train()


def test_image_statistics_are_logged(make):
    trainer = make(eval_dataset=PROMPTS, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_images/dark_share"] <= 1 and 0 < metrics["eval_images/edge_density"] < math.sqrt(2)
    assert 0 < metrics["eval_images/color_entropy"] <= 6
    prompts = [row["prompt"] for row in PROMPTS]
    first, second = (
        np.stack([np.asarray(image, dtype=float) for image in trainer.sample_images(prompts, seeds)])
        for seeds in (range(5), range(5, 10))
    )
    # 32x32 pixels are enlarged, so the statistic is that of the images themselves. Batches of other sizes may change
    # a pixel by 1.
    difference = np.sqrt(np.square((first - second) / 255).mean((1, 2, 3))).mean()
    assert metrics["eval_images/spread"] == pytest.approx(difference, abs=1 / 255)
    again = trainer.evaluate()
    assert {name: again[name] for name in metrics if "runtime" not in name} == {
        name: metrics[name] for name in metrics if "runtime" not in name
    }


def test_a_policy_that_trades_one_reward_for_another(make, warnings):
    """Redness, which is trained on, rises at the cost of its opposite: no part of it is made up."""

    def greenness(prompts, images, **columns):
        return [-score for score in redness(prompts, images)]

    batches = {"num_generations": 8, "per_device_train_batch_size": 8, "steps_per_generation": 4}
    trainer = make(
        eval_reward_funcs=[greenness],
        eval_dataset=PROMPTS,
        eval_strategy="steps",
        eval_steps=24,
        learning_rate=2e-2,
        max_steps=24,
        num_inference_steps=4,
        logging_images_steps=8,
        **batches,
    )
    before = trainer.evaluate()  # by hand, before training: the baseline
    assert before["eval_alarms"] == 0
    trainer.train()
    after = trainer.state.log_history[-2]
    assert after["eval_reward"] > before["eval_reward"] and after["eval_alarms"] >= 1
    (warning,) = warnings
    numbers = [metrics["eval_rewards/greenness/mean"] for metrics in (before, after)]
    assert f"`greenness`, which is not trained on, fell from {numbers[0]:.3g} to {numbers[1]:.3g}" in warning
    assert f"look at the images in {Path(trainer.args.output_dir, 'images')}" in warning


def test_off(make, warnings):
    judge = Scripted("judge", 0.9, 0.1)
    trainer = make(
        rewards=Scripted("trained", 0.1, 0.9), eval_reward_funcs=judge, eval_dataset=PROMPTS, hacking_guard="off"
    )
    assert all("eval_alarms" not in trainer.evaluate() for _ in range(2))
    assert not warnings


def test_stop_ends_training_and_keeps_the_best_checkpoint_without_an_alarm(make, warnings):
    trainer = make(
        rewards=Scripted("trained", 0.2, 0.4, 0.8),
        eval_reward_funcs=Scripted("judge", 0.6, 0.6, 0.2),
        eval_dataset=PROMPTS,
        hacking_guard="stop",
        max_steps=12,
        save_total_limit=1,
        **EVERY_ITERATION,
    )
    trainer.train()
    assert trainer.state.global_step == 6 and logged(trainer, "eval_alarms") == [0, 0, 1]
    best = str(Path(trainer.args.output_dir) / "checkpoint-4")
    # With a limit of 1 the Trainer keeps the best one alone in the end.
    assert trainer.state.best_model_checkpoint == best and saved(trainer) == [4]
    assert warnings[0].endswith(f"The best checkpoint without an alarm is {best}.")


def test_without_checkpoints_stop_saves_none(make, warnings):
    trainer = make(
        rewards=Scripted("trained", 0.2, 0.8),
        eval_reward_funcs=Scripted("judge", 0.6, 0.2),
        eval_dataset=PROMPTS,
        hacking_guard="stop",
        max_steps=12,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    assert trainer.state.global_step == 4 and saved(trainer) == []
    assert warnings[0].endswith("There is no checkpoint without an alarm.")


@pytest.mark.parametrize("restored_by_the_trainer", [True, False])
def test_a_resumed_run_keeps_its_baseline(make, tmp_path, warnings, restored_by_the_trainer):
    kwargs = {"eval_dataset": PROMPTS, "max_steps": 6, **EVERY_ITERATION}
    first = make(
        rewards=Scripted("trained", 0.2, 0.4, 0.6),
        eval_reward_funcs=Scripted("judge", 0.6, 0.5, 0.4),
        **kwargs,
    )
    first.train()
    (tmp_path / "output" / "checkpoint-6").rename(tmp_path / "unused")
    resumed = make_trainer(
        tmp_path / "output",
        rewards=Scripted("trained", 0.5, 0.6),
        eval_reward_funcs=Scripted("judge", 0.1, 0.4),
        restore_callback_states_from_checkpoint=restored_by_the_trainer,
        **kwargs,
    )
    resumed.evaluate()  # by hand: of another policy, and not the baseline of the run
    resumed.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-4"))
    assert logged(first, "eval_alarms") == logged(resumed, "eval_alarms") == [0, 1, 1]
    assert resumed._hacking_guard.baselines == first._hacking_guard.baselines
    assert "fell from 0.6 to 0.4" in warnings[-1]


def test_datasets_of_the_trainer_are_judged_by_their_prefix_and_others_are_not(make):
    trainer = make(eval_dataset={"a": PROMPTS[:2], "b": PROMPTS[2:]})
    metrics = trainer.evaluate()
    assert metrics["eval_a_alarms"] == metrics["eval_b_alarms"] == 0
    assert metrics["eval_reward"] == pytest.approx((metrics["eval_a_reward"] + metrics["eval_b_reward"]) / 2)
    assert set(trainer._hacking_guard.baselines) == {"eval_a", "eval_b"}
    assert "eval_alarms" not in trainer.evaluate(PROMPTS[:3])
    assert set(trainer._hacking_guard.baselines) == {"eval_a", "eval_b"}


def test_the_best_checkpoint_is_kept_when_the_reward_falls_later(make):
    trained = Scripted("trained", 0.5, 0.9, 0.3, 0.2, 0.1)
    trainer = make(rewards=trained, eval_dataset=PROMPTS, max_steps=10, save_total_limit=2, **EVERY_ITERATION)
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(0.9)
    assert trainer.state.best_model_checkpoint == str(Path(trainer.args.output_dir) / "checkpoint-4")
    assert saved(trainer) == [4, 10]


def test_the_best_checkpoint_of_several_datasets(make):
    trained = Scripted("trained", *[0.1, 0.2] * 2)
    datasets = {"a": PROMPTS, "b": PROMPTS[::-1]}
    trainer = make(rewards=trained, eval_dataset=datasets, **EVERY_ITERATION)
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(0.15)
    assert trainer.state.best_model_checkpoint == str(Path(trainer.args.output_dir) / "checkpoint-2")
