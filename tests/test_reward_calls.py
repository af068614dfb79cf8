"""Calling reward functions."""

import functools
import math

import numpy as np
import pytest
import torch

from diffusers_mixgrpo import RewardError
from diffusers_mixgrpo.advantages import normalize_weights
from diffusers_mixgrpo.reward_calls import call_reward, reward_names, reward_statistics


def brightness(prompts, images, **columns):
    return [0.5] * len(images)


class Judge:
    def __call__(self, prompts, images, answer):
        return answer


def call(func, count=3, **columns):
    return call_reward(func, "judge", ["a"] * count, [object()] * count, columns)


def test_names():
    assert reward_names([brightness, Judge(), functools.partial(brightness), brightness]) == [
        "brightness",
        "Judge",
        "partial",
        "brightness_3",
    ]
    with pytest.raises(ValueError, match="`reward_funcs` is empty"):
        reward_names([])
    with pytest.raises(TypeError, match="must be callables .*got 'hps'"):
        reward_names(["hps"])


@pytest.mark.parametrize(
    "answer", [[1, 2.5, None], np.array([1, 2.5, np.nan]), torch.tensor([1, 2.5, math.inf]), (True, 2.5, None)]
)
def test_scores_of_many_kinds(answer):
    scores = call(Judge(), answer=answer)
    assert scores[:2] == [1.0, 2.5] and math.isnan(scores[2])


@pytest.mark.parametrize(
    "answer, message",
    [
        ([1.0, 2.0], "`judge` returned 2 scores for 3 images"),
        ([1.0] * 4, "returned 4 scores for 3 images"),
        (None, "returned None; it must return a list of 3 numbers"),
        (0.5, "returned 0.5; it must return a list"),
        (["good", "bad", "ugly"], "returned .*'good'.*; it must return a list"),
        ([[1.0], [2.0], [3.0, 4.0]], "it must return a list"),
    ],
)
def test_answers_that_are_no_scores(answer, message):
    with pytest.raises(RewardError, match=message):
        call(Judge(), answer=answer)


def test_a_reward_that_raises():
    def judge(prompts, images):
        return [1 / 0 for _ in images]

    with pytest.raises(
        RewardError, match="`judge` raised ZeroDivisionError: division by zero.* with 3 images"
    ) as info:
        call(judge)
    assert isinstance(info.value.__cause__, ZeroDivisionError)
    with pytest.raises(RewardError, match=r"unexpected keyword argument 'answer'.*judge\(prompts, images, answer"):
        call(judge, answer=[1, 2, 3])


def test_statistics():
    rewards = torch.tensor([[1.0, 2.0, 3.0, math.nan], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    statistics = reward_statistics(rewards, ["a", "b"], normalize_weights([3, 1], 2))
    assert statistics["reward"] == pytest.approx(1.5)
    assert statistics["reward_se"] == pytest.approx(0.75 / math.sqrt(3))
    assert statistics["rewards/a/mean"] == 2 and statistics["rewards/a/std"] == pytest.approx(1)
    assert statistics["rewards/a/failed"] == 1 and statistics["rewards/b/failed"] == 0
