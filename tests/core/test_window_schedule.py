"""Properties of the sliding window, checked for every legal schedule of small size."""

import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import groupby, islice

import pytest

import diffusers_mixgrpo.core.window_schedule
from diffusers_mixgrpo.core.window_schedule import Window, WindowSchedule


STRATEGIES = ["progressive", "random", "frozen", "linear_decay", "exp_decay"]


def every_schedule():
    for strategy in STRATEGIES:
        for steps in range(2, 9):
            for size in range(1, steps):
                for interval in (1, 3):
                    for stride in (1, 2, 3):
                        yield WindowSchedule(strategy, steps, size, interval, stride)


def sweep(schedule: WindowSchedule) -> list[Window]:
    return [schedule.schedule(iteration) for iteration in range(schedule.sweep_length)]


def runs(schedule: WindowSchedule) -> list[tuple[int, int]]:
    """(start, iterations in a row) of one sweep, counted from the outside."""
    starts = [window.start for window in sweep(schedule)]
    return [(start, len(list(group))) for start, group in groupby(starts)]


def test_windows_are_legal_everywhere():
    for schedule in every_schedule():
        for iteration in range(3 * schedule.sweep_length + 2):
            start, size = schedule.schedule(iteration)
            assert size == schedule.window_size > 0
            assert 0 <= start and start + size <= schedule.num_inference_steps - 1


def test_sweeps_repeat():
    for schedule in every_schedule():
        if schedule.strategy != "random":
            first = sweep(schedule)
            assert [schedule.schedule(schedule.sweep_length + m) for m in range(schedule.sweep_length)] == first
            assert first[0].start == 0


def test_every_step_except_the_last_is_trained_when_strides_leave_no_gap():
    for schedule in every_schedule():
        if schedule.strategy in ("progressive", "linear_decay", "exp_decay"):
            trained = {step for start, size in sweep(schedule) for step in range(start, start + size)}
            if schedule.window_stride <= schedule.window_size:
                assert trained == set(range(schedule.num_inference_steps - 1))
            assert schedule.num_inference_steps - 2 in trained  # also with gaps, a sweep goes to the end


