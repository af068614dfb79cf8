"""[`MixGRPOTrainer`]: online reinforcement learning of a flow-matching pipeline on a sliding window of steps."""

import contextlib
import copy
import functools
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline
from peft import PeftConfig
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from .accelerated_ode import accelerated_ode, make_cache
from .advantages import combine_rewards, compute_advantages, keep_extremes, normalize_weights, scored_std
from .iteration_callback import IterationCallback
from .iteration_draws import draw_order, draw_seeds, draw_steps
from .kernels import gaussian_kl
from .mixgrpo_config import MixGRPOConfig
from .model_card import mixgrpo_model_card
from .policies import FluxPolicy
from .preflight import preflight
from .preflight_report import PreflightReport
from .prepare_pipeline import (
    load_pipeline,
    make_reference,
    make_scheduler,
    place_components,
    prepare_pipeline,
    rename_gradient_checkpointing,
    vae_on_device,
)
from .progress_callback import RewardProgressCallback
from .prompt_embeds import cache_prompt_embeds
from .prompt_sampler import PromptSampler, check_dataset
from .replay_batch_size import replay_batch_size
from .reward_calls import RewardError, RewardFunc, RewardRunner, check_failures, reward_statistics
from .rewards import load_reward
from .rollout import Trajectory, all_transitions, replay_log_probs, sample_trajectories
from .sample_grid import save_sample_grid
from .trained_weights import load_trained_weights, save_lora, save_transformer


logger = logging.get_logger(__name__)

# Metrics of which the largest value since the last log is logged, and not the mean
MAXIMA = ("ratio/max_deviation", "ratio/on_policy_max_deviation")


@dataclass
class _Rollout:
    """One iteration's images on this device, `B` of them, as far as training needs them."""

    trajectory: Trajectory
    conditioning: Any
    advantages: torch.Tensor  # (B,), on the CPU, so that choosing samples waits for no device
    order: torch.Tensor  # (B,), the images in the order in which they are trained
    steps: torch.Tensor  # the window steps to train, counted from the window's start
    reference_means: torch.Tensor | None  # (B, w, ...), with beta > 0


