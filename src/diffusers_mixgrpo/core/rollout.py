"""
Sampling with a window of stochastic steps, and replaying that window.

A rollout has three parts: an ODE prefix, which all images of a prompt share when they start from the same noise, the
window of SDE steps where they diverge, and an ODE suffix. Only the window is kept for training. A replay evaluates its
transitions again under other weights, many of them in one forward pass.

Shapes: `P` prompts, `G` images of each, `B = P * G` images ordered prompt by prompt, `w` window steps,
`N` transitions, `...` the shape of one image's latents.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..scheduling_mixed_ode_sde import MixedODESDEScheduler
from .policy import Conditioning, Policy
from .transitions import Transitions, gaussian_log_prob


@dataclass
class Replay:
    """
    `N` transitions under other weights than those that sampled them.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probs of the recorded steps, float32, differentiable.
        means (`torch.Tensor` of shape `(N, ...)`): Means of the transitions.
        stds (`torch.Tensor` that broadcasts against `means`): Their standard deviations.
    """

    log_probs: Tensor
    means: Tensor
    stds: Tensor


@dataclass
class Trajectory:
    """
    `B` sampled images with everything that it takes to replay their window.

    Args:
        states (`torch.Tensor` of shape `(B, w + 1, ...)`): Latents before each window step and after the last.
        log_probs (`torch.Tensor` of shape `(B, w)`): Log-prob of each window step when it was sampled, float32.
            Differentiable if the rollout kept its graph.
        means (`torch.Tensor` of shape `(B, w, ...)`): Mean of each window step when it was sampled, float32.
        transitions ([`Transitions`] of length `w`): The window's steps: noise levels, kind, amount of noise.
        conditioning ([`Conditioning`] of length `P`): The encoded prompts.
        prompt_indices (`torch.LongTensor` of shape `(B,)`): Row of each image in the conditioning.
        latents (`torch.Tensor` of shape `(B, ...)`): The denoised latents.
        nfe (`int`): Denoising steps of one image.
        nfe_computed (`float`): Forward passes of the transformer per image: less than `nfe` where a prefix is shared.
    """

    states: Tensor
    log_probs: Tensor
    means: Tensor
    transitions: Transitions
    conditioning: Conditioning
    prompt_indices: Tensor
    latents: Tensor
    nfe: int
    nfe_computed: float

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def window_size(self) -> int:
        return len(self.transitions)

    def transition_indices(self, steps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        The transitions of all images at the given window steps, image by image.

        Args:
            steps (`torch.LongTensor` of shape `(k,)`, *optional*): Steps, counted from the start of the window.
                Defaults to all.

        Returns:
            `tuple[torch.LongTensor, torch.LongTensor]`: Image and step of each of the `B * k` transitions.
        """
        device = self.states.device
        if steps is None:
            steps = torch.arange(self.window_size, device=device)
        images = torch.arange(len(self), device=device).repeat_interleave(len(steps))
        return images, steps.repeat(len(self))

    def replay(
        self,
        policy: Policy,
        images: Tensor | None = None,
        steps: Tensor | None = None,
        transformer: nn.Module | None = None,
    ) -> Replay:
        """
        Evaluate recorded transitions under the current weights, in one forward pass. Differentiable and stateless.

        The transitions are those that the rollout sampled from, so with unchanged weights the log-probs are those of
        the trajectory.

        Args:
            policy ([`Policy`]): The policy that sampled the trajectory.
            images, steps (`torch.LongTensor` of shape `(N,)`, *optional*): The transitions to replay: the image, and
                the step counted from the start of the window. Default to all `B * w` of them, image by image.
            transformer (`torch.nn.Module`, *optional*): The module to call instead of the policy's own.

        Returns:
            [`Replay`] of `N` transitions.
        """
        if images is None or steps is None:
            images, steps = self.transition_indices()
        sample = self.states[images, steps]
        recorded = self.states[images, steps + 1]
        conditioning = self.conditioning[self.prompt_indices[images]]
        velocity = policy.velocity(sample, self.transitions.timesteps[steps], conditioning, transformer)
        means, stds = self.transitions.mean_and_std(velocity, sample, steps)
        return Replay(gaussian_log_prob(recorded, means, stds), means, stds)

    def with_conditioning(self, conditioning: Conditioning) -> "Trajectory":
        """The same trajectory with its prompts encoded in another way, for example in another precision."""
        return dataclasses.replace(self, conditioning=conditioning)

    def without_nonfinite(self) -> tuple["Trajectory", Tensor]:
        """
        The trajectory with each image whose numbers are infinite or NaN replaced by one whose numbers are finite.

        Returns:
            `tuple[Trajectory, torch.BoolTensor]`: The trajectory, zeros where no image is finite, and which images
            were finite, of shape `(B,)`. Nothing waits for the device.
        """
        finite = torch.ones(len(self), dtype=torch.bool, device=self.states.device)
        for tensor in (self.states, self.log_probs, self.means, self.latents):
            finite &= tensor.detach().isfinite().flatten(1).all(1)
        own = torch.arange(len(self), device=finite.device)
        source = torch.where(finite, own, finite.int().argmax())
        with torch.set_grad_enabled(self.log_probs.requires_grad):
            replaced = dataclasses.replace(
                self,
                states=self.states[source].nan_to_num(0.0, 0.0, 0.0),
                log_probs=self.log_probs[source].nan_to_num(0.0, 0.0, 0.0),
                means=self.means[source].nan_to_num(0.0, 0.0, 0.0),
                prompt_indices=self.prompt_indices[source],
                latents=self.latents[source].nan_to_num(0.0, 0.0, 0.0),
            )
        return replaced, finite

    @classmethod
    def concatenate(cls, parts: Sequence["Trajectory"]) -> "Trajectory":
        """The images of several batches of one rollout in one trajectory."""
        images = sum(len(part) for part in parts)
        first = parts[0]
        with torch.set_grad_enabled(any(part.log_probs.requires_grad for part in parts)):
            return cls(
                states=torch.cat([part.states for part in parts]),
                log_probs=torch.cat([part.log_probs for part in parts]),
                means=torch.cat([part.means for part in parts]),
                transitions=first.transitions,
                conditioning=first.conditioning,
                prompt_indices=torch.cat([part.prompt_indices for part in parts]),
                latents=torch.cat([part.latents for part in parts]),
                nfe=first.nfe,
                nfe_computed=sum(part.nfe_computed * len(part) for part in parts) / images,
            )


