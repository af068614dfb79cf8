"""Images to look at: which, when, and that nothing else changes by them."""

import math
import random

import numpy as np
import pytest
import torch
from helpers import PROMPTS, assert_same, logged, redness, small_config, trained

from diffusers_mixgrpo.training.samples import are_due, extreme_groups, fixed_rows


@pytest.mark.parametrize(
    ("interval", "max_steps", "expected"),
    [
        (None, 8, []),
        (1, 8, [0, 2, 4, 6]),  # an iteration has two optimizer steps
        (2, 8, [0, 2, 4, 6]),
        (3, 8, [0, 4, 6]),
        (4.0, 8, [0, 4]),
        (100, 8, [0]),
        (0.5, 8, [0, 4]),
        (0.2, 40, [0, 8, 16, 24, 32]),
        (1e-9, 4, [0, 2]),
    ],
)
def test_when(tmp_path, interval, max_steps, expected):
    settings = small_config(tmp_path, logging_images_steps=interval)
    assert [step for step in range(0, max_steps, 2) if are_due(settings, step, max_steps)] == expected


def test_the_first_two_images_of_a_prompt_are_those_of_evaluations(tmp_path):
    settings = small_config(tmp_path, eval_seed=7, num_logged_prompts=2, num_logged_seeds=3)
    rows, seeds = fixed_rows(settings, PROMPTS)
    assert rows == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert seeds == [7, 12, 17, 8, 13, 18]
    assert len(fixed_rows(settings, PROMPTS[:1])[0]) == 3  # fewer prompts than asked for


@pytest.fixture
def shown(monkeypatch):
    """What the trainer draws."""
    seen = []
    draw = __import__("diffusers_mixgrpo.mixgrpo_trainer", fromlist=["draw_samples"]).draw_samples
    monkeypatch.setattr(
        "diffusers_mixgrpo.mixgrpo_trainer.draw_samples", lambda samples: seen.append(samples) or draw(samples)
    )
    return seen


def test_a_run_shows_the_same_prompts_and_seeds_from_its_first_iteration_to_its_last_weights(make, shown):
    trainer = make(logging_images_steps=0.5, num_logged_prompts=2, learning_rate=1e-2, eval_dataset=PROMPTS[2:])
    trainer.train()
    assert [samples.step for samples in shown] == [0, 2, 4] and shown[0].max_steps == 4
    for samples in shown:
        assert [(s.prompt, s.seed) for s in samples.fixed] == [("sea", 0), ("sea", 3), ("red", 1), ("red", 4)]
        assert [s.reward for s in samples.fixed] == pytest.approx(redness([], [s.image for s in samples.fixed]))
    images = trainer.sample_images(["sea", "sea", "red", "red"], [0, 3, 1, 4])
    for sample, image in zip(shown[-1].fixed, images, strict=True):
        np.testing.assert_array_equal(np.asarray(sample.image), np.asarray(image))
    first, last = ([np.asarray(sample.image) for sample in samples.fixed] for samples in (shown[0], shown[-1]))
    assert any(np.any(a != b) for a, b in zip(first, last, strict=True))
    assert [len(samples.groups) for samples in shown] == [2, 2, 0]
    assert len(logged(trainer, "time/images")) == 2


def test_without_an_evaluation_dataset_the_training_prompts_are_shown(make, shown):
    make(logging_images_steps=4, num_logged_prompts=5, cache_prompt_embeds=True, max_steps=2).train()
    assert [sample.prompt for sample in shown[0].fixed[::2]] == [row["prompt"] for row in PROMPTS]


def test_the_best_and_the_worst_group_are_those_trained_on(make):
    rewards = iter([0.2, 0.1, math.nan, 0.3, 0.5, 0.5, 0.5, 0.5] + [math.nan] * 4 + [0.9, 0.9, 0.8, 0.8])

    def scripted(prompts, images, **columns):
        return [next(rewards) for _ in images]

    batches = {"steps_per_generation": 4, "max_reward_failure_rate": 1.0}
    trainer = make(rewards=scripted, train_dataset=PROMPTS[:4], shuffle_dataset=False, **batches)
    rollout = trainer.engine.roll_out(trainer.engine.plan(0, PROMPTS[:4]))
    best, worst = extreme_groups(trainer.engine, rollout)
    assert (best.which, worst.which) == ("best", "worst") and best.window_start == 0
    assert {s.prompt for s in best.samples} == {"red"} and {s.prompt for s in worst.samples} == {"a cat"}
    assert [s.reward for s in worst.samples] == [0.2, 0.1, None, 0.3]
    assert [s.advantage for s in worst.samples] == rollout.advantages[:4].tolist()
    assert [s.image for s in best.samples] == rollout.images[12:]
    rollout.rewards[:, :] = math.nan
    assert extreme_groups(trainer.engine, rollout) == []


def test_a_single_group_is_shown_once(make):
    trainer = make(per_device_train_batch_size=2, train_dataset=PROMPTS[:1])
    rollout = trainer.engine.roll_out(trainer.engine.plan(0, PROMPTS[:1]))
    assert [group.which for group in extreme_groups(trainer.engine, rollout)] == ["best"]


def test_a_run_with_images_is_one_without_them(make):
    """Weights to the last bit, also with a reward that draws global random numbers."""

    def noisy(prompts, images, **columns):
        noise = torch.rand(len(images)) + random.random() + np.random.rand()
        return (torch.tensor(redness(prompts, images)) + noise).tolist()

    weights = []
    for interval in (None, 1):
        trainer = make(pipe=None, rewards=noisy, logging_images_steps=interval)
        trainer.train()
        weights.append(trained(trainer))
    assert_same(*weights)


def test_as_many_images_at_once_as_in_a_rollout(make, monkeypatch):
    sizes = []
    trainer = make(logging_images_steps=4, max_steps=2, sample_batch_size=3, num_logged_prompts=5)
    sample = trainer.evaluator._sample
    monkeypatch.setattr(
        trainer.evaluator, "_sample", lambda prompts, *rest: sizes.append(len(prompts)) or sample(prompts, *rest)
    )
    trainer.train()
    assert sizes == [3, 3, 3, 1, 3, 3, 3, 1]
