"""Sampling with a window of stochastic steps, and replaying that window.

A rollout has three parts: an ODE prefix, which all images of a prompt share when they start from the same noise, the
window of SDE steps where they part ways, and an ODE suffix. Only the window is kept for training. Replay evaluates its
transitions again under other weights, many of them in one forward pass.

Shapes: `P` prompts, `G` images of each, `B = P * G` images ordered prompt by prompt, `w` window steps,
`N` transitions, `...` the shape of one image's latents.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .kernels import gaussian_log_prob
from .scheduling_mixed_ode_sde import MixedODESDEScheduler


@dataclass
class Trajectory:
    """
    What training needs to know of `B` sampled images.

    Args:
        states (`torch.Tensor` of shape `(B, w + 1, ...)`): Latents before each window step and after the last.
        log_probs (`torch.Tensor` of shape `(B, w)`): Log-probability of each window step when it was sampled, float32;
            differentiable if the rollout kept its graph.
        step_indices (`torch.LongTensor` of shape `(w,)`): The window's steps in the schedule that was run.
        timesteps (`torch.Tensor` of shape `(w,)`): Their timesteps, `sigma * 1000`.
        prompt_indices (`torch.LongTensor` of shape `(B,)`): Row of each image in the conditioning.
        latents (`torch.Tensor` of shape `(B, ...)`): The denoised latents.
        nfe (`int`): Steps on the way of one image, from noise to picture.
        nfe_computed (`float`): Transformer passes computed per image: less than `nfe` by what the prefix saved.
    """

    states: torch.Tensor
    log_probs: torch.Tensor
    step_indices: torch.Tensor
    timesteps: torch.Tensor
    prompt_indices: torch.Tensor
    latents: torch.Tensor
    nfe: int
    nfe_computed: float

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def window_size(self) -> int:
        return self.step_indices.shape[0]

    def __getitem__(self, images: "slice | Sequence[int] | torch.Tensor") -> "Trajectory":
        """The same for a selection of the images."""
        return Trajectory(
            self.states[images],
            self.log_probs[images],
            self.step_indices,
            self.timesteps,
            self.prompt_indices[images],
            self.latents[images],
            self.nfe,
            self.nfe_computed,
        )


@dataclass
class ReplayOutput:
    """
    The transitions of a replay under the present weights.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probabilities of the recorded steps, float32.
        means (`torch.Tensor` of shape `(N, ...)`): Means of the transitions.
        stds (`torch.Tensor`): Their standard deviations, of a shape that broadcasts against `means`.
    """

    log_probs: torch.Tensor
    means: torch.Tensor
    stds: torch.Tensor


@torch.no_grad()
def sample_trajectories(
    policy: Any,
    scheduler: MixedODESDEScheduler,
    conditioning: Any,
    latents: torch.Tensor,
    num_generations: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    transformer: torch.nn.Module | None = None,
    on_batch: Callable[[slice, torch.Tensor], None] | None = None,
    keep_graph: Collection[int] = (),
    outside_window: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Trajectory:
    """
    Sample `G` images of each of `P` prompts, stochastic inside the scheduler's window and deterministic outside.

    With one initial noise per prompt the steps before the window are the same for its whole group: they run once per
    prompt and their result is expanded at the window's start.

    Args:
        policy ([`FluxPolicy`]):
            The policy: it prepares the scheduler and predicts velocities.
        scheduler ([`MixedODESDEScheduler`]):
            Takes the steps; its window says which are stochastic. It is reset to the policy's schedule here.
        conditioning ([`FluxConditioning`] of length `P`):
            The encoded prompts.
        latents (`torch.Tensor` of shape `(P, ...)` or `(P * G, ...)`):
            Initial noise: one per prompt, shared by its group, or one per image.
        num_generations (`int`, defaults to 1):
            Images per prompt, `G`.
        generator (`torch.Generator`, *optional*):
            Source of the window's noise, on the latents' device. The noise does not depend on `batch_size`.
        batch_size (`int`, *optional*):
            How many images go through the transformer at once. Defaults to all. A group that does not fit is sampled
            in parts, each of which computes the shared prefix.
        transformer (`torch.nn.Module`, *optional*):
            What the policy calls in place of its own transformer.
        on_batch (`Callable`, *optional*):
            Called as `on_batch(images, latents)` after each batch, with the slice of its images and their denoised
            latents of shape `(n, ...)`: to decode and score them while others are still to be sampled.
        keep_graph (`Collection[int]`, defaults to none):
            Window steps, counted from the window's start, of whose forward passes the graph is kept, so that the
            trajectory's log-probs are those of a replay that one can go backward through. It holds the activations of
            all images at these steps.
        outside_window (`Callable`, *optional*):
            Makes a context in which to take the steps before the window, and another for those after it: to make
            them cheaper, as [`accelerated_ode`] does.

    Returns:
        [`Trajectory`] of `P * G` images.

    Raises:
        `ValueError`: If there are neither `P` nor `P * G` initial latents.
    """
    num_prompts, num_images = len(conditioning), len(conditioning) * num_generations
    shared = latents.shape[0] == num_prompts
    if not shared and latents.shape[0] != num_images:
        raise ValueError(
            f"`latents` must hold one noise per prompt ({num_prompts}) or one per image ({num_images}), got "
            f"{latents.shape[0]}."
        )
    policy.prepare_scheduler(scheduler)
    window, num_steps = scheduler.window, len(scheduler.timesteps)
    noise = torch.randn(
        (num_images, len(window), *latents.shape[1:]),
        generator=generator,
        device=latents.device,
        dtype=torch.promote_types(latents.dtype, torch.float32),
    )
    prompt_indices = torch.arange(num_images, device=latents.device) // num_generations
    parts, passes = [], 0
    for images in _batches(num_images, num_generations, batch_size):
        count, rows = images.stop - images.start, prompt_indices[images]
        if shared:
            rows = rows[:: min(count, num_generations)]  # one row per prompt of the batch
        start = latents[rows if shared else images]
        policy.prepare_scheduler(scheduler)
        parts.append(
            _sample_batch(
                policy, scheduler, conditioning[rows], start, noise[images], transformer, keep_graph, outside_window
            )
        )
        if on_batch is not None:
            on_batch(images, parts[-1][-1])
        passes += window.start * len(rows) + (num_steps - window.start) * count
    with torch.set_grad_enabled(bool(keep_graph)):
        states, log_probs, denoised = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Trajectory(
        states=states,
        log_probs=log_probs,
        step_indices=torch.arange(window.start, window.stop, device=latents.device),
        timesteps=scheduler.timesteps[window.start : window.stop],
        prompt_indices=prompt_indices,
        latents=denoised,
        nfe=num_steps,
        nfe_computed=passes / num_images,
    )


def _batches(num_images: int, num_generations: int, batch_size: int | None) -> list[slice]:
    """Whole groups as long as one fits into `batch_size`, parts of one group otherwise."""
    batch_size = batch_size or num_images
    if batch_size >= num_generations:
        size = batch_size // num_generations * num_generations
        return [slice(i, min(i + size, num_images)) for i in range(0, num_images, size)]
    groups = range(0, num_images, num_generations)
    offsets = range(0, num_generations, batch_size)
    return [slice(i + j, i + min(j + batch_size, num_generations)) for i in groups for j in offsets]


def _sample_batch(
    policy: Any,
    scheduler: MixedODESDEScheduler,
    conditioning: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    transformer: torch.nn.Module | None,
    keep_graph: Collection[int],
    outside_window: Callable[[], contextlib.AbstractContextManager],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Prefix, window and suffix of `n` images: window states `(n, w + 1, ...)`, log-probs `(n, w)`, latents `(n, ...)`.

    `noise` has shape `(n, w, ...)`. Of `conditioning` and `latents` there are `n` rows, or fewer that are shared by
    `n / rows` images each up to the window.
    """
    window, timesteps = scheduler.window, scheduler.timesteps

    def ode_steps(latents: torch.Tensor, steps: range) -> torch.Tensor:
        with outside_window() if steps else contextlib.nullcontext():
            for index in steps:
                velocity = policy.velocity(latents, timesteps[index], conditioning, transformer)
                output: Any = scheduler.step(velocity, timesteps[index], latents)
                latents = output.prev_sample
        return latents

    # 1. The prefix, once for all that share it
    latents = ode_steps(latents, range(window.start))
    repeats = noise.shape[0] // latents.shape[0]
    if repeats > 1:
        latents = latents.repeat_interleave(repeats, dim=0)
        conditioning = conditioning.repeat_interleave(repeats)
        scheduler.repeat_history(repeats)
    # 2. The window, where the images of a group part ways
    states, log_probs = [latents], []
    for offset, index in enumerate(window):
        if offset in keep_graph and offset - 1 not in keep_graph:
            torch.clear_autocast_cache()  # torch before 2.10 keeps copies of the weights from steps without a graph
        with torch.set_grad_enabled(offset in keep_graph):
            velocity = policy.velocity(latents, timesteps[index], conditioning, transformer)
            output: Any = scheduler.step(velocity.detach(), timesteps[index], latents, variance_noise=noise[:, offset])
            log_prob = output.log_prob
            if offset in keep_graph:
                log_prob = scheduler.log_prob(velocity, latents, output.prev_sample, index)
        latents = output.prev_sample
        states.append(latents)
        log_probs.append(log_prob)
    # 3. The suffix
    latents = ode_steps(latents, range(window.stop, len(timesteps)))
    no_steps = torch.empty(latents.shape[0], 0, device=latents.device)
    with torch.set_grad_enabled(bool(keep_graph)):
        return torch.stack(states, dim=1), torch.stack(log_probs, dim=1) if log_probs else no_steps, latents


