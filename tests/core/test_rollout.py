"""Rollouts against the stock pipeline, and replays against rollouts."""

import copy

import numpy as np
import pytest
import torch
from conftest import build_pipeline

from diffusers_mixgrpo import FluxPolicy, MixedODESDEScheduler, replay_log_probs, sample_trajectories
from diffusers_mixgrpo.rollout import all_transitions


PROMPTS = ["a cat", "two red dogs"]


def make(pipe, steps=6, start=2, size=3, **kwargs):
    policy = FluxPolicy(pipe, height=32, width=32, num_inference_steps=steps, max_sequence_length=12)
    scheduler = MixedODESDEScheduler.from_config(pipe.scheduler.config, window_start=start, window_size=size, **kwargs)
    return policy, scheduler


def sample(policy, scheduler, group=4, seed=0, shared=True, prompts=PROMPTS, **kwargs):
    conditioning = policy.encode(prompts)
    seeds = range(len(prompts) if shared else len(prompts) * group)
    trajectory = sample_trajectories(
        policy,
        scheduler,
        conditioning,
        policy.initial_latents(list(seeds)),
        num_generations=group,
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )
    return conditioning, trajectory


@pytest.fixture(scope="module")
def double_pipe():
    """In float64, where two ways to compute the same thing agree to many digits."""
    return build_pipeline().to(torch.float64)


@pytest.mark.parametrize("dynamic, guidance_embeds", [(True, True), (False, True), (True, False)])
def test_without_a_window_it_is_the_stock_pipeline(dynamic, guidance_embeds):
    pipe = build_pipeline(dynamic_shift=dynamic, guidance_embeds=guidance_embeds)
    policy, scheduler = make(pipe, size=0, start=0)
    outputs = []
    for output_type in ("latent", "pil"):
        generators = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
        outputs.append(
            pipe(
                PROMPTS,
                height=32,
                width=32,
                num_inference_steps=6,
                guidance_scale=3.5,
                max_sequence_length=12,
                generator=generators,
                output_type=output_type,
            ).images
        )
    trajectory = sample_trajectories(policy, scheduler, policy.encode(PROMPTS), policy.initial_latents([11, 12]))
    assert torch.equal(trajectory.latents, outputs[0])
    for ours, stock in zip(policy.decode(trajectory.latents), outputs[1], strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(stock))
    assert trajectory.log_probs.shape == (2, 0) and trajectory.states.shape[1] == 1
    assert trajectory.nfe == trajectory.nfe_computed == 6


def test_shapes_and_counts(shared_pipe):
    policy, scheduler = make(shared_pipe)
    _, trajectory = sample(policy, scheduler)
    assert len(trajectory) == 8
    assert trajectory.states.shape == (8, 4, 64, 16)
    assert trajectory.log_probs.shape == (8, 3) and trajectory.log_probs.dtype == torch.float32
    assert trajectory.step_indices.tolist() == [2, 3, 4]
    assert torch.equal(trajectory.timesteps, scheduler.timesteps[2:5])
    assert trajectory.prompt_indices.tolist() == [0] * 4 + [1] * 4
    assert trajectory.nfe == 6
    assert trajectory.nfe_computed == 4 + 2 / 4  # the two steps of the prefix once for the four of a group


def test_a_group_parts_ways_at_the_window(shared_pipe):
    _, trajectory = sample(*make(shared_pipe))
    before, after = trajectory.states[:, 0], trajectory.states[:, 1]
    assert torch.equal(before[:4], before[:1].expand(4, -1, -1))
    assert not torch.allclose(before[0], before[4], atol=1e-2)  # another prompt, another noise
    assert (after[:, None] - after[None]).abs().amax((2, 3))[~torch.eye(8, dtype=torch.bool)].min() > 1e-2