def test_progressive_of_the_paper():
    schedule = WindowSchedule("progressive", num_inference_steps=25, window_size=4, window_interval=25)
    assert runs(schedule) == [(start, 25) for start in range(21)]
    assert schedule.sweep_length == 525
    for iteration in range(1100):
        assert schedule.schedule(iteration) == (iteration // 25 % 21, 4)


@pytest.mark.parametrize(
    ("stride", "starts"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (3, [0, 3, 5]), (5, [0, 5]), (9, [0, 5])]
)
def test_partial_strides_end_at_the_last_legal_start(stride, starts):
    schedule = WindowSchedule("progressive", 8, 2, 3, stride)
    assert runs(schedule) == [(start, 3) for start in starts]
    assert schedule.schedule(3 * len(starts)).start == 0


def test_share_of_iterations_of_each_step():
    schedule = WindowSchedule("progressive", num_inference_steps=10, window_size=4, window_interval=5)
    count = Counter(step for start, size in sweep(schedule) for step in range(start, start + size))
    for step in range(9):
        # a step lies in the windows that start at step - 3 ... step, of which 0 ... 5 are legal
        legal = [start for start in range(step - 3, step + 1) if 0 <= start <= 5]
        assert Fraction(count[step], schedule.sweep_length) == Fraction(len(legal), 6)
    assert count[9] == 0


def test_exp_decay():
    schedule = WindowSchedule("exp_decay", 25, 4, 20, decay_rate=0.1, decay_start=13)
    expected = [(start, math.ceil(20 * math.exp(-0.1 * max(0, start - 13)))) for start in range(21)]
    assert runs(schedule) == expected
    assert expected[13] == (13, 20) and expected[14] == (14, 19) and expected[20] == (20, 10)
    assert schedule.sweep_length == sum(stay for _, stay in expected)
    steep = WindowSchedule("exp_decay", 12, 2, 5, decay_rate=50.0, decay_start=0)
    assert runs(steep) == [(0, 5)] + [(start, 1) for start in range(1, 10)]  # never less than one iteration


def test_linear_decay():
    schedule = WindowSchedule("linear_decay", 13, 2, window_interval=21, min_interval=1)
    assert runs(schedule) == [(start, 21 - 2 * start) for start in range(11)]
    rounded = WindowSchedule("linear_decay", 6, 1, window_interval=4, min_interval=1)  # 4, 3.25, 2.5, 1.75, 1
    assert runs(rounded) == [(0, 4), (1, 3), (2, 3), (3, 2), (4, 1)]
    for schedule in every_schedule():
        if schedule.strategy == "linear_decay":
            stays = [stay for _, stay in schedule.stays]
            assert stays == sorted(stays, reverse=True)
            assert stays[0] == schedule.window_interval
            assert stays[-1] == (1 if schedule.last_start else schedule.window_interval)
    single = WindowSchedule("linear_decay", 5, 4, window_interval=7)
    assert runs(single) == [(0, 7)]


def test_frozen():
    assert {WindowSchedule("frozen", 8, 3).schedule(m) for m in range(50)} == {(0, 3)}
    assert {WindowSchedule("frozen", 8, 3, start=4).schedule(m) for m in range(50)} == {(4, 3)}


def test_random_is_uniform_and_seeded():
    draws = {
        seed: [WindowSchedule("random", 8, 3, seed=seed).schedule(m).start for m in range(5000)] for seed in (0, 1)
    }
    assert draws[0] != draws[1]
    for starts in draws.values():
        count = Counter(starts)
        assert set(count) == {0, 1, 2, 3, 4}
        # a share of 1/5 has a standard deviation of 0.0057 over 5000 draws
        assert all(abs(n / 5000 - 1 / 5) < 0.03 for n in count.values())
        repeats = sum(a == b for a, b in zip(starts, islice(starts, 1, None), strict=False))
        assert abs(repeats / 4999 - 1 / 5) < 0.03  # successive draws are independent


def test_random_does_not_depend_on_earlier_calls():
    schedule = WindowSchedule("random", 20, 3, seed=5)
    forward = [schedule.schedule(m) for m in range(100)]
    assert [schedule.schedule(m) for m in reversed(range(100))] == forward[::-1]


def test_the_same_in_every_process():
    code = (
        "import runpy, sys\n"
        "WindowSchedule = runpy.run_path(sys.argv[1])['WindowSchedule']\n"
        f"for strategy in {STRATEGIES!r}:\n"
        "    print([WindowSchedule(strategy, 12, 3, 4, 2, seed=7).schedule(m).start for m in range(60)])"
    )
    expected = "".join(
        f"{[WindowSchedule(s, 12, 3, 4, 2, seed=7).schedule(m).start for m in range(60)]}\n" for s in STRATEGIES
    )
    for hash_seed in ("0", "4242"):
        # the file alone, without the package: it needs no torch
        command = [sys.executable, "-c", code, diffusers_mixgrpo.core.window_schedule.__file__]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.stdout == expected, result.stderr


def test_window_is_a_pair():
    start, size = WindowSchedule().schedule(0)
    assert (start, size) == Window(0, 4) == (0, 4)


def test_schedule_is_a_value():
    a, b = WindowSchedule("exp_decay", 12, 2), WindowSchedule("exp_decay", 12, 2)
    assert a.sweep_length == 250  # computes the cached property, which is not part of the value
    assert a == b and hash(a) == hash(b) and pickle.loads(pickle.dumps(a)) == a
    with pytest.raises(AttributeError):
        a.window_size = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "backwards"}, "`strategy` must be one of 'progressive'.*got 'backwards'"),
        ({"num_inference_steps": 1}, "`num_inference_steps` must be an integer >= 2, got 1"),
        ({"window_size": 0}, r"`window_size` must be an integer in \[1, 24\], got 0"),
        ({"window_size": 25}, r"`window_size` must be an integer in \[1, 24\], got 25"),
        ({"window_size": 2.0}, "`window_size` must be an integer"),
        ({"window_interval": 0}, "`window_interval` must be an integer >= 1, got 0"),
        ({"window_stride": -1}, "`window_stride` must be an integer >= 1, got -1"),
        ({"strategy": "frozen", "start": 21}, r"`start` must be an integer in \[0, 20\], got 21"),
        ({"strategy": "progressive", "start": 3}, r"`start` must be an integer in \[0, 0\], got 3"),
        ({"decay_rate": -0.1}, "`decay_rate` must be a finite number >= 0, got -0.1"),
        ({"decay_rate": math.nan}, "`decay_rate` must be a finite number >= 0, got nan"),
        ({"decay_rate": "0.1"}, "`decay_rate` must be a finite number >= 0, got '0.1'"),
        ({"decay_start": -1}, "`decay_start` must be an integer >= 0, got -1"),
        ({"window_size": True}, "`window_size` must be an integer .*, got True"),
        ({"strategy": "linear_decay", "min_interval": 0}, r"`min_interval` must be an integer in \[1, 25\], got 0"),
        (
            {"strategy": "linear_decay", "min_interval": 30},
            r"`min_interval` must be an integer in \[1, 25\], got 30",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowSchedule(**arguments)


def test_a_decay_that_underflows_leaves_one_iteration():
    schedule = WindowSchedule("exp_decay", num_inference_steps=8, decay_rate=1e4, decay_start=0, window_interval=3)
    assert schedule.stays == ((0, 3), (1, 1), (2, 1), (3, 1))


def test_bad_iteration():
    with pytest.raises(ValueError, match="`iteration` must be an integer >= 0, got -1"):
        WindowSchedule().schedule(-1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_last_start(strategy):
    for last in (0, 1, 3):
        schedule = WindowSchedule(strategy, num_inference_steps=9, window_size=3, window_interval=4, last=last)
        starts = [window.start for window in islice(map(schedule.schedule, range(400)), 400)]
        assert max(starts) == (0 if strategy == "frozen" else last)
        assert set(schedule.trained_steps) == {start + i for start in starts for i in range(3)}
    if strategy != "frozen":
        assert schedule.sweep_length == sum(stay for _, stay in schedule.stays)
        assert [start for start, _ in schedule.stays] == [0, 1, 2, 3]


def test_last_start_that_is_not_legal():
    for last in (-1, 6, 2.0, True):
        with pytest.raises(ValueError, match=r"`last` must be an integer in \[0, 5\], got"):
            WindowSchedule("progressive", num_inference_steps=9, window_size=3, last=last)