def replay_log_probs(
    policy: Any,
    scheduler: MixedODESDEScheduler,
    trajectory: Trajectory,
    conditioning: Any,
    images: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
    transformer: torch.nn.Module | None = None,
) -> ReplayOutput:
    """
    Evaluate recorded transitions under the present weights, in one forward pass. Differentiable and stateless.

    The transition is the scheduler's own, the one that the rollout sampled from, so with unchanged weights the
    log-probs are those of the trajectory.

    Args:
        policy, scheduler, conditioning:
            Those that the trajectory was sampled with. The scheduler gives the noise levels and keeps no trace.
        trajectory ([`Trajectory`]):
            The recorded window.
        images, steps (`torch.LongTensor` of shape `(N,)`, *optional*):
            Which transitions: the image, and the step counted from the window's start. Default to all `B * w` of them,
            image by image.
        transformer (`torch.nn.Module`, *optional*):
            What the policy calls in place of its own transformer, such as the module wrapped for distributed training.

    Returns:
        [`ReplayOutput`] of `N` transitions.
    """
    if images is None or steps is None:
        images, steps = all_transitions(trajectory)
    sample, recorded = trajectory.states[images, steps], trajectory.states[images, steps + 1]
    velocity = policy.velocity(
        sample, trajectory.timesteps[steps], conditioning[trajectory.prompt_indices[images]], transformer
    )
    means, stds = scheduler.transition(velocity, sample, trajectory.step_indices[steps])
    return ReplayOutput(log_probs=gaussian_log_prob(recorded, means, stds), means=means, stds=stds)


def all_transitions(trajectory: Trajectory, steps: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs (image, window step) of all images and the given steps, image by image: two tensors `(B * steps,)`."""
    device = trajectory.states.device
    if steps is None:
        steps = torch.arange(trajectory.window_size, device=device)
    images = torch.arange(len(trajectory), device=device).repeat_interleave(len(steps))
    return images, steps.repeat(len(trajectory))