def test_the_noise_is_the_generators(shared_pipe):
    policy, scheduler = make(shared_pipe)
    first, again, other = (sample(policy, scheduler, seed=seed)[1].latents for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("solver", ["euler", "dpmsolver++", "unipc"])
def test_the_shared_prefix_is_exact(double_pipe, solver):
    policy, scheduler = make(double_pipe, ode_solver=solver)
    conditioning, shared = sample(policy, scheduler)
    apart = sample_trajectories(
        policy,
        scheduler,
        conditioning,
        policy.initial_latents([0, 1]).repeat_interleave(4, dim=0),
        num_generations=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert shared.nfe_computed < apart.nfe_computed == 6
    torch.testing.assert_close(shared.states, apart.states, rtol=0, atol=1e-10)
    torch.testing.assert_close(shared.log_probs, apart.log_probs, rtol=0, atol=1e-10)
    torch.testing.assert_close(shared.latents, apart.latents, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "batch_size, passes",
    [
        (8, 2 * 2 + 4 * 8),
        (5, 2 * 2 + 4 * 8),  # one group of four fits, a second does not
        (4, 2 * 2 + 4 * 8),
        (3, 2 * (2 + 2) + 4 * 8),  # three and one of each group, each with its prefix
        (1, 2 * 8 + 4 * 8),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "dpmsolver++"])
def test_batches_do_not_matter(double_pipe, batch_size, passes, solver):
    policy, scheduler = make(double_pipe, ode_solver=solver)
    _, whole = sample(policy, scheduler)
    _, parts = sample(policy, scheduler, batch_size=batch_size)
    torch.testing.assert_close(parts.states, whole.states, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=0, atol=1e-10)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=0, atol=1e-10)
    assert parts.nfe_computed * 8 == passes


def test_independent_noise(double_pipe):
    policy, scheduler = make(double_pipe)
    _, whole = sample(policy, scheduler, shared=False)
    assert not torch.allclose(whole.states[0, 0], whole.states[1, 0], atol=1e-2)
    assert whole.nfe_computed == whole.nfe == 6
    _, parts = sample(policy, scheduler, shared=False, batch_size=3)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=0, atol=1e-10)


def test_latents_that_fit_nothing(shared_pipe):
    policy, scheduler = make(shared_pipe)
    with pytest.raises(ValueError, match=r"one noise per prompt \(2\) or one per image \(8\), got 3"):
        sample_trajectories(policy, scheduler, policy.encode(PROMPTS), policy.initial_latents([0, 1, 2]), 4)


def max_ratio_deviation(policy, scheduler, conditioning, trajectory, size):
    """Of replays of `size` transitions at once, in a random order."""
    images, steps = all_transitions(trajectory)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    deviation = 0.0
    for part in order.split(size):
        pair = images[part], steps[part]
        replay = replay_log_probs(policy, scheduler, trajectory, conditioning, *pair)
        ratio = torch.exp(replay.log_probs - trajectory.log_probs[pair])
        deviation = max(deviation, (ratio - 1).abs().max().item())
    return deviation


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps", "dpm"])
@pytest.mark.parametrize("start, size", [(0, 3), (2, 3), (0, 5)])
def test_the_ratio_is_one_before_the_first_update(shared_pipe, sde_type, start, size):
    policy, scheduler = make(shared_pipe, start=start, size=size, sde_type=sde_type, eta=0.5)
    conditioning, trajectory = sample(policy, scheduler)
    for replay_size in (1, 7, 100):
        assert max_ratio_deviation(policy, scheduler, conditioning, trajectory, replay_size) < 1e-6


@pytest.mark.parametrize("solver, suffix", [("dpmsolver++", 0.4), ("euler", 0.2)])
def test_the_ratio_is_one_with_a_compressed_suffix(shared_pipe, solver, suffix):
    policy, scheduler = make(shared_pipe, steps=10, start=1, suffix_ratio=suffix, ode_solver=solver)
    conditioning, trajectory = sample(policy, scheduler)
    assert trajectory.nfe < 10
    assert max_ratio_deviation(policy, scheduler, conditioning, trajectory, 5) < 1e-6


