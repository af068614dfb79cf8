"""The arguments that TRL gives to rewards: `trainer_state`, `log_metric`, `log_extra`."""

import asyncio
import functools

import pytest
from helpers import PROMPTS, logged, redness
from PIL import Image
from transformers import TrainerState

from diffusers_mixgrpo.rewards.runner import RewardRunner


ROWS = [{"prompt": text, "tag": i} for i, text in enumerate(["a", "b", "c"])]
IMAGES = [Image.new("RGB", (4, 4)) for _ in ROWS]


def score(runner):
    runner.start(ROWS[:2], IMAGES[:2])
    runner.start(ROWS[2:], IMAGES[2:])
    return runner.finish().tolist()


class State:
    """A reward as an object."""

    def __call__(self, prompts, images, trainer_state, **columns):
        assert set(columns) == {"tag"}
        return [float(trainer_state.global_step)] * len(images)


async def later(prompts, images, trainer_state, log_metric, tag):
    await asyncio.sleep(0)
    log_metric("size", float(len(images)))
    return [float(trainer_state.global_step)] * len(images)


def of_the_state(prompts, images, trainer_state, tag):
    return [float(trainer_state.global_step)] * len(images)


@pytest.mark.parametrize("reward", [of_the_state, State(), later, functools.partial(of_the_state)])
def test_the_state_is_that_of_the_call(reward):
    state = TrainerState(global_step=3)
    runner = RewardRunner([reward], state=lambda: state)
    assert score(runner) == [[3.0] * 3]
    state = TrainerState(global_step=5)  # the Trainer makes a new one when training begins
    assert score(runner) == [[5.0] * 3]


def test_no_state_without_a_training():
    states = []

    def reward(prompts, images, trainer_state=0, **columns):
        states.append(trainer_state)
        return [0.0] * len(images)

    score(RewardRunner([reward]))
    assert states == [None]


def test_a_reward_that_does_not_name_them_does_not_get_them():
    """As a remote reward, which sends all columns as JSON."""

    def reward(prompts, images, **columns):
        assert set(columns) == {"tag"}
        return [1.0] * len(images)

    def strict(prompts, images, tag):
        return [1.0] * len(images)

    runner = RewardRunner([reward, strict])
    assert score(runner) == [[1.0] * 3] * 2 and not runner.errors and runner.pop_metrics() == {}


def test_metrics_are_means_over_calls():
    def reward(prompts, images, log_metric, log_extra, **columns):
        log_extra("first_letter", [prompt[0] for prompt in prompts])
        log_metric("tags", sum(columns["tag"]))
        return [1.0] * len(images)

    runner = RewardRunner([reward, later], state=TrainerState)
    score(runner)
    score(runner)
    assert runner.pop_metrics() == {"size": 1.5, "tags": 3.0}  # the async one is called for 2 images and for 1
    assert runner.pop_metrics() == {}


def test_a_wrong_metric_is_an_error_of_the_reward():
    def reward(prompts, images, log_metric, **columns):
        log_metric("size", "large")
        return [1.0] * len(images)

    runner = RewardRunner([reward])
    score(runner)
    assert isinstance(runner.errors["reward"], ValueError) and runner.pop_metrics() == {}


def test_the_trial_logs_nothing():
    runner = RewardRunner([later], state=TrainerState)
    runner.try_on_gray_images(ROWS, (4, 4))
    assert runner.pop_metrics() == {}


# ---- In training ----


def test_a_reward_that_follows_the_training(make):
    """The state has the run's length in the trial too, and the metrics are logged as in TRL."""
    seen = []

    def shaped(prompts, images, trainer_state, log_metric, **columns):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
        return redness(prompts, images)

    async def counted(prompts, images, log_metric, **columns):
        log_metric("images_per_call", len(images))
        return [1.0] * len(images)

    trainer = make(rewards=[shaped, counted], max_steps=4, eval_dataset=PROMPTS[:2], sample_batch_size=4)
    trainer.train()
    assert seen == [(0, 4), (0, 4), (2, 4)]  # the trial on gray images, and two iterations
    assert logged(trainer, "progress") == [0.0, 0.5]
    assert logged(trainer, "images_per_call") == [4.0, 4.0]
    metrics = trainer.evaluate()
    assert metrics["eval_progress"] == 1.0 and metrics["eval_images_per_call"] == 2.0


@pytest.mark.parametrize("epochs", [1, 2.5])
def test_the_length_of_a_run_by_epochs(make, epochs):
    seen = []

    def reward(prompts, images, trainer_state, **columns):
        seen.append(trainer_state.max_steps)
        return redness(prompts, images)

    trainer = make(rewards=reward, max_steps=-1, num_train_epochs=epochs)
    trainer.train()
    assert len(set(seen)) == 1 and seen[0] == trainer.state.max_steps > 0


def test_a_metric_with_a_taken_name_is_left_out(make, caplog):
    def reward(prompts, images, log_metric, **columns):
        log_metric("nfe", -1.0)
        return redness(prompts, images)

    trainer = make(rewards=reward, max_steps=2)
    trainer.train()
    assert logged(trainer, "nfe") == [5.0]
    assert "Rewards logged the metrics nfe, whose names are taken" in caplog.text
