"""Calling reward functions."""

import asyncio
import functools
import math
import threading
import time

import numpy as np
import pytest
import torch

from diffusers_mixgrpo import RewardError
from diffusers_mixgrpo.advantages import normalize_weights
from diffusers_mixgrpo.reward_calls import RewardRunner, check_failures, reward_names, reward_statistics


def brightness(prompts, images, **columns):
    return [0.5] * len(images)


class Judge:
    def __call__(self, prompts, images, answer):
        return answer


def call(func, count=3, timeout=None, **columns):
    """Scores of `count` images by one reward, and the runner."""
    runner = RewardRunner([func], timeout)
    rows = [{"prompt": "a"} | {name: values[i] for name, values in columns.items()} for i in range(count)]
    runner.start(rows, list(range(count)))
    return runner.finish()[0].tolist(), runner


def test_names():
    assert reward_names([brightness, Judge(), functools.partial(brightness), brightness]) == [
        "brightness",
        "Judge",
        "partial",
        "brightness_3",
    ]
    with pytest.raises(ValueError, match="`reward_funcs` is empty"):
        reward_names([])
    with pytest.raises(TypeError, match="must be names or callables .*got 3"):
        reward_names([3])


@pytest.mark.parametrize(
    "answer", [[1, 2.5, None], np.array([1, 2.5, np.nan]), torch.tensor([1, 2.5, math.inf]), (True, 2.5, None)]
)
def test_scores_of_many_kinds(answer):
    scores, _ = call(lambda prompts, images: answer)
    assert scores[:2] == [1.0, 2.5] and math.isnan(scores[2])


@pytest.mark.parametrize("asynchronous", [False, True])
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
def test_answers_that_are_no_scores(answer, message, asynchronous):
    def judge(prompts, images):
        return answer

    async def judge_later(prompts, images):
        return answer

    judge_later.__name__ = "judge"
    with pytest.raises(RewardError, match=message):
        call(judge_later if asynchronous else judge)


def test_columns_and_batches_in_their_order():
    calls = []

    def plain(prompts, images, answer):
        calls.append((prompts, images, answer))
        return answer

    async def later(prompts, images, answer):
        await asyncio.sleep(0.05 / sum(answer))  # the first to be asked is the last to answer
        return [-score for score in answer]

    runner = RewardRunner([plain, later])
    for part in ([1, 2], [3], [4, 5, 6]):
        runner.start([{"prompt": f"p{i}", "answer": i} for i in part], [f"image {i}" for i in part])
    assert runner.finish().tolist() == [[1, 2, 3, 4, 5, 6], [-1, -2, -3, -4, -5, -6]]
    assert calls == [([f"p{i}" for i in range(1, 7)], [f"image {i}" for i in range(1, 7)], [1, 2, 3, 4, 5, 6])]
    runner.start([{"prompt": "q", "answer": 7}], ["image 7"])
    assert runner.finish().tolist() == [[7], [-7]]  # and nothing of before


def test_one_bad_image_costs_no_other_its_score():
    def judge(prompts, images, answer):
        return [10 / value for value in answer]

    scores, runner = call(judge, answer=[1, 0, 5])
    assert scores[0] == 10 and math.isnan(scores[1]) and scores[2] == 2
    assert isinstance(runner.errors["judge"], ZeroDivisionError)


def test_a_reward_that_always_raises_has_no_scores():
    def judge(prompts, images):
        raise KeyError("score")

    scores, runner = call(judge)
    assert all(math.isnan(score) for score in scores)
    with pytest.raises(
        RewardError, match=r"`judge` could not score 100% of the 3 .* last error was KeyError\('score'\)"
    ):
        check_failures(torch.tensor([scores]), runner.names, 0.5, runner.errors, 7)
    check_failures(torch.tensor([scores]), runner.names, 1.0, runner.errors, 7)


def test_asynchronous_rewards_work_together_and_at_once():
    """Each waits until all others have begun: one after the other they would wait for ever."""
    begun, everyone = [], threading.Event()

    def make(name):
        async def judge(prompts, images):
            begun.append(name)
            if len(begun) == 3:
                everyone.set()
            while not everyone.is_set():
                await asyncio.sleep(0.001)
            return [1.0] * len(images)

        judge.__name__ = name
        return judge

    runner = RewardRunner([make("a"), make("b"), make("c")], timeout=20)
    runner.start([{"prompt": "x"}] * 2, ["image"] * 2)
    assert everyone.wait(20)  # before anybody has asked for the scores
    assert runner.finish().tolist() == [[1.0, 1.0]] * 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_timeout_is_no_score(asynchronous):
    async def slow_later(prompts, images):
        await asyncio.sleep(60)

    def slow(prompts, images):
        time.sleep(1.5)

    start = time.perf_counter()
    scores, runner = call(slow_later if asynchronous else slow, timeout=0.1)
    assert time.perf_counter() - start < 1.2
    assert all(math.isnan(score) for score in scores)
    assert isinstance(next(iter(runner.errors.values())), TimeoutError)


def test_an_asynchronous_reward_that_raises():
    async def judge(prompts, images):
        raise ConnectionError("no route")

    scores, runner = call(judge)
    assert all(math.isnan(score) for score in scores) and "no route" in str(runner.errors["judge"])


def test_the_reward_s_own_account_of_a_failure():
    class Remote:
        last_error = ConnectionError("503 from the server")

        async def __call__(self, prompts, images):
            return [1.0, None, 2.0]

    scores, runner = call(Remote())
    assert math.isnan(scores[1]) and "503" in str(runner.errors["Remote"])


def test_statistics():
    rewards = torch.tensor([[1.0, 2.0, 3.0, math.nan], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    statistics = reward_statistics(rewards, ["a", "b"], normalize_weights([3, 1], 2))
    assert statistics["reward"] == pytest.approx(1.5)
    assert statistics["reward_se"] == pytest.approx(0.75 / math.sqrt(3))
    assert statistics["rewards/a/mean"] == 2 and statistics["rewards/a/std"] == pytest.approx(1)
    assert statistics["rewards/a/failed"] == 1 and statistics["rewards/b/failed"] == 0