def test_the_ratio_in_bfloat16():
    # Rounding in the network is not the policy's doing, but it does move the ratio. States in float32 keep it small.
    policy, scheduler = make(build_pipeline().to(torch.bfloat16))
    conditioning = policy.encode(PROMPTS)
    latents = policy.initial_latents([0, 1]).float()
    trajectory = sample_trajectories(
        policy, scheduler, conditioning, latents, 4, generator=torch.Generator().manual_seed(0)
    )
    assert trajectory.states.dtype == torch.float32
    assert max_ratio_deviation(policy, scheduler, conditioning, trajectory, 5) < 1e-3


def test_replay_is_the_schedulers_log_prob(double_pipe):
    policy, scheduler = make(double_pipe)
    conditioning, trajectory = sample(policy, scheduler)
    replay = replay_log_probs(policy, scheduler, trajectory, conditioning)
    assert replay.log_probs.shape == (24,) and replay.means.shape == (24, 64, 16)
    for row, (image, step) in enumerate((i, s) for i in range(8) for s in range(3)):
        state, following = trajectory.states[image, step][None], trajectory.states[image, step + 1][None]
        index = int(trajectory.step_indices[step])
        prompt = conditioning[[image // 4]]
        velocity = policy.velocity(state, scheduler.timesteps[index], prompt)
        expected = scheduler.log_prob(velocity, state, following, index)
        torch.testing.assert_close(replay.log_probs[row], expected[0], rtol=0, atol=1e-10)


def test_replay_is_differentiable_and_sees_new_weights(shared_pipe):
    policy, scheduler = make(copy.deepcopy(shared_pipe))
    conditioning, trajectory = sample(policy, scheduler)
    transformer = policy.pipe.transformer
    images, steps = torch.tensor([5, 0]), torch.tensor([2, 1])
    replay = replay_log_probs(policy, scheduler, trajectory, conditioning, images, steps)
    replay.log_probs.sum().backward()
    gradient = transformer.proj_out.weight.grad
    assert gradient.abs().max() > 0
    with torch.no_grad():
        transformer.proj_out.weight += 0.01 * gradient / gradient.norm()
    again = replay_log_probs(policy, scheduler, trajectory, conditioning, images, steps)
    gain = (again.log_probs - replay.log_probs).sum().item()
    assert gain == pytest.approx(0.01 * gradient.norm().item(), rel=0.2)  # uphill, by what the gradient promises


@pytest.mark.parametrize("autocast", [False, True])
def test_the_graph_is_kept_for_the_steps_asked_for(shared_pipe, autocast):
    policy, scheduler = make(copy.deepcopy(shared_pipe))
    weights = list(policy.pipe.transformer.parameters())
    images = torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        conditioning, trajectory = sample(policy, scheduler, keep_graph=[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # with none of the weights in its memory
        replay = replay_log_probs(policy, scheduler, trajectory, conditioning, images, torch.ones_like(images))
    expected = torch.autograd.grad(replay.log_probs.sum(), weights, allow_unused=True)
    kept = torch.autograd.grad(trajectory.log_probs[:, 1].sum(), weights, retain_graph=True, allow_unused=True)
    largest = max(gradient.abs().max() for gradient in expected if gradient is not None)
    for gradient, other in zip(kept, expected, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-2 * largest if autocast else 1e-5 * largest)
    others = torch.autograd.grad(trajectory.log_probs[:, [0, 2]].sum(), weights, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in others)


def test_selecting_images(shared_pipe):
    policy, scheduler = make(shared_pipe)
    conditioning, trajectory = sample(policy, scheduler)
    part = trajectory[torch.tensor([6, 1])]
    assert len(part) == 2 and part.prompt_indices.tolist() == [1, 0]
    assert torch.equal(part.states, trajectory.states[[6, 1]])
    replay = replay_log_probs(policy, scheduler, part, conditioning)
    torch.testing.assert_close(replay.log_probs.view(2, 3), part.log_probs, rtol=0, atol=1e-6)
