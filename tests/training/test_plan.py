"""What an iteration is: its prompts, window, steps and random numbers, as functions of its number."""

import pytest
import torch
from helpers import PROMPTS, small_config

from diffusers_mixgrpo.training.plan import (
    STREAMS,
    PromptSampler,
    draw_order,
    draw_seeds,
    draw_steps,
    first_rows,
    iterations_of_run,
    plan_iteration,
    prompts_of_run,
)


# ---- Plans ----


def plan(settings, iteration, rank=0):
    return plan_iteration(settings, settings.window_schedule(), iteration, PROMPTS[:2], rank)


def test_a_plan_is_a_function_of_iteration_and_rank(tmp_path):
    settings = small_config(tmp_path, window_train_fraction=0.5)
    for iteration in range(4):
        one = plan(settings, iteration)
        other = plan(settings, iteration, rank=1)
        assert str(plan(settings, iteration)) == str(one)
        assert one.prompts == ["a cat", "two dogs"]
        # The ranks train the same steps of the same window, with noise and orders of their own.
        assert one.window == other.window == (iteration % 3, 2)
        assert torch.equal(one.steps, other.steps) and len(one.steps) == 1
        seeds = [seed for p in (one, other) for seed in (*p.latent_seeds, p.sde_seed, p.order_seed)]
        assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("shared_noise, noises", [(True, 2), (False, 8)])
def test_initial_noise_is_drawn_per_prompt_or_per_image(tmp_path, shared_noise, noises):
    assert len(plan(small_config(tmp_path, shared_noise=shared_noise), 0).latent_seeds) == noises


# ---- Random numbers ----


def test_seeds_are_functions_of_their_arguments_and_differ_in_each():
    keys = [(s, i, stream, rank) for s in (0, 1) for i in (0, 1, 2) for stream in STREAMS for rank in (0, 1)]
    seeds = {key: draw_seeds(*key, count=3) for key in keys}
    assert len({seed for three in seeds.values() for seed in three}) == 3 * len(keys)
    assert all(draw_seeds(*key, count=3) == three and draw_seeds(*key) == three[:1] for key, three in seeds.items())
    assert all(0 <= seed < 2**63 for three in seeds.values() for seed in three)  # what a torch.Generator takes


@pytest.mark.parametrize("fraction, count", [(1.0, 9), (0.6, 5), (0.01, 1)])
def test_trained_steps(fraction, count):
    drawn = [draw_steps(3, iteration, 9, fraction).tolist() for iteration in range(200)]
    assert all(len(steps) == count and steps == sorted(set(steps)) for steps in drawn)
    assert {step for steps in drawn for step in steps} == set(range(9))
    assert drawn == [draw_steps(3, iteration, 9, fraction).tolist() for iteration in range(200)]


@pytest.mark.parametrize("zeros", [0, 1, 5, 9, 12])
def test_the_order_spreads_images_with_an_advantage_over_the_batches(zeros):
    advantages = torch.arange(1.0, 13.0)
    advantages[torch.randperm(12, generator=torch.Generator().manual_seed(zeros))[:zeros]] = 0
    orders = [draw_order(seed, advantages, 3) for seed in range(300)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(12))
        counts = (advantages[order] != 0).view(4, 3).sum(1)
        assert counts.max() - counts.min() <= 1
    batches = torch.stack(orders).view(300, 4, 3)
    in_first = torch.stack([(batches[:, 0] == image).any(-1).double().mean() for image in range(12)])
    kept = advantages != 0
    if 1 <= zeros < 12:  # all that have an advantage come first equally often
        assert (in_first[kept] - in_first[kept].mean()).abs().max() < 0.12
    assert len({tuple(order.tolist()) for order in orders}) > 250


# ---- Prompts ----


def test_the_prompts_of_an_iteration_come_once_per_training_batch():
    assert list(PromptSampler(7, prompts_per_iteration=3, repeats=2, shuffle=False)) == [
        *[0, 1, 2, 0, 1, 2],
        *[3, 4, 5, 3, 4, 5],  # and 6 is dropped
    ]


@pytest.mark.parametrize(
    "num_prompts, per_iteration, repeats", [(7, 3, 2), (6, 3, 1), (2, 5, 3), (1, 4, 2), (5, 5, 1)]
)
def test_length(num_prompts, per_iteration, repeats):
    sampler = PromptSampler(num_prompts, per_iteration, repeats)
    order = list(sampler)
    assert len(order) == len(sampler)
    assert len(order) % (per_iteration * repeats) == 0 and order
    assert set(order) <= set(range(num_prompts))


def test_a_small_dataset_is_repeated():
    order = list(PromptSampler(3, prompts_per_iteration=7, repeats=1, seed=1))
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2]


def test_the_order_of_prompts_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = PromptSampler(50, 5, 1, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3) != order(2, 5)
    assert sorted(order(1, 2)) == list(range(50))
    sampler = PromptSampler(50, 5, 1, seed=1)
    assert list(sampler) == list(sampler)  # no state


def test_the_first_rows_are_those_that_the_sampler_gives_each_rank(tmp_path):
    settings = small_config(tmp_path, data_seed=5)
    dataset = [{"prompt": f"prompt {i}"} for i in range(20)]
    order = list(PromptSampler.of_run(settings, len(dataset), num_processes=2, repeats=1))
    expected = [dataset[i] for i in order[:4]]
    assert [row for rank in (0, 1) for row in first_rows(settings, dataset, rank, num_processes=2)] == expected


@pytest.mark.parametrize("length", [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 1.5}])
def test_the_prompts_of_a_run_are_those_that_its_iterations_ask_for(tmp_path, length):
    settings = small_config(tmp_path, **length)  # two optimizer steps and prompts per iteration
    dataset = [{"prompt": f"prompt {i}"} for i in range(4)]
    sampler = PromptSampler.of_run(settings, len(dataset), num_processes=1, repeats=1)
    asked = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        asked += [dataset[i]["prompt"] for i in sampler]
    assert iterations_of_run(settings, iterations_per_epoch=2) == 3
    assert set(prompts_of_run(settings, dataset, [], num_processes=1)) == set(asked[: 3 * 2])
    large = [{"prompt": f"prompt {i}"} for i in range(1000)]
    if settings.max_steps > 0:
        assert len(prompts_of_run(settings, large, [PROMPTS, PROMPTS[:1]], num_processes=2)) == 3 * 2 * 2 + 5 + 1
    assert prompts_of_run(settings, None, [PROMPTS[:1]], num_processes=2) == ["a cat"]