class MixGRPOTrainer(Trainer):
    """
    Trainer for MixGRPO (https://arxiv.org/abs/2507.21802): a [`~transformers.Trainer`] of a pipeline's transformer.

    Each iteration samples groups of images, scores them with the reward functions, and moves the policy's window of
    stochastic steps towards the better images of each group. See [`MixGRPOConfig`] for the batch arithmetic.

    Args:
        model ([`~diffusers.FluxPipeline`] or `str` or `os.PathLike`):
            The pipeline, or the folder or Hub repository to load it from. Its transformer is trained in place; its
            other parts are frozen.
        reward_funcs (callable or `str`, or a `list` of these):
            `reward(prompts, images, **columns) -> list[float | None]`, called once per iteration with all images (PIL)
            and the further columns of the data set, one entry per image. `None` says that an image could not be
            scored: it is left out of its group. An `async` one is called as soon as there are images, and works while
            the next are sampled. The name in the logs is the function's `__name__`. A `str` is a name, a path or a
            Hub id as [`~rewards.load_reward`] takes it.
        args ([`MixGRPOConfig`], *optional*):
            The configuration.
        train_dataset (`datasets.Dataset` or any sized, indexable collection of `dict`):
            Rows with a `"prompt"`.
        eval_dataset (the same, or a `dict` of them by name, *optional*):
            Prompts for [`evaluate`].
        peft_config ([`~peft.LoraConfig`], *optional*):
            Train this LoRA and not the transformer itself. Without `target_modules` it adapts the attention and
            feed-forward projections. A pipeline that has a LoRA loaded goes on training that one.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            As in [`~transformers.Trainer`].
        optimizers (`tuple`, *optional*):
            An optimizer and a learning rate scheduler, as in [`~transformers.Trainer`].

    Raises:
        `ValueError`, `TypeError`, `FileNotFoundError`: If an argument cannot work; the message says what to change.

    Example:

    ```python
    from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer
    from peft import LoraConfig


    def redness(prompts, images, **columns):
        return [float(np.asarray(image, dtype=float)[..., 0].mean()) for image in images]


    trainer = MixGRPOTrainer(
        model="black-forest-labs/FLUX.1-dev",
        reward_funcs=redness,
        args=MixGRPOConfig(output_dir="red", learning_rate=1e-4, max_steps=1200),
        train_dataset=[{"prompt": "a cat"}, {"prompt": "a house by the sea"}],
        peft_config=LoraConfig(r=64, lora_alpha=128),
    )
    trainer.train()
    ```
    """

    args: MixGRPOConfig

    def __init__(
        self,
        model: FluxPipeline | str | os.PathLike,
        reward_funcs: RewardFunc | str | list[RewardFunc | str],
        args: MixGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        # 1. What can be known to be wrong before anything large is loaded
        args = MixGRPOConfig() if args is None else args
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which torch's DataParallel would share. Start one "
                "process per GPU (`accelerate launch script.py`), or set CUDA_VISIBLE_DEVICES to one of them."
            )
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self.reward_weights = normalize_weights(args.reward_weights, len(funcs))
        kwargs = args.reward_init_kwargs if isinstance(args.reward_init_kwargs, dict) else {}
        if unknown := [name for name in kwargs if name not in funcs]:
            raise ValueError(f"`reward_init_kwargs` is for {', '.join(unknown)}, not among `reward_funcs`={funcs}.")
        self.reward_funcs = [load_reward(f, **kwargs.get(f, {})) if isinstance(f, str) else f for f in funcs]
        self.rewards = RewardRunner(self.reward_funcs, args.reward_timeout, args.device, args.offload_rewards)
        self.reward_names = self.rewards.names
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
                check_dataset(name, part)

        # 2. The pipeline, and its transformer as the model to train
        self.pipe = load_pipeline(model, args, peft_config)
        sampling = (args.height, args.width, args.num_inference_steps, args.guidance_scale, args.max_sequence_length)
        self.policy = FluxPolicy(self.pipe, *sampling)
        self.eval_policy = copy.copy(self.policy)
        self.eval_policy.num_inference_steps = args.eval_num_inference_steps or args.num_inference_steps
        self.accelerated_ode = functools.partial(
            accelerated_ode, self.pipe.transformer, make_cache(args.ode_cache), args.merge_lora
        )
        self.window_schedule = args.window_schedule()
        self.noise_scheduler = make_scheduler(self.pipe, args)
        set_seed(args.seed)  # the Trainer's own comes after the LoRA has drawn its weights
        self.is_lora, self.adapter_name = prepare_pipeline(self.pipe, peft_config, args)
        self.reference = make_reference(self.pipe, args) if args.beta > 0 and not self.is_lora else None
        rename_gradient_checkpointing(self.pipe.transformer)

        # 3. Everything else is the Trainer's
        super().__init__(
            model=self.pipe.transformer,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # a batch is a list of rows
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(IterationCallback(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RewardProgressCallback)
        place_components(self.pipe, args, stay=self.policy.text_encoders if args.cache_prompt_embeds else ())
        if args.cache_prompt_embeds:
            cache_prompt_embeds(self)
        # As in the Trainer: the loss has been divided by the accumulation steps, and DeepSpeed must not do so again.
        self._backward_kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self._sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if args.reuse_rollout_graph and self._sharded:
            raise ValueError(
                "`reuse_rollout_graph=True` cannot work with FSDP or DeepSpeed, which gather the weights anew for "
                "each forward pass. Leave it False, or train without sharding."
            )
        if args.merge_lora and (self._sharded or not self.is_lora):
            raise ValueError(
                "`merge_lora=True` needs a LoRA (`peft_config`) on weights that are neither sharded by FSDP nor by "
                "DeepSpeed. Leave it False."
            )
        # An image without an advantage has no gradient and need not be replayed. Sharded models gather their weights
        # in each forward pass, so there all ranks must run equally many.
        self._skip_zero_advantages = args.beta == 0 and not self._sharded
        self._rollout: _Rollout | None = None
        self._batches_done: int | None = None
        self._replay_size: int | None = None
        self.first_step, self.saved_step = 0, None  # of this run; IterationCallback keeps them
        self.prompt_sampler: PromptSampler | None = None
        self._metrics: dict[str, list[float | torch.Tensor]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)
        self._phases: list[str] = []

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader:
        # A batch is the prompts of an iteration, not the images of a training batch: hence another batch size.
        if self.train_dataset is None:
            raise ValueError("`train_dataset` is None; training needs rows with a 'prompt'.")
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self.args.prompts_per_iteration,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        # Each batch of prompts comes up once per training batch of its iteration, see PromptSampler.
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        self.prompt_sampler = PromptSampler(
            len(dataset),
            self.args.prompts_per_iteration * self.accelerator.num_processes,
            repeats=self.args.batches_per_iteration,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        return self.prompt_sampler

    # ---- Training ----

    def preflight(self) -> PreflightReport:
        """What the run will do and cost, measured on its first iteration and without a trace: see [`preflight`]."""
        return preflight(self)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        # Overridden to try the rewards first, and to lose nothing when training ends with an error.
        if self.train_dataset is not None:
            self._try_rewards()
        # Anew, as an interrupted run may have left it in mid-rollout
        self.noise_scheduler = make_scheduler(self.pipe, self.args)
        self._rollout, self._batches_done, self._replay_size = None, None, None
        self._phases.clear()
        self.rewards.clear()
        self.first_step, self.saved_step = self.state.global_step, None
        self._metrics.clear()
        self._seconds.clear()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except (Exception, KeyboardInterrupt) as error:
            self._save_after(error)
            raise

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        # Overridden since one call samples when an iteration begins, and may run several backward passes. The model's
        # train and eval modes are the same here: all dropout is off, or the ratio would not start at 1.
        if self._batches_done is None:
            self._batches_done = self.state.global_step * self.args.gradient_accumulation_steps
        iteration, batch = divmod(self._batches_done, self.args.batches_per_iteration)
        if self._rollout is None or batch == 0:
            if batch != 0:
                logger.warning("Resuming inside an iteration: its images are sampled again, with other weights.")
            self._rollout = None  # frees its memory before the next one needs it
            self._rollout = self._generate_rollout(inputs, iteration)
        if callable(switch_to_training := getattr(self.optimizer, "train", None)):
            switch_to_training()  # schedule-free optimizers have two modes
        with self._phase("training"):
            size = self.args.per_device_train_batch_size
            start = batch % self.args.steps_per_generation * size
            on_policy = batch < self.args.gradient_accumulation_steps
            loss = self._forward_backward(model, self._rollout.order[start : start + size], on_policy)
        self._batches_done += 1
        if batch == self.args.batches_per_iteration - 1:
            for phase, seconds in self._seconds.items():
                self._metrics[f"time/{phase}"].append(seconds)
            self._seconds.clear()
        return loss

    def _forward_backward(self, model: nn.Module, images: torch.Tensor, on_policy: bool) -> torch.Tensor:
        """
        Gradient of the loss of one training batch, the mean over its images and their trained steps.

        It does not depend on `replay_batch_size`. Across the passes of one optimizer step gradients are synchronised
        once.
        """
        rollout = self._rollout
        assert rollout is not None
        images, steps = images.repeat_interleave(len(rollout.steps)), rollout.steps.repeat(len(images))
        count = len(images)
        size = self._replay_size = self._replay_size or replay_batch_size(self, images, steps)
        if self._skip_zero_advantages:
            kept = (rollout.advantages[images] != 0).nonzero().flatten()
            # One is always kept: every rank has to run a backward pass, and an optimizer to see a gradient, if of 0.
            kept = kept if len(kept) else torch.zeros(1, dtype=torch.long)
            images, steps = images[kept], steps[kept]
        total = torch.zeros((), device=self.args.device)
        for start in range(0, len(images), size):
            is_last = start + size >= len(images)
            synchronises = is_last and not self.args.reuse_rollout_graph
            with contextlib.nullcontext() if synchronises else self._no_gradient_sync(model):
                batch = slice(start, start + size)
                losses = self._compute_losses(model, images[batch], steps[batch], on_policy)
                loss = losses.sum() / (count * self.current_gradient_accumulation_steps)
                self.accelerator.backward(loss, **self._backward_kwargs)
            total += loss.detach()
        if self.args.reuse_rollout_graph and self.accelerator.num_processes > 1:
            # The rollout went round DDP, so its hooks do not know of this backward pass.
            for parameter in self.pipe.transformer.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return total

    def _compute_losses(
        self, model: nn.Module, images: torch.Tensor, steps: torch.Tensor, on_policy: bool
    ) -> torch.Tensor:
        """Clipped objective of `N` transitions, given by image and window step: a loss each, shape `(N,)`."""
        rollout, args = self._rollout, self.args
        assert rollout is not None
        device = rollout.trajectory.states.device
        # Other copies wait for the passes before them. To MPS these may read freed memory (pytorch issue 189690).
        no_wait = device.type != "mps"
        advantages = rollout.advantages[images].to(device, non_blocking=no_wait)
        images, steps = images.to(device, non_blocking=no_wait), steps.to(device, non_blocking=no_wait)
        old, replay = rollout.trajectory.log_probs.detach()[images, steps], None
        if args.reuse_rollout_graph:
            new = rollout.trajectory.log_probs[images, steps]
        else:
            replay = replay_log_probs(
                self.policy, self.noise_scheduler, rollout.trajectory, rollout.conditioning, images, steps, model
            )
            new = replay.log_probs
        ratio = torch.exp(new - old)
        low, high = 1 - args.epsilon, 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high)
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
        if rollout.reference_means is not None and replay is not None:
            kl = gaussian_kl(replay.means, rollout.reference_means[images, steps], replay.stds)
            losses = losses + args.beta * kl
            self._metrics["kl"].append(kl.detach().mean())
        self._log_ratio(ratio.detach(), (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0), on_policy)
        return losses

    def _log_ratio(self, ratio: torch.Tensor, low: torch.Tensor, high: torch.Tensor, on_policy: bool) -> None:
        """Record ratios of shape `(N,)`, and which were clipped at the low and at the high end."""
        metrics, deviation = self._metrics, (ratio - 1).abs().max()
        for name, clipped in (("low", low), ("high", high), ("region", low | high)):
            metrics[f"clip_ratio/{name}_mean"].append(clipped.float().mean())
        metrics["ratio/mean"].append(ratio.mean())
        metrics["ratio/max_deviation"].append(deviation)
        if on_policy:  # before the iteration's first update, so this is what precision alone makes of it
            metrics["ratio/on_policy_max_deviation"].append(deviation)

    @contextlib.contextmanager
    def _no_gradient_sync(self, model: nn.Module) -> Iterator[None]:
        # The flag tells accelerate's backward (DeepSpeed would take an optimizer step), the context tells DDP. Where
        # the Trainer has turned it off already, for gradient accumulation, there is nothing to do.
        state = self.accelerator.gradient_state
        if not state.sync_gradients:
            yield
            return
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    # ---- Rollouts ----

    def _generate_rollout(self, inputs: list[dict[str, Any]], iteration: int) -> _Rollout:
        """Sample, score and compare the images of one iteration: all that is random is a function of its number."""
        args, group = self.args, self.args.num_generations
        rows, images = [row for row in inputs for _ in range(group)], []
        start, size = self.window_schedule.schedule(iteration)
        self.noise_scheduler.set_window(start, size)
        steps = draw_steps(args.seed, iteration, size, args.window_train_fraction)

        def take_in(batch: slice, latents: torch.Tensor) -> None:
            half = torch.autocast(args.device.type, enabled=False)
            with self._phase("decoding"), half, vae_on_device(self.pipe, args):
                images.extend(self.policy.decode(latents, args.decode_batch_size or args.sample_batch_size))
            self.rewards.start(rows[batch], images[batch])

        with self._phase("sampling"):
            conditioning = self.policy.encode([row["prompt"] for row in inputs])
            seeds = self._seeds(iteration, "latents", len(inputs) * (1 if args.shared_noise else group))
            with self.accelerator.autocast():
                trajectory = sample_trajectories(
                    self.policy,
                    self.noise_scheduler,
                    conditioning,
                    self.policy.initial_latents(seeds).float(),  # states in float32: rounding would be noise in ratios
                    num_generations=group,
                    generator=torch.Generator(self.policy.device).manual_seed(self._seeds(iteration, "sde")[0]),
                    batch_size=args.sample_batch_size,
                    transformer=self._inference_model,
                    on_batch=take_in,
                    keep_graph=steps.tolist() if args.reuse_rollout_graph else (),
                    outside_window=self.accelerated_ode,
                )
                reference_means = self._reference_means(trajectory, conditioning, steps) if args.beta > 0 else None
        with self._phase("reward"):
            local_rewards = self.rewards.finish().unflatten(1, (-1, group))
        # Advantages need their own group alone; the metrics, and rewards scaled by the batch, need all devices.
        rewards = self._gather(local_rewards.movedim(1, 0)).movedim(0, 1)
        advantages = compute_advantages(
            rewards, self.reward_weights, args.multi_objective_aggregation, args.scale_rewards, args.advantage_clip
        )
        self._log_rollout(rewards, advantages, trajectory, iteration)
        self._log_images(rows, images, local_rewards.flatten(1))
        errors = self.rewards.all_errors() if bool(rewards.isnan().any()) else {}
        check_failures(rewards, self.reward_names, args.max_reward_failure_rate, errors, iteration)
        own = advantages.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        if args.replay_top_k is not None:
            own = keep_extremes(own, args.replay_top_k)
        order = draw_order(self._seeds(iteration, "order")[0], own.flatten(), args.per_device_train_batch_size)
        return _Rollout(trajectory, conditioning, own.flatten(), order, steps, reference_means)

    def _seeds(self, iteration: int, stream: str, count: int = 1) -> list[int]:
        return draw_seeds(self.args.seed, iteration, stream, self.accelerator.process_index, count)

    @torch.no_grad()
    def _reference_means(self, trajectory: Trajectory, conditioning: Any, steps: torch.Tensor) -> torch.Tensor:
        """Where the reference would have gone from each state: `(B, w, ...)`, 0 at steps that are not trained."""
        means = torch.zeros_like(trajectory.states[:, 1:])
        images, steps = all_transitions(trajectory, steps.to(means.device, non_blocking=True))
        # As many as sampling puts through, which needs no gradient either: so they fit
        size = self.args.replay_batch_size or self.args.sample_batch_size or len(trajectory)
        with self._reference_model() as reference:
            for start in range(0, len(images), size):
                pair = images[start : start + size], steps[start : start + size]
                means[pair] = replay_log_probs(
                    self.policy, self.noise_scheduler, trajectory, conditioning, *pair, reference
                ).means
        return means

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[nn.Module]:
        if self.reference is not None:
            yield self.reference
            return
        self.pipe.transformer.disable_adapters()
        try:
            yield self._inference_model
        finally:
            self.pipe.transformer.enable_adapters()

    @property
    def _inference_model(self) -> nn.Module:
        # What replay calls, without the communication of DDP: the same autocast and hence the same numbers.
        ddp = self.accelerator.num_processes > 1 and not self._sharded
        return self.pipe.transformer if ddp else self.model_wrapped

    # ---- Rewards ----

    def _try_rewards(self) -> None:
        """Call each reward on two grey pictures, so that one that cannot work says so now and not after a rollout."""
        dataset: Any = self.train_dataset
        rows = [dict(dataset[i % len(dataset)]) for i in range(2)]
        size = (self.policy.width, self.policy.height)
        self.rewards.start(rows, [Image.new("RGB", size, "gray") for _ in rows])
        check_failures(self.rewards.finish(), self.reward_names, limit=None, errors=self.rewards.errors)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, on the CPU."""
        return self.accelerator.gather(tensor.to(self.accelerator.device).contiguous()).cpu()

    # ---- Evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Mean rewards of the deterministic sampler. Prompt `i` is always drawn with seed `eval_seed + i`.

        Args:
            eval_dataset (data set or `dict` of data sets, *optional*): Defaults to the trainer's.
            ignore_keys: Unused; part of the Trainer's interface.
            metric_key_prefix (`str`, defaults to `"eval"`): First part of the metrics' names.

        Returns:
            `dict[str, float]`: `eval_reward` (weighted mean over the rewards) and its standard error `eval_reward_se`,
            `eval_rewards/<name>/mean`, `.../std` and `.../failed` for each reward, and `eval_runtime` in seconds.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in eval_dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if eval_dataset is None:
            raise ValueError("`eval_dataset` is None; pass one to `evaluate` or to the trainer.")
        check_dataset("eval_dataset", eval_dataset)
        start = time.perf_counter()
        metrics = reward_statistics(self._evaluate_rewards(eval_dataset), self.reward_names, self.reward_weights)
        metrics["runtime"] = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        super().log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_rewards(self, dataset: Any) -> torch.Tensor:
        """Scores of the pictures of all prompts, `(number of rewards, n)`. Ranks share the prompts, evenly."""
        count, ranks = len(dataset), self.accelerator.num_processes
        share = math.ceil(count / ranks)
        own = range(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        indices = [i % count for i in own]  # the last ranks may repeat some, to run as many passes as the others
        rewards, size = [], self.args.per_device_eval_batch_size
        for start in range(0, share, size):
            rows = [dict(dataset[i]) for i in indices[start : start + size]]
            seeds = [self.args.eval_seed + i for i in indices[start : start + size]]
            images = self.sample_images([row["prompt"] for row in rows], seeds)
            self.rewards.start(rows, images)
            rewards.append(self.rewards.finish())
        return self._gather(torch.cat(rewards, dim=1).movedim(1, 0)).movedim(0, 1)[:, :count]

    @torch.no_grad()
    def sample_images(self, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[Any]:
        """
        Pictures of the present policy by the deterministic sampler, as `evaluate` scores them.

        Args:
            prompts (`Sequence[str]` of length `n`): The prompts.
            seeds (`Sequence[int]` of length `n`, *optional*): Their seeds. Defaults to those of evaluation:
                `eval_seed + i`.

        Returns:
            `list[PIL.Image.Image]` of length `n`: those of the stock pipeline with the same prompts and generators.
        """
        seeds = [self.args.eval_seed + i for i in range(len(prompts))] if seeds is None else seeds
        scheduler, images = make_scheduler(self.pipe, self.args, evaluation=True), []
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(prompts), size):
            conditioning = self.eval_policy.encode(prompts[start : start + size])
            with self.accelerator.autocast():
                latents = self.eval_policy.initial_latents(seeds[start : start + size])
                trajectory = sample_trajectories(
                    self.eval_policy, scheduler, conditioning, latents, transformer=self._inference_model
                )
            with vae_on_device(self.pipe, self.args):
                images += self.eval_policy.decode(trajectory.latents, self.args.decode_batch_size)
        return images

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Overridden to add what was measured since the last time. Tensors stay on their device until here.
        values = {
            name: torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.args.device) for v in series])
            for name, series in sorted(self._metrics.items())
        }
        self._metrics.clear()
        if values:
            largest = torch.tensor([name in MAXIMA for name in values], device=self.args.device)
            means = torch.stack([value.nanmean() for value in values.values()])
            maxima = torch.stack([value.max() for value in values.values()])
            reduced = torch.where(largest, maxima, means)
            if self.accelerator.num_processes > 1:
                everyone = self.accelerator.gather(reduced[None])
                reduced = torch.where(largest, everyone.amax(0), everyone.nanmean(0))
            numbers = zip(values, reduced.tolist(), strict=True)
            logs.update({name: number for name, number in numbers if not math.isnan(number)})
        super().log(logs, start_time)

    def _log_rollout(
        self, rewards: torch.Tensor, advantages: torch.Tensor, trajectory: Trajectory, iteration: int
    ) -> None:
        """Record an iteration's statistics; `rewards` has shape `(number of rewards, P, G)`, over all devices."""
        metrics = reward_statistics(rewards.flatten(1), self.reward_names, self.reward_weights)
        del metrics["reward_se"]
        combined = combine_rewards(rewards, self.reward_weights)
        metrics["reward_std"] = float(scored_std(combined, dims=(-1,)).mean())
        metrics["frac_reward_zero_std"] = float((advantages == 0).all(dim=-1).float().mean())
        start, size = self.window_schedule.schedule(iteration)
        metrics |= {"window/start": start, "window/size": size, "iteration": iteration}
        metrics |= {"nfe": trajectory.nfe, "nfe_amortized": trajectory.nfe_computed}
        for name, value in metrics.items():
            self._metrics[name].append(value)

    def _log_images(self, rows: Sequence[dict[str, Any]], images: Sequence[Any], rewards: torch.Tensor) -> None:
        # In the first iteration at or after each multiple of `logging_images_steps`
        every, step = self.args.logging_images_steps, self.state.global_step
        if every is None or step % every >= self.args.optimizer_steps_per_iteration:
            return
        if self.is_world_process_zero():
            count = min(self.args.num_logged_images, len(images))
            captions = [row["prompt"] for row in rows[:count]]
            for name, scores in zip(self.reward_names, rewards.tolist(), strict=True):
                captions = [f"{text} {name}={scores[i]:.3g}" for i, text in enumerate(captions)]
            columns = self.args.num_generations if self.args.num_generations <= 12 else 8
            path = os.path.join(self.args.output_dir, "images", f"step_{step:06d}.png")
            save_sample_grid(images[:count], captions, path, columns)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `time/<name>`, and to no phase around it, once the device has done its work."""
        start = time.perf_counter()
        self._phases.append(name)
        yield
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        seconds = time.perf_counter() - start
        self._seconds[self._phases.pop()] += seconds
        if self._phases:
            self._seconds[self._phases[-1]] -= seconds

    # ---- Saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Overridden to write what diffusers loads.
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(output_dir, exist_ok=True)
        if self.is_lora:
            save_lora(self.pipe, output_dir, self.adapter_name, state_dict)
        else:
            save_transformer(self.pipe.transformer, output_dir, state_dict)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Overridden to read what `_save` wrote.
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_trained_weights(self.pipe, resume_from_checkpoint, self.is_lora, self.adapter_name)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model_wrapped)

    def _save_after(self, error: BaseException) -> None:
        """Keep what was trained before `error`, as a checkpoint to go on from, and say so in the error."""
        step = self.state.global_step
        if step <= self.first_step or self.optimizer is None:
            return
        # After a RewardError all ranks are here, after another error maybe one, which must not wait for the others.
        if self.accelerator.num_processes > 1 and not isinstance(error, RewardError):
            return
        folder = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self.saved_step != step:
            self._save_checkpoint(self.model_wrapped, trial=None)
        error.add_note(
            f"What was trained so far, {step} optimizer steps, is saved in {folder}; go on from there with "
            f"trainer.train(resume_from_checkpoint={folder!r})."
        )

    # ---- Hub ----

    def create_model_card(  # type: ignore[override]  # further entries are `metadata`
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        **metadata: Any,
    ) -> None:
        """Write `README.md`: what was trained, and code that loads it. The arguments go into its metadata."""
        if not self.is_world_process_zero():
            return
        entries = {"language": language, "license": license, "tags": [tags] if isinstance(tags, str) else tags}
        name = model_name or os.path.basename(os.path.abspath(self.args.output_dir))
        card = mixgrpo_model_card(
            self.args,
            repo_id=self.hub_model_id or self.args.hub_model_id or name,
            base_model=finetuned_from or self.pipe.config.get("_name_or_path"),
            reward_names=self.reward_names,
            is_lora=self.is_lora,
            optimizer_steps=self.state.global_step,
            num_processes=self.accelerator.num_processes,
            prompt=self.train_dataset[0]["prompt"] if self.train_dataset is not None else "a photo",
            metadata={key: value for key, value in (entries | metadata).items() if value},
        )
        card.save(os.path.join(self.args.output_dir, "README.md"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer copies files of its own names from the checkpoint; ours are written anew.
        self._save(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
