"""Rollouts step by step, and replays against rollouts."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from small_policy import CHANNELS, TOKENS, SmallPolicy, VelocityNetwork

from diffusers_mixgrpo import Conditioning, MixedODESDEScheduler, Trajectory, sample_trajectories
from diffusers_mixgrpo.core.rollout import batches_of_images, sample_batches
from diffusers_mixgrpo.core.transitions import SDE_TYPES


# A log-prob is a mean of terms of size 1, each with a few roundings of float32 (6e-8), which a small std enlarges.
FLOAT32_RATIO = 1e-5


def make(steps=6, start=2, size=3, dtype=torch.float32, **config):
    policy = SmallPolicy(steps, dtype)
    return policy, MixedODESDEScheduler(shift=3.0, window_start=start, window_size=size, **config)


def sample(policy, scheduler, prompts=2, group=4, seed=0, shared=True, **kwargs) -> Trajectory:
    return sample_trajectories(
        policy,
        scheduler,
        policy.encode(prompts),
        policy.noise(prompts if shared else prompts * group),
        num_generations=group,
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )


def assert_close(actual, expected, relative=1e-6):
    """
    Equal up to a share of the largest magnitude.

    The default is for networks of float64: the states of a deterministic step still pass through float32 in diffusers.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def assert_same_images(actual: Trajectory, expected: Trajectory):
    assert_close(actual.states, expected.states)
    assert_close(actual.log_probs, expected.log_probs)
    assert_close(actual.latents, expected.latents)
    assert torch.equal(actual.prompt_indices, expected.prompt_indices)


# ---- Rollouts ----


def test_without_a_window_it_is_euler():
    policy, scheduler = make(start=0, size=0)
    trajectory = sample(policy, scheduler, prompts=2, group=1)
    times = [1 - i / 6 for i in range(7)]
    sigmas = [3 * time / (1 + 2 * time) for time in times]
    latents = policy.noise(2)
    conditioning = policy.encode(2)
    with torch.no_grad():
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            velocity = policy.velocity(latents, torch.tensor(1000 * sigma), conditioning)
            latents = latents + (following - sigma) * velocity
    assert_close(trajectory.latents, latents, relative=1e-5)
    assert trajectory.log_probs.shape == (2, 0) and trajectory.states.shape[1] == 1
    assert trajectory.nfe == trajectory.nfe_computed == 6


def test_shapes_and_counts():
    policy, scheduler = make()
    trajectory = sample(policy, scheduler)
    assert len(trajectory) == 8 and trajectory.window_size == 3
    assert trajectory.states.shape == (8, 4, TOKENS, CHANNELS)
    assert trajectory.log_probs.shape == (8, 3) and trajectory.log_probs.dtype == torch.float32
    assert trajectory.prompt_indices.tolist() == [0] * 4 + [1] * 4
    assert trajectory.nfe == 6
    assert trajectory.nfe_computed == 4 + 2 / 4  # the two steps of the prefix once for the four of a group
    assert policy.calls == [2, 2, 8, 8, 8, 8]
    images, steps = trajectory.transition_indices()
    assert images.tolist() == [image for image in range(8) for _ in range(3)]
    assert steps.tolist() == [0, 1, 2] * 8
    images, steps = trajectory.transition_indices(torch.tensor([2, 0]))
    assert images.tolist() == [image for image in range(8) for _ in range(2)]
    assert steps.tolist() == [2, 0] * 8


def test_a_trajectory_carries_the_noise_levels_of_its_window():
    policy, scheduler = make(sde_type="cps", eta=0.5)
    transitions = sample(policy, scheduler).transitions
    assert (transitions.sde_type, transitions.eta, len(transitions)) == ("cps", 0.5, 3)
    assert torch.equal(transitions.sigmas, scheduler.sigmas[2:5])
    assert torch.equal(transitions.next_sigmas, scheduler.sigmas[3:6])
    assert torch.equal(transitions.timesteps, scheduler.timesteps[2:5])
    assert transitions.sigma_max == scheduler.sigmas[1]