def sample_trajectories(
    policy: Policy,
    scheduler: MixedODESDEScheduler,
    conditioning: Conditioning,
    latents: Tensor,
    num_generations: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    transformer: nn.Module | None = None,
    keep_graph: Collection[int] = (),
    outside_window: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    on_step: Callable[[], object] = lambda: None,
) -> Trajectory:
    """All batches of [`sample_batches`], which has the same arguments, in one trajectory of `P * G` images."""
    batches = sample_batches(
        policy,
        scheduler,
        conditioning,
        latents,
        num_generations=num_generations,
        generator=generator,
        batch_size=batch_size,
        transformer=transformer,
        keep_graph=keep_graph,
        outside_window=outside_window,
        on_step=on_step,
    )
    return Trajectory.concatenate(list(batches))


@torch.no_grad()
def sample_batches(
    policy: Policy,
    scheduler: MixedODESDEScheduler,
    conditioning: Conditioning,
    latents: Tensor,
    num_generations: int = 1,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    transformer: nn.Module | None = None,
    keep_graph: Collection[int] = (),
    outside_window: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    on_step: Callable[[], object] = lambda: None,
) -> Iterator[Trajectory]:
    """
    Sample `G` images of each of `P` prompts, stochastic inside the scheduler's window and deterministic outside.

    With one initial noise per prompt, the steps before the window are the same for its whole group: they run once per
    prompt, and their result is repeated at the start of the window.

    Args:
        policy ([`Policy`]): It prepares the scheduler and predicts velocities.
        scheduler ([`MixedODESDEScheduler`]): It takes the steps; its window says which are stochastic. It is reset to
            the policy's schedule for each batch.
        conditioning ([`Conditioning`] of length `P`): The encoded prompts.
        latents (`torch.Tensor` of shape `(P, ...)` or `(P * G, ...)`): Initial noise: one per prompt, shared by its
            group, or one per image.
        num_generations (`int`, defaults to 1): Images per prompt, `G`.
        generator (`torch.Generator`, *optional*): Source of the window's noise, on the latents' device. The noise does
            not depend on `batch_size`.
        batch_size (`int`, *optional*): Images per forward pass. Defaults to all. A group that does not fit is sampled
            in parts, each of which computes the shared prefix.
        transformer (`torch.nn.Module`, *optional*): The module to call instead of the policy's own.
        keep_graph (`Collection[int]`, defaults to none): Window steps, counted from the start of the window, whose
            graph is kept: the log-probs are then those of a replay, differentiable. The graph holds the activations
            of all images at these steps.
        outside_window (`Callable`, *optional*): Makes a context for the steps before the window and another for those
            after it, to make them cheaper, as [`~policies.accelerations.accelerated_ode`] does.
        on_step (`Callable`, *optional*): Called after each denoising step of a batch, to show progress.

    Yields:
        [`Trajectory`] of each batch in turn, so that it can be decoded and scored before the next one is sampled.

    Raises:
        `ValueError`: If there are neither `P` nor `P * G` initial latents.
    """
    num_prompts = len(conditioning)
    num_images = num_prompts * num_generations
    is_shared = latents.shape[0] == num_prompts
    if not is_shared and latents.shape[0] != num_images:
        raise ValueError(
            f"`latents` must hold one noise per prompt ({num_prompts}) or one per image ({num_images}), got "
            f"{latents.shape[0]}."
        )
    policy.prepare_scheduler(scheduler)
    window = scheduler.window
    num_steps = len(scheduler.timesteps)
    noise = torch.randn(
        (num_images, len(window), *latents.shape[1:]),
        generator=generator,
        device=latents.device,
        dtype=torch.promote_types(latents.dtype, torch.float32),
    )
    prompt_indices = torch.arange(num_images, device=latents.device) // num_generations
    for images in batches_of_images(num_images, num_generations, batch_size):
        count = images.stop - images.start
        rows = prompt_indices[images]
        if is_shared:
            rows = rows[:: min(count, num_generations)]  # one row per prompt of the batch
        policy.prepare_scheduler(scheduler)
        sampler = _Sampler(policy, scheduler, transformer, keep_graph, outside_window, on_step)
        states, log_probs, means, denoised = sampler.sample(
            conditioning[rows], latents[rows if is_shared else images], noise[images]
        )
        passes = window.start * len(rows) + (num_steps - window.start) * count
        yield Trajectory(
            states=states,
            log_probs=log_probs,
            means=means,
            transitions=scheduler.transitions(),
            conditioning=conditioning,
            prompt_indices=prompt_indices[images],
            latents=denoised,
            nfe=num_steps,
            nfe_computed=passes / count,
        )


