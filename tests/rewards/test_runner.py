"""The reward runner: sync and async rewards, their failures, and statistics of their scores."""

import asyncio
import functools
import math
import threading

import numpy as np
import pytest
import torch

from diffusers_mixgrpo import RewardError
from diffusers_mixgrpo.core.advantages import normalize_weights
from diffusers_mixgrpo.rewards.runner import (
    MAX_STUCK_THREADS,
    RewardRunner,
    check_failures,
    reward_names,
    reward_statistics,
)


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
    with pytest.raises(ValueError, match=r"`reward_funcs` must not be empty, got \[\]"):
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
        ([1.0, 2.0], "`judge` must return one score per image, got 2 scores for 3 images"),
        ([1.0] * 4, "got 4 scores for 3 images"),
        (None, "must return a list of 3 numbers or None, one per image, got None"),
        (0.5, "must return a list .*got 0.5"),
        (["good", "bad", "ugly"], "must return a list .*got .*'good'"),
        ([[1.0], [2.0], [3.0, 4.0]], "must return a list"),
    ],
)
def test_invalid_return_values(answer, message, asynchronous):
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

    answered = []
    waits = {1: 2, 3: 1, 4: 0, 7: 0}  # first score of a call -> calls that answer before it: the first call is last

    async def later(prompts, images, answer):
        while len(answered) < waits[answer[0]]:
            await asyncio.sleep(0.001)
        answered.append(answer[0])
        return [-score for score in answer]

    runner = RewardRunner([plain, later])
    for part in ([1, 2], [3], [4, 5, 6]):
        runner.start([{"prompt": f"p{i}", "answer": i} for i in part], [f"image {i}" for i in part])
    assert runner.finish().tolist() == [[1, 2, 3, 4, 5, 6], [-1, -2, -3, -4, -5, -6]]
    assert calls == [([f"p{i}" for i in range(1, 7)], [f"image {i}" for i in range(1, 7)], [1, 2, 3, 4, 5, 6])]
    runner.start([{"prompt": "q", "answer": 7}], ["image 7"])
    assert runner.finish().tolist() == [[7], [-7]]  # without the earlier scores
    assert answered == [4, 3, 1, 7]


def test_a_bad_image_does_not_affect_the_others():
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


def test_async_rewards_run_concurrently():
    """Each reward waits until all have started, so they would hang if they ran one after the other."""
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

    runner = RewardRunner([make("a"), make("b"), make("c")], timeout=60)
    runner.start([{"prompt": "x"}] * 2, ["image"] * 2)
    assert everyone.wait(60)  # before `finish` is called
    assert runner.finish().tolist() == [[1.0, 1.0]] * 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_timeout_is_no_score(asynchronous):
    """The calls would return scores, but only after the runner has given up on them."""
    given_up = threading.Event()
    returned = threading.Event()

    async def slow_later(prompts, images):
        await asyncio.to_thread(given_up.wait, 60)
        returned.set()
        return [1.0] * len(images)

    def slow(prompts, images):
        given_up.wait(60)
        returned.set()
        return [1.0] * len(images)

    try:
        scores, runner = call(slow_later if asynchronous else slow, timeout=0.1)
        assert not returned.is_set()
    finally:
        given_up.set()
    assert all(math.isnan(score) for score in scores)
    assert isinstance(next(iter(runner.errors.values())), TimeoutError)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_rewards_that_block(asynchronous):
    """They are given up, a few times, and hold up neither the run nor other rewards."""
    release = threading.Event()
    calls = []

    def block(prompts, images):
        calls.append(len(images))
        assert release.wait(60)
        return [1.0] * len(images)

    async def block_the_loop(prompts, images):
        return block(prompts, images)

    async def other(prompts, images):
        await asyncio.sleep(0)
        return [2.0] * len(images)

    before = set(threading.enumerate())
    runner = RewardRunner([block_the_loop if asynchronous else block, other], timeout=0.05)
    try:
        for _ in range(MAX_STUCK_THREADS + 3):
            runner.start([{"prompt": "a"}] * 2, ["image"] * 2)
            runner.start([{"prompt": "b"}], ["image"])
            blocked, others = runner.finish().tolist()
            assert all(math.isnan(score) for score in blocked) and others == [2.0] * 3
        assert len(calls) == MAX_STUCK_THREADS
        (error,) = runner.errors.values()
        assert isinstance(error, TimeoutError) and "4 calls still run after reward_timeout=0.05 s" in str(error)
        started = set(threading.enumerate()) - before
        assert len(started) == MAX_STUCK_THREADS + 1 and all(thread.daemon for thread in started)
        stuck = [thread for thread in started if "other" not in thread.name]
    finally:
        release.set()
    for thread in stuck:
        thread.join(60)
        assert not thread.is_alive()
    runner.timeout = 60
    runner.start([{"prompt": "a"}], ["image"])
    assert runner.finish().tolist() == [[1.0], [2.0]]  # it is called again


def test_a_call_that_awaits_too_long_leaves_its_event_loop_alone():
    """Sessions and locks that a reward keeps belong to its event loop, and work only there."""
    loops = []

    async def judge(prompts, images, **columns):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(60 if len(loops) == 1 else 0)
        return [1.0] * len(images)

    runner = RewardRunner([judge], timeout=0.1)
    runner.start([{"prompt": "a"}], ["image"])
    assert math.isnan(runner.finish().item())
    runner.timeout = 60
    runner.start([{"prompt": "a"}], ["image"])
    assert runner.finish().item() == 1
    assert loops[0] is loops[1] and not loops[0].is_closed()


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_async_reward_that_exits(error, timeout):
    """The caller gets the exception, and the event loop goes on."""
    answers = iter([error, [1.0]])

    async def judge(prompts, images):
        answer = next(answers)
        if answer is error:
            raise error
        return answer

    runner = RewardRunner([judge], timeout)
    runner.start([{"prompt": "a"}], ["image"])
    with pytest.raises(error):
        runner.finish()
    runner.start([{"prompt": "a"}], ["image"])
    assert runner.finish().tolist() == [[1.0]]


def test_discarded_images_are_not_scored():
    cancelled = threading.Event()

    async def judge(prompts, images):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    runner = RewardRunner([judge, brightness])
    runner.start([{"prompt": "a"}], ["image"])
    runner.clear()
    assert cancelled.wait(60)
    assert runner.finish().shape == (2, 0)


def test_nothing_to_score():
    async def later(prompts, images):
        return [1.0] * len(images)

    scores = RewardRunner([brightness, later]).finish()
    assert scores.shape == (2, 0) and scores.dtype == torch.float64


def test_an_async_reward_that_raises():
    async def judge(prompts, images):
        raise ConnectionError("no route")

    scores, runner = call(judge)
    assert all(math.isnan(score) for score in scores) and "no route" in str(runner.errors["judge"])


def test_the_last_error_of_a_reward():
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