def test_a_group_diverges_at_the_window():
    trajectory = sample(*make())
    before = trajectory.states[:, 0]
    after = trajectory.states[:, 1]
    assert torch.equal(before[:4], before[:1].expand(4, -1, -1))
    assert (before[0] - before[4]).abs().max() > 1e-2  # another prompt, another noise
    differences = (after[:, None] - after[None]).abs().amax((2, 3))
    assert differences[~torch.eye(8, dtype=torch.bool)].min() > 1e-2


def test_the_noise_is_the_generators():
    policy, scheduler = make()
    first, again, other = (sample(policy, scheduler, seed=seed).latents for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-2


@pytest.mark.parametrize(
    # At order 3, the first step after a window of one step still uses a prediction of the prefix.
    "solver, order, size",
    [("euler", 2, 3), ("dpmsolver++", 2, 3), ("unipc", 2, 3), ("dpmsolver++", 3, 1), ("unipc", 3, 1)],
)
def test_the_shared_prefix_is_exact(solver, order, size):
    policy, scheduler = make(steps=8, size=size, dtype=torch.float64, ode_solver=solver, solver_order=order)
    shared = sample(policy, scheduler)
    separate = sample_trajectories(
        policy,
        scheduler,
        policy.encode(2),
        policy.noise(2).repeat_interleave(4, dim=0),
        num_generations=4,
        generator=torch.Generator().manual_seed(0),
    )
    assert shared.nfe_computed < separate.nfe_computed == 8
    assert_same_images(shared, separate)


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
def test_batches_do_not_matter(batch_size, passes, solver):
    policy, scheduler = make(dtype=torch.float64, ode_solver=solver)
    whole = sample(policy, scheduler)
    policy.calls.clear()
    parts = sample(policy, scheduler, batch_size=batch_size)
    assert_same_images(parts, whole)
    assert parts.nfe_computed * 8 == sum(policy.calls) == passes
    assert max(policy.calls) <= batch_size


def test_batches_hold_whole_groups_or_parts_of_one():
    for prompts in (1, 2, 5):
        for group in (1, 3, 4):
            count = prompts * group
            for size in (None, *range(1, count + 2)):
                batches = batches_of_images(count, group, size)
                assert [image for batch in batches for image in range(count)[batch]] == list(range(count))
                for batch in batches:
                    length = batch.stop - batch.start
                    assert 0 < length <= (size or count)
                    is_whole = batch.start % group == 0 and length % group == 0
                    assert is_whole or batch.start // group == (batch.stop - 1) // group


def test_batches_are_sampled_one_after_another():
    policy, scheduler = make()
    generator = torch.Generator().manual_seed(0)
    batches = sample_batches(policy, scheduler, policy.encode(2), policy.noise(2), 4, generator, batch_size=4)
    assert policy.calls == []
    first = next(batches)
    assert len(policy.calls) == 6
    assert len(first) == 4 and first.prompt_indices.tolist() == [0] * 4
    assert torch.equal(first.states[:, 0], first.states[:1, 0].expand(4, -1, -1))
    second = next(batches)
    assert second.prompt_indices.tolist() == [1] * 4
    assert next(batches, None) is None
    whole = Trajectory.concatenate([first, second])
    assert torch.equal(whole.latents, torch.cat([first.latents, second.latents]))
    assert not whole.log_probs.requires_grad


def test_independent_noise():
    policy, scheduler = make(dtype=torch.float64)
    whole = sample(policy, scheduler, shared=False)
    assert (whole.states[0, 0] - whole.states[1, 0]).abs().max() > 1e-2
    assert whole.nfe_computed == whole.nfe == 6
    assert_same_images(sample(policy, scheduler, shared=False, batch_size=3), whole)


def test_the_context_outside_the_window():
    policy, scheduler = make()
    events = []

    @contextlib.contextmanager
    def outside():
        events.append("enter")
        yield
        events.append("exit")

    own = policy.velocity

    def velocity(*args):
        events.append("pass")
        return own(*args)

    policy.velocity = velocity
    sample(policy, scheduler, outside_window=outside)
    assert events == ["enter", "pass", "pass", "exit", "pass", "pass", "pass", "enter", "pass", "exit"]
    events.clear()
    sample(policy, MixedODESDEScheduler(window_start=0, window_size=5), outside_window=outside)
    assert events == ["pass"] * 5 + ["enter", "pass", "exit"]  # there is no step before the window


def test_another_module_than_the_policys_own():
    class Still(VelocityNetwork):
        def forward(self, latents, time, embedding, positions):
            return torch.zeros_like(latents)

    policy, scheduler = make(start=0, size=0)
    trajectory = sample(policy, scheduler, group=1, transformer=Still())
    assert torch.equal(trajectory.latents, policy.noise(2))
    policy, scheduler = make()
    trajectory = sample(policy, scheduler)
    other = trajectory.replay(policy, transformer=Still())
    assert (other.log_probs - trajectory.log_probs.flatten()).abs().max() > 1e-2


def test_latents_of_a_wrong_number():
    policy, scheduler = make()
    with pytest.raises(ValueError, match=r"`latents` .*one noise per prompt \(2\) or one per image \(8\), got 3"):
        sample_trajectories(policy, scheduler, policy.encode(2), policy.noise(3), 4)


# ---- The ratio before the first update ----


def max_ratio_deviation(policy, trajectory, size=5):
    """The largest |ratio - 1| of replays of `size` transitions at once, in a random order."""
    images, steps = trajectory.transition_indices()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    deviation = 0.0
    for part in order.split(size):
        pair = images[part], steps[part]
        replay = trajectory.replay(policy, *pair)
        ratio = torch.exp(replay.log_probs - trajectory.log_probs[pair])
        deviation = max(deviation, (ratio - 1).abs().max().item())
    return deviation


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("start, size", [(0, 3), (2, 3), (0, 5)])
def test_the_ratio_is_one_before_the_first_update(sde_type, start, size):
    policy, scheduler = make(start=start, size=size, sde_type=sde_type, eta=0.5)
    trajectory = sample(policy, scheduler)
    for replay_size in (1, 7, 100):
        assert max_ratio_deviation(policy, trajectory, replay_size) <= FLOAT32_RATIO


@pytest.mark.parametrize("solver, suffix", [("dpmsolver++", 0.4), ("euler", 0.2)])
def test_the_ratio_is_one_with_a_compressed_suffix(solver, suffix):
    policy, scheduler = make(steps=10, start=1, suffix_ratio=suffix, ode_solver=solver)
    trajectory = sample(policy, scheduler)
    assert trajectory.nfe < 10
    assert max_ratio_deviation(policy, trajectory) <= FLOAT32_RATIO


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_an_old_trajectory_replays_after_its_window_has_moved(sde_type):
    policy, scheduler = make(steps=12, start=5, sde_type=sde_type, eta=0.5, prefix_ratio=0.4, suffix_ratio=0.4)
    trajectory = sample(policy, scheduler)
    assert trajectory.nfe == 2 + 3 + 2
    old_window = scheduler.window
    scheduler.set_window(8, 3)
    policy.prepare_scheduler(scheduler)
    assert scheduler.window != old_window
    moved = sample(policy, scheduler)
    assert max_ratio_deviation(policy, trajectory) <= FLOAT32_RATIO
    assert max_ratio_deviation(policy, moved) <= FLOAT32_RATIO
    # The noise levels of the moved window would be noticed.
    assert max_ratio_deviation(policy, dataclasses.replace(trajectory, transitions=moved.transitions)) > 1e-2


def test_the_ratio_in_bfloat16():
    # Velocities round in the network (4e-3 of them), independently in each of an image's 128 elements. Divided by the
    # std of a step and averaged, this is some 1e-4. States that were rounded, too, would add as much.
    policy, scheduler = make(dtype=torch.bfloat16)
    trajectory = sample(policy, scheduler)
    assert trajectory.states.dtype == torch.float32
    assert max_ratio_deviation(policy, trajectory) <= 5e-3


# ---- Replays ----


def test_a_replay_is_the_schedulers_log_prob():
    policy, scheduler = make(dtype=torch.float64)
    trajectory = sample(policy, scheduler)
    conditioning = policy.encode(2)
    with torch.no_grad():
        replay = trajectory.replay(policy)
    assert replay.log_probs.shape == (24,) and replay.means.shape == (24, TOKENS, CHANNELS)
    for row, (image, step) in enumerate((image, step) for image in range(8) for step in range(3)):
        state = trajectory.states[image, step][None]
        recorded = trajectory.states[image, step + 1][None]
        index = scheduler.window[step]
        with torch.no_grad():
            velocity = policy.velocity(state, scheduler.timesteps[index], conditioning[[image // 4]])
        mean, std = scheduler.transition(velocity, state, index)
        assert_close(replay.means[row : row + 1], mean, relative=1e-12)
        assert_close(replay.stds[row].squeeze(), std, relative=1e-12)
        expected = scheduler.log_prob(velocity, state, recorded, index)
        assert_close(replay.log_probs[row : row + 1], expected, relative=1e-10)


def test_a_replay_is_differentiable_and_sees_new_weights():
    policy, scheduler = make(dtype=torch.float64)
    trajectory = sample(policy, scheduler)
    weight = policy.network.outer.weight
    images = torch.tensor([5, 0])
    steps = torch.tensor([2, 1])
    replay = trajectory.replay(policy, images, steps)
    (gradient,) = torch.autograd.grad(replay.log_probs.sum(), weight)
    assert gradient.abs().max() > 0
    length = 1e-4
    with torch.no_grad():
        weight += length * gradient / gradient.norm()
        again = trajectory.replay(policy, images, steps)
    gain = (again.log_probs - replay.log_probs).sum().item()
    assert gain == pytest.approx(length * gradient.norm().item(), rel=1e-2)  # what the gradient promises


def test_other_conditioning():
    policy, scheduler = make()
    trajectory = sample(policy, scheduler)
    conditioning = policy.encode(2)
    swapped = trajectory.with_conditioning(conditioning[[1, 0]])
    assert torch.equal(swapped.states, trajectory.states)
    replay = swapped.replay(policy)
    assert (replay.log_probs - trajectory.log_probs.flatten()).abs().min() > 1e-5
    same = Conditioning({name: rows.clone() for name, rows in conditioning.rows.items()}, conditioning.shared)
    assert max_ratio_deviation(policy, trajectory.with_conditioning(same)) <= FLOAT32_RATIO


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_graph_is_kept_for_the_steps_asked_for(autocast, batch_size):
    policy, scheduler = make()
    weights = list(policy.network.parameters())
    images = torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trajectory = sample(policy, scheduler, keep_graph=[1], batch_size=batch_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # with an empty cache of casted weights
        replay = trajectory.replay(policy, images, torch.ones_like(images))
    expected = torch.autograd.grad(replay.log_probs.sum(), weights)
    kept = torch.autograd.grad(trajectory.log_probs[:, 1].sum(), weights, retain_graph=True)
    largest = max(gradient.abs().max() for gradient in expected)
    assert largest > 0
    # Autocast rounds to bfloat16, with 8 bits.
    tolerance = (5e-2 if autocast else 1e-4) * largest
    for gradient, other in zip(kept, expected, strict=True):
        assert (gradient - other).abs().max() <= tolerance
    others = torch.autograd.grad(trajectory.log_probs[:, [0, 2]].sum(), weights, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in others)


@pytest.mark.parametrize("kept", [(), (1,), (0, 2)])
def test_other_steps_keep_no_activations(kept):
    policy, scheduler = make()
    has_graph = []
    own = policy.velocity

    def velocity(*args):
        prediction = own(*args)
        has_graph.append(prediction.requires_grad)
        return prediction

    policy.velocity = velocity
    sample(policy, scheduler, keep_graph=kept)
    assert has_graph == [index - 2 in kept for index in range(6)]


def test_the_graph_of_all_steps():
    policy, scheduler = make(dtype=torch.float64)
    reference = copy.deepcopy(policy)
    trajectory = sample(policy, scheduler, keep_graph=range(3))
    kept = torch.autograd.grad(trajectory.log_probs.sum(), list(policy.network.parameters()))
    replay = trajectory.replay(reference)
    expected = torch.autograd.grad(replay.log_probs.sum(), list(reference.network.parameters()))
    largest = max(gradient.abs().max() for gradient in expected)
    for gradient, other in zip(kept, expected, strict=True):
        assert (gradient - other).abs().max() <= 1e-9 * largest
