"""
[`Engine`]: one training iteration, from its plan to the gradient.

    plan = engine.plan(iteration, rows)      # prompts, window, random numbers
    rollout = engine.roll_out(plan)          # sample, decode, score, compare
    batch = engine.backward(rollout, images) # replay, losses, gradient

It knows nothing of a Trainer, keeps no state between iterations, and logs nothing: it returns values.

Shapes: `P` prompts of this rank, `G` images of each, `B = P * G` images, `w` window steps, `N` transitions, `K`
rewards, `...` the shape of one image's latents.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import SchedulerMixin
from diffusers.training_utils import offload_models
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from ..core.advantages import combine_rewards, compute_advantages, keep_extremes, normalize_weights, scored_std
from ..core.objectives import (
    Objective,
    add_kl_penalty,
    clipped_objective,
    guarded_objective,
    masked_objective,
)
from ..core.policy import Conditioning
from ..core.rollout import Trajectory, batches_of_images, sample_batches
from ..core.step_weights import step_weights
from ..core.transitions import Transitions, gaussian_kl, velocity_kl
from ..mixgrpo_config import MixGRPOConfig
from ..policies import PipelinePolicy
from ..policies.accelerations import accelerated_ode
from ..policies.adapters import TrainedWeights
from ..policies.preparation import make_reference
from ..rewards.runner import RewardRunner, check_failures, reward_statistics
from ..scheduling_mixed_ode_sde import MixedODESDEScheduler
from .phase_timer import PhaseTimer
from .plan import IterationPlan, PromptDataset, Row, draw_order, plan_iteration
from .progress import Progress


logger = logging.get_logger(__name__)


@dataclass
class SampledBatch:
    """
    Some images of an iteration.

    Args:
        trajectory ([`Trajectory`] of `n` images): Their windows.
        images (`list[PIL.Image.Image]` of length `n`): The images.
        finite (`torch.BoolTensor` of shape `(n,)`): False where sampling gave infinite or NaN numbers, on the
            latents' device. Such an image is a copy of another one here, and must not count.
    """

    trajectory: Trajectory
    images: list[Image.Image]
    finite: Tensor


@dataclass
class Rollout:
    """
    The images of one iteration on this rank, sampled and scored.

    Args:
        plan ([`IterationPlan`]): The plan that they were sampled by.
        trajectory ([`Trajectory`] of `B` images): Their windows.
        images (`list[PIL.Image.Image]` of length `B`): The images; none in a restored rollout.
        rewards (`torch.Tensor` of shape `(K, B)`): Their rewards, NaN where an image could not be scored.
        advantages (`torch.Tensor` of shape `(B,)`): On the CPU, so that choosing images waits for no device.
        order (`torch.LongTensor` of shape `(B,)`): The images in the order in which they are trained, on the CPU.
        reference_means (`torch.Tensor` of shape `(B, w, ...)`, *optional*): With `beta > 0`, the means of the
            reference model's transitions from the same states; 0 at steps that are not trained.
        statistics (`dict[str, float]`): What to log about the images of all ranks.
    """

    plan: IterationPlan
    trajectory: Trajectory
    images: list[Image.Image]
    rewards: Tensor
    advantages: Tensor
    order: Tensor
    reference_means: Tensor | None
    statistics: dict[str, float]

    @property
    def rows(self) -> list[Row]:
        """The dataset row of each image."""
        return image_rows(self.plan, len(self.trajectory) // len(self.plan.rows))

    def training_batches(self, batch_size: int) -> list[Tensor]:
        """The images of each training batch, on the CPU."""
        return list(self.order.split(batch_size))

    def state_dict(self) -> dict[str, Any]:
        """What [`Engine.restore`] needs beside the plan: tensors and numbers."""
        trajectory = self.trajectory
        return {
            "iteration": self.plan.iteration,
            "prompts": self.plan.prompts,
            "latent_seeds": self.plan.latent_seeds,
            "states": trajectory.states,
            "log_probs": trajectory.log_probs.detach(),
            "means": trajectory.means,
            "prompt_indices": trajectory.prompt_indices,
            "latents": trajectory.latents,
            "nfe": trajectory.nfe,
            "nfe_computed": trajectory.nfe_computed,
            "rewards": self.rewards,
            "advantages": self.advantages,
            "order": self.order,
            "reference_means": self.reference_means,
        }


@dataclass
class TrainingPass:
    """One forward and backward pass: its `n` transitions, by image and window step, with losses and ratios."""

    images: Tensor
    steps: Tensor
    losses: Tensor
    ratio: Tensor
    statistics: dict[str, Tensor]


@dataclass
class TrainingBatch:
    """One training batch after its backward passes: the loss, a 0-d tensor, and the passes."""

    loss: Tensor
    passes: list[TrainingPass]


class Engine:
    """
    Samples, scores and trains the images of an iteration. See the top of this file.

    Args:
        policy ([`PipelinePolicy`]): The policy.
        scheduler ([`MixedODESDEScheduler`]): It takes the steps of rollouts.
        settings ([`MixGRPOConfig`]): The configuration.
        rewards ([`RewardRunner`]): It scores images.
        accelerator ([`~accelerate.Accelerator`]): Precision, devices, and backward passes.
        weights ([`TrainedWeights`]): Which weights of the transformer are trained.

    Attributes:
        encode (`Callable`): Prompts, and the images to edit if there are any, to [`Conditioning`]. The policy's own
            method, unless replaced by [`~policies.prompt_embeds.CachedPrompts.encode`].
        timer ([`PhaseTimer`]): Seconds of the phases `sampling`, `decoding`, `reward` and `training`.
        progress ([`Progress`]): Shows how far sampling is.
    """

    def __init__(
        self,
        policy: PipelinePolicy,
        scheduler: MixedODESDEScheduler,
        settings: MixGRPOConfig,
        rewards: RewardRunner,
        accelerator: Accelerator,
        weights: TrainedWeights,
    ) -> None:
        self.policy = policy
        self.scheduler = scheduler
        self.settings = settings
        self.rewards = rewards
        self.accelerator = accelerator
        self.weights = weights
        self.encode: Callable[..., Conditioning] = policy.encode
        self.timer = PhaseTimer(settings.device)
        self.progress = Progress(accelerator.is_main_process and not settings.disable_tqdm)
        self.window_schedule = settings.window_schedule()
        self.reward_weights = normalize_weights(settings.reward_weights, len(rewards.names))
        self.reference: nn.Module | None = None
        if settings.beta > 0 and not weights.is_lora:
            self.reference = make_reference(policy.pipe.transformer, settings)
        self._accelerated_ode = functools.partial(
            accelerated_ode, policy.pipe.transformer, settings.ode_cache_config(), settings.merge_lora
        )

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed shards the weights: then all ranks must run the same number of passes."""
        state = self.accelerator.state
        return any(getattr(state, name, None) is not None for name in ("fsdp_plugin", "deepspeed_plugin"))

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policy.transformer.parameters() if parameter.requires_grad]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The precision of all forward passes: the ratio starts at 1 only if sampling and training share it."""
        accelerator = self.accelerator
        if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision == "bf16":
            # accelerate leaves it to DeepSpeed, which does not see the passes before training and of the reference.
            return torch.autocast(accelerator.device.type, torch.bfloat16)
        return accelerator.autocast()

    # ---- 1. Plan ----

    def plan(self, iteration: int, rows: Sequence[Row]) -> IterationPlan:
        """The plan of an iteration on this rank, from its number and its `P` dataset rows."""
        rank = self.accelerator.process_index
        return plan_iteration(self.settings, self.window_schedule, iteration, rows, rank)

    # ---- 2. Sample ----

    def sample(self, plan: IterationPlan, transformer: nn.Module | None = None) -> Iterator[SampledBatch]:
        """
        Sample and decode the images of an iteration, batch by batch.

        Args:
            plan ([`IterationPlan`]): The plan.
            transformer (`torch.nn.Module`, *optional*): The module to call instead of the policy's own transformer.

        Yields:
            [`SampledBatch`]: `sample_batch_size` images at a time, in the order of the plan's rows.
        """
        settings = self.settings
        self._place_window(plan)
        with self.timer.phase("sampling"):
            conditioning = self.condition(self.policy, plan.rows)
            # States are kept in float32: rounding them would appear as noise in the ratio.
            latents = self.policy.initial_latents(plan.latent_seeds).float()
        self.policy.prepare_scheduler(self.scheduler)
        num_images = len(plan.rows) * settings.num_generations
        passes = len(batches_of_images(num_images, settings.num_generations, settings.sample_batch_size))
        with self.progress.bar(f"Sampling {num_images} images", passes * len(self.scheduler.timesteps)) as on_step:
            batches = sample_batches(
                self.policy,
                self.scheduler,
                conditioning,
                latents,
                num_generations=settings.num_generations,
                generator=torch.Generator(self.policy.device).manual_seed(plan.sde_seed),
                batch_size=settings.sample_batch_size,
                transformer=transformer,
                keep_graph=plan.steps.tolist() if settings.reuse_rollout_graph else (),
                outside_window=self._accelerated_ode,
                on_step=on_step,
            )
            while True:
                with self.timer.phase("sampling"), self.autocast():
                    trajectory = next(batches, None)
                if trajectory is None:
                    return
                trajectory, finite = trajectory.without_nonfinite()
                with self.timer.phase("decoding"):
                    size = settings.decode_batch_size or settings.sample_batch_size
                    images = self.decode(self.policy, trajectory.latents, size)
                yield SampledBatch(trajectory, images, finite)

    def _place_window(self, plan: IterationPlan) -> None:
        start, size = plan.window
        self.scheduler = MixedODESDEScheduler.from_config(self.scheduler.config, window_start=start, window_size=size)

    def condition(self, policy: PipelinePolicy, rows: Sequence[Row]) -> Conditioning:
        """The encoded prompts of dataset rows, with their images at the size of `policy` if it edits images."""
        prompts = [row["prompt"] for row in rows]
        if not policy.takes_image:
            return self.encode(prompts)
        with self.vae_on_device():
            return self.encode(prompts, [policy.fit_image(row["image"]) for row in rows])

    def decode(self, policy: PipelinePolicy, latents: Tensor, batch_size: int | None) -> list[Image.Image]:
        """Images from denoised latents of `policy`, with the VAE on the device."""
        with self.vae_on_device():
            return policy.decode(latents, batch_size)

    def vae_on_device(self) -> contextlib.AbstractContextManager[None]:
        """A context with the VAE on the device. Afterwards it is where it was."""
        vae = self.policy.pipe.vae
        is_offloaded = self.settings.offload_vae and not hasattr(vae, "_hf_hook")
        return offload_models(vae, device=self.settings.device, offload=is_offloaded)

    @torch.no_grad()
    def reference_means(
        self, plan: IterationPlan, trajectory: Trajectory, transformer: nn.Module | None = None
    ) -> Tensor | None:
        """
        Where the reference model would have gone from each state: `(B, w, ...)`, or `None` without a KL term.

        The reference is the transformer without its LoRA, or a frozen copy in full fine-tuning.
        """
        if self.settings.beta == 0:
            return None
        means = torch.zeros_like(trajectory.states[:, 1:])
        images, steps = trajectory.transition_indices(plan.steps.to(means.device, non_blocking=True))
        # As many as in sampling, which needs no gradient either: so they fit
        size = self.settings.replay_batch_size or self.settings.sample_batch_size or len(trajectory)
        with self.timer.phase("sampling"), self.autocast(), self._reference(transformer) as reference:
            for start in range(0, len(images), size):
                chosen = images[start : start + size], steps[start : start + size]
                means[chosen] = trajectory.replay(self.policy, *chosen, transformer=reference).means
        return means

    @contextlib.contextmanager
    def _reference(self, transformer: nn.Module | None) -> Iterator[nn.Module | None]:
        if self.reference is not None:
            yield self.reference
            return
        self.policy.pipe.transformer.disable_adapters()
        try:
            yield transformer
        finally:
            self.policy.pipe.transformer.enable_adapters()

    # ---- 3. Score ----

    def roll_out(self, plan: IterationPlan, transformer: nn.Module | None = None) -> Rollout:
        """
        Sample the images of an iteration, score them, and compare them within their groups.

        Args:
            plan ([`IterationPlan`]): The plan.
            transformer (`torch.nn.Module`, *optional*): The module to call instead of the policy's own transformer.

        Raises:
            [`RewardError`]: If a reward is broken, or fails on more than `max_reward_failure_rate` of the images.
        """
        rows = image_rows(plan, self.settings.num_generations)
        images: list[Image.Image] = []
        trajectories: list[Trajectory] = []
        finite: list[Tensor] = []
        for batch in self.sample(plan, transformer):
            self.rewards.start(rows[len(images) : len(images) + len(batch.images)], batch.images)
            images += batch.images
            trajectories.append(batch.trajectory)
            finite.append(batch.finite.cpu())  # the images are on the host, so this does not wait
        trajectory = Trajectory.concatenate(trajectories)
        reference_means = self.reference_means(plan, trajectory, transformer)
        with self.timer.phase("reward"):
            rewards = self.rewards.finish()
            logged = self.rewards.pop_metrics()
        rollout = self.compare(plan, trajectory, images, rewards, reference_means, torch.cat(finite))
        rollout.statistics = with_logged(rollout.statistics, logged)
        return rollout

    def restore(self, plan: IterationPlan, saved: dict[str, Any]) -> Rollout | None:
        """
        The rollout of [`Rollout.state_dict`], so that an iteration can go on where it was interrupted.

        Args:
            plan ([`IterationPlan`]): The plan of the same iteration.
            saved (`dict`): The saved rollout.

        Returns:
            [`Rollout`] without its images, or `None` if it was saved by another plan.
        """
        own = (plan.iteration, plan.prompts, plan.latent_seeds)
        if (saved["iteration"], saved["prompts"], saved["latent_seeds"]) != own:
            return None
        self._place_window(plan)
        self.policy.prepare_scheduler(self.scheduler)
        device = self.policy.device
        reference_means = saved["reference_means"]
        trajectory = Trajectory(
            states=saved["states"].to(device),
            log_probs=saved["log_probs"].to(device),
            means=saved["means"].to(device),
            transitions=self.scheduler.transitions(),
            conditioning=self.condition(self.policy, plan.rows),
            prompt_indices=saved["prompt_indices"].to(device),
            latents=saved["latents"].to(device),
            nfe=saved["nfe"],
            nfe_computed=saved["nfe_computed"],
        )
        return Rollout(
            plan,
            trajectory,
            images=[],
            rewards=saved["rewards"],
            advantages=saved["advantages"],
            order=saved["order"],
            reference_means=None if reference_means is None else reference_means.to(device),
            statistics={},
        )

    def compare(
        self,
        plan: IterationPlan,
        trajectory: Trajectory,
        images: list[Image.Image],
        rewards: Tensor,
        reference_means: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> Rollout:
        """
        Advantages and statistics of scored images: `rewards` of shape `(K, B)`, NaN where there is no score.

        Where `finite`, of shape `(B,)`, is False, an image's rewards do not count.

        Raises:
            [`RewardError`]: If a reward failed on more than `max_reward_failure_rate` of all ranks' images.
        """
        settings = self.settings
        # Advantages only need their own group. Statistics, and rewards scaled by the batch, need all ranks.
        finite = torch.ones(rewards.shape[1], dtype=torch.bool) if finite is None else finite
        groups = rewards.unflatten(1, (-1, settings.num_generations))
        everyone = self.gather(groups.movedim(1, 0)).movedim(0, 1)
        counts = self.gather(finite.unflatten(0, (-1, settings.num_generations)))
        errors = self.rewards.all_errors() if bool(everyone.isnan().any()) else {}
        if counts.any():
            limit = settings.max_reward_failure_rate
            check_failures(everyone[:, counts], self.rewards.names, limit, errors, plan.iteration)
        everyone = everyone.masked_fill(~counts, math.nan)
        advantages = compute_advantages(
            everyone,
            self.reward_weights,
            settings.multi_objective_aggregation,
            settings.scale_rewards,
            settings.advantage_clip,
        )
        own = advantages.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        statistics = self._statistics(plan, trajectory, everyone, advantages)
        statistics["nonfinite/images"] = int((~counts).sum())
        rewards = rewards.masked_fill(~finite, math.nan)
        return self.make_rollout(plan, trajectory, images, rewards, own, reference_means, statistics)

    def make_rollout(
        self,
        plan: IterationPlan,
        trajectory: Trajectory,
        images: list[Image.Image],
        rewards: Tensor,
        advantages: Tensor,
        reference_means: Tensor | None,
        statistics: dict[str, float],
    ) -> Rollout:
        """A rollout from this rank's advantages of shape `(P, G)`: all are trained on, or only `replay_top_k`."""
        if self.settings.replay_top_k is not None:
            advantages = keep_extremes(advantages, self.settings.replay_top_k)
        advantages = advantages.flatten()
        order = draw_order(plan.order_seed, advantages, self.settings.per_device_train_batch_size)
        return Rollout(plan, trajectory, images, rewards, advantages, order, reference_means, statistics)

    def _statistics(
        self, plan: IterationPlan, trajectory: Trajectory, rewards: Tensor, advantages: Tensor
    ) -> dict[str, float]:
        """Of the images of all ranks: `rewards` of shape `(K, P, G)` and `advantages` of shape `(P, G)`."""
        statistics = reward_statistics(rewards.flatten(1), self.rewards.names, self.reward_weights)
        del statistics["reward_se"]
        combined = combine_rewards(rewards, self.reward_weights)
        statistics["reward_std"] = float(scored_std(combined, dims=(-1,)).mean())
        statistics["frac_reward_zero_std"] = float((advantages == 0).all(dim=-1).float().mean())
        statistics["window/start"] = plan.window.start
        statistics["window/size"] = plan.window.size
        statistics["iteration"] = plan.iteration
        statistics["nfe"] = self.policy.passes_per_step * trajectory.nfe
        statistics["nfe_amortized"] = self.policy.passes_per_step * trajectory.nfe_computed
        return statistics

    def try_rewards(self, dataset: PromptDataset) -> None:
        """
        Call each reward on two gray images, so that a broken one is found before a rollout.

        Raises:
            [`RewardError`]: If a reward raises, or returns anything but one score per image.
        """
        self.rewards.try_on_gray_images(dataset, (self.policy.width, self.policy.height))

    # ---- 4. Losses and gradient ----

    def backward(
        self,
        rollout: Rollout,
        images: Tensor,
        transformer: nn.Module | None = None,
        pass_size: int | None = None,
        accumulation_steps: int = 1,
    ) -> TrainingBatch:
        """
        Add the gradient of one training batch: the mean loss over its images and their trained steps.

        The gradient does not depend on `pass_size`. The passes of one optimizer step synchronize gradients once.

        Args:
            rollout ([`Rollout`]): The iteration's images.
            images (`torch.LongTensor` of shape `(b,)`): The images of the training batch, on the CPU.
            transformer (`torch.nn.Module`, *optional*): The module to train, wrapped for distributed training.
            pass_size (`int`, *optional*): Transitions per forward and backward pass. Defaults to all.
            accumulation_steps (`int`, defaults to 1): Training batches per optimizer step.
        """
        with self.timer.phase("training"):
            count = len(images) * len(rollout.plan.steps)
            images, steps = self.transitions_to_train(rollout, images)
            pass_size = pass_size or len(images)
            total = torch.zeros((), device=self.settings.device)
            passes = []
            for start in range(0, len(images), pass_size):
                chosen = images[start : start + pass_size], steps[start : start + pass_size]
                synchronizes = start + pass_size >= len(images) and not self.settings.reuse_rollout_graph
                with contextlib.nullcontext() if synchronizes else self._no_gradient_sync(transformer):
                    objective = self.objective(rollout, *chosen, transformer=transformer)
                    loss = objective.losses.sum() / (count * accumulation_steps)
                    self._backward(loss)
                total += loss.detach()
                losses = objective.losses.detach()
                passes.append(TrainingPass(*chosen, losses, objective.ratio, objective.statistics))
            if self.settings.reuse_rollout_graph:
                self._average_gradients()
            return TrainingBatch(total, passes)

    def transitions_of(self, rollout: Rollout, images: Tensor) -> tuple[Tensor, Tensor]:
        """The transitions of some images at the trained steps, by image and window step: two tensors `(N,)`."""
        steps = rollout.plan.steps
        return images.repeat_interleave(len(steps)), steps.repeat(len(images))

    def transitions_to_train(self, rollout: Rollout, images: Tensor) -> tuple[Tensor, Tensor]:
        """[`transitions_of`], without those that have no gradient because their image has no advantage."""
        images, steps = self.transitions_of(rollout, images)
        if self.settings.beta > 0 or self.is_sharded:
            return images, steps
        kept = (rollout.advantages[images] != 0).nonzero().flatten()
        if len(kept) == 0:
            # Each rank must run a backward pass, and the optimizer needs a gradient, even a zero one.
            kept = torch.zeros(1, dtype=torch.long)
        return images[kept], steps[kept]

    def objective(
        self, rollout: Rollout, images: Tensor, steps: Tensor, transformer: nn.Module | None = None
    ) -> Objective:
        """
        The losses of `N` transitions under the current weights.

        Args:
            rollout ([`Rollout`]): The iteration's images.
            images, steps (`torch.LongTensor` of shape `(N,)`): The transitions, by image and window step, on the CPU.
            transformer (`torch.nn.Module`, *optional*): The module to call instead of the policy's own transformer.
        """
        settings = self.settings
        trajectory = rollout.trajectory
        device = trajectory.states.device
        # Other copies wait for the passes before them. On MPS these may read freed memory (pytorch issue 189690).
        no_wait = device.type != "mps"
        advantages = rollout.advantages[images].to(device, non_blocking=no_wait)
        images = images.to(device, non_blocking=no_wait)
        steps = steps.to(device, non_blocking=no_wait)
        old_log_probs = trajectory.log_probs.detach()[images, steps]
        if settings.reuse_rollout_graph:
            # The weights are those that sampled: nothing has moved yet.
            new_log_probs = trajectory.log_probs[images, steps]
            kl = torch.zeros_like(old_log_probs)
            return self._policy_objective(new_log_probs, old_log_probs, advantages, kl, rollout, steps)
        with self.autocast():
            replay = trajectory.replay(self.policy, images, steps, transformer)
        kl = torch.zeros_like(old_log_probs)
        if settings.loss_type != "grpo":  # which does not look at it
            kl = gaussian_kl(replay.means, trajectory.means[images, steps], replay.stds)
        objective = self._policy_objective(replay.log_probs, old_log_probs, advantages, kl, rollout, steps)
        if rollout.reference_means is not None:
            reference_means = rollout.reference_means[images, steps]
            if settings.kl_type == "velocity":
                coefficients = trajectory.transitions.velocity_coefficients()[steps]
                coefficients = coefficients.reshape(-1, *[1] * (replay.means.ndim - 1))
                kl = velocity_kl(replay.means, reference_means, coefficients)
            else:
                kl = gaussian_kl(replay.means, reference_means, replay.stds)
            objective = add_kl_penalty(objective, kl, settings.beta)
        return objective

    def _policy_objective(
        self,
        new_log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        kl: Tensor,
        rollout: Rollout,
        steps: Tensor,
    ) -> Objective:
        """The weighted losses of `N` transitions at `steps` of the window, without a penalty."""
        settings = self.settings
        log_probs = new_log_probs, old_log_probs, advantages
        if settings.loss_type == "grpo_guard":
            transitions = rollout.trajectory.transitions
            stds = transitions.stds()[steps]
            dts = (transitions.next_sigmas - transitions.sigmas)[steps]
            objective = guarded_objective(*log_probs, kl, stds, dts, settings.epsilon, settings.epsilon_high)
        elif settings.loss_type == "dppo":
            objective = masked_objective(*log_probs, kl, settings.kl_threshold)
        else:
            objective = clipped_objective(*log_probs, settings.epsilon, settings.epsilon_high)
        return objective.weighted(self.step_weights[rollout.plan.window.start + steps])

    @functools.cached_property
    def step_weights(self) -> Tensor:
        """The weight of each step of the uncompressed schedule but the last, on the device."""
        return step_weights(self.settings.step_weighting, self._all_transitions(), self.window_schedule.trained_steps)

    def _all_transitions(self) -> Transitions:
        scheduler = MixedODESDEScheduler.from_config(
            self.scheduler.config,
            window_start=0,
            window_size=self.settings.num_inference_steps - 1,
            prefix_ratio=1.0,
            suffix_ratio=1.0,
        )
        self.policy.prepare_scheduler(scheduler)
        return scheduler.transitions()

    def _backward(self, loss: Tensor) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # As in the Trainer: the loss has been divided by the accumulation steps already.
            self.accelerator.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    def _average_gradients(self) -> None:
        # The rollout's passes went around DDP, so its hooks do not know of this backward pass.
        if self.accelerator.num_processes > 1:
            for parameter in self.policy.transformer.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    @contextlib.contextmanager
    def _no_gradient_sync(self, transformer: nn.Module | None) -> Iterator[None]:
        # The flag tells accelerate's backward (DeepSpeed would take an optimizer step), the context tells DDP. Where
        # the Trainer has turned it off already, for gradient accumulation, there is nothing to do.
        state = self.accelerator.gradient_state
        if not state.sync_gradients:
            yield
            return
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(transformer) if transformer is not None else contextlib.nullcontext():
                yield
        finally:
            state._set_sync_gradients(True)

    # ---- Ranks ----

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all ranks, on the CPU."""
        return self.accelerator.gather(tensor.to(self.accelerator.device).contiguous()).cpu()


def image_rows(plan: IterationPlan, num_generations: int) -> list[Row]:
    """The dataset row of each image of an iteration on this rank."""
    return [row for row in plan.rows for _ in range(num_generations)]


def with_logged(statistics: dict[str, float], logged: dict[str, float]) -> dict[str, float]:
    """Statistics with the metrics that rewards have logged, except for those that have the name of one of them."""
    if common := sorted(statistics.keys() & logged.keys()):
        logger.warning_once(
            f"Rewards logged the metrics {', '.join(common)}, whose names are taken. They are left out: call "
            "`log_metric` with other names."
        )
    return logged | statistics


def make_scheduler(
    scheduler: SchedulerMixin, settings: MixGRPOConfig, evaluation: bool = False
) -> MixedODESDEScheduler:
    """A pipeline's scheduler with the window and solver of the settings, or, for evaluation, as a plain Euler ODE."""
    changes: dict[str, Any] = {"ode_solver": "euler", "prefix_ratio": 1.0, "suffix_ratio": 1.0}
    changes |= {"window_start": 0, "window_size": 0}
    if not evaluation:
        changes |= settings.scheduler_arguments()
    if settings.shift is not None:
        changes |= {"shift": settings.shift, "use_dynamic_shifting": False}
    return MixedODESDEScheduler.from_config(scheduler.config, **changes)