def batches_of_images(num_images: int, num_generations: int, batch_size: int | None) -> list[slice]:
    """
    Batches of at most `batch_size` images: whole groups where one fits into a batch, parts of one group otherwise.
    """
    batch_size = batch_size or num_images
    if batch_size >= num_generations:
        size = batch_size // num_generations * num_generations
        return [slice(i, min(i + size, num_images)) for i in range(0, num_images, size)]
    groups = range(0, num_images, num_generations)
    offsets = range(0, num_generations, batch_size)
    return [slice(i + j, i + min(j + batch_size, num_generations)) for i in groups for j in offsets]


@dataclass
class _Sampler:
    """One batch's way from noise to latents: prefix, window and suffix. The arguments are those of the rollout."""

    policy: Policy
    scheduler: MixedODESDEScheduler
    transformer: nn.Module | None
    keep_graph: Collection[int]
    outside_window: Callable[[], contextlib.AbstractContextManager]
    on_step: Callable[[], object]

    def sample(self, conditioning: Conditioning, latents: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """
        Window states `(n, w + 1, ...)`, log-probs `(n, w)`, means `(n, w, ...)` and denoised latents `(n, ...)` of `n`
        images.

        Args:
            conditioning, latents: `n` rows, or fewer that are shared by `n / rows` images each up to the window.
            noise (`torch.Tensor` of shape `(n, w, ...)`): Noise of the window's steps.
        """
        # 1. The prefix, once for all images that share it
        window = self.scheduler.window
        latents = self._ode_steps(latents, conditioning, range(window.start))
        repeats = len(noise) // len(latents)
        if repeats > 1:
            latents = latents.repeat_interleave(repeats, dim=0)
            conditioning = conditioning.repeat_interleave(repeats)
            self.scheduler.repeat_history(repeats)
        # 2. The window, where the images of a group diverge
        states, log_probs, means = self._sde_steps(latents, conditioning, noise)
        # 3. The suffix
        latents = self._ode_steps(states[-1], conditioning, range(window.stop, len(self.scheduler.timesteps)))
        with torch.set_grad_enabled(bool(self.keep_graph)):
            if not log_probs:
                no_steps = torch.empty(len(latents), 0, device=latents.device)
                return torch.stack(states, dim=1), no_steps, torch.empty_like(latents)[:, None][:, :0], latents
            return torch.stack(states, dim=1), torch.stack(log_probs, dim=1), torch.stack(means, dim=1), latents

    def _ode_steps(self, latents: Tensor, conditioning: Conditioning, steps: range) -> Tensor:
        timesteps = self.scheduler.timesteps
        with self.outside_window() if steps else contextlib.nullcontext():
            for index in steps:
                velocity = self.policy.velocity(latents, timesteps[index], conditioning, self.transformer)
                latents = self.scheduler.step(velocity, timesteps[index], latents, return_dict=False)[0]
                self.on_step()
        return latents

    def _sde_steps(
        self, latents: Tensor, conditioning: Conditioning, noise: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        timesteps = self.scheduler.timesteps
        states = [latents]
        log_probs: list[Tensor] = []
        means: list[Tensor] = []
        for offset, index in enumerate(self.scheduler.window):
            if offset in self.keep_graph and offset - 1 not in self.keep_graph:
                # torch before 2.10 keeps copies of the weights from steps without a graph
                torch.clear_autocast_cache()
            with torch.set_grad_enabled(offset in self.keep_graph):
                velocity = self.policy.velocity(latents, timesteps[index], conditioning, self.transformer)
                next_latents, log_prob, mean, *_ = self.scheduler.step(
                    velocity.detach(), timesteps[index], latents, variance_noise=noise[:, offset], return_dict=False
                )
                if offset in self.keep_graph:
                    log_prob = self.scheduler.log_prob(velocity, latents, next_latents, index)
            latents = next_latents
            states.append(latents)
            log_probs.append(log_prob)
            means.append(mean)
            self.on_step()
        return states, log_probs, means
