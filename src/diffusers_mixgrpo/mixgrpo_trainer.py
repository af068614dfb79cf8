"""[`MixGRPOTrainer`]: online reinforcement learning of a flow-matching pipeline on a sliding window of steps."""

import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .core.advantages import normalize_weights
from .mixgrpo_config import MixGRPOConfig
from .policies import PAPERS_PIPELINE, policy_class
from .policies.adapters import check_peft_config
from .policies.base import require_multiple
from .policies.loading import check_source, load_pipeline
from .policies.preparation import check_prepared, place_components, prepare_pipeline, rename_gradient_checkpointing
from .policies.prompt_embeds import Prompt, cache_prompts
from .reports.logged_run import HISTORY_NAME, LoggedRun, read_run
from .reports.model_card import mixgrpo_model_card
from .reports.run_folder import RunFolder, run_facts, save_samples
from .reports.sample_grid import draw_samples
from .reports.trackers import prepare_trackers, send_samples
from .rewards import load_reward
from .rewards.runner import RewardFunc, RewardRunner, reward_names
from .training.callbacks import IterationCallback, RewardProgressCallback
from .training.checkpoints import ROLLOUT_NAME
from .training.datasets import ImagePrompts, check_dataset, evaluations, open_evaluations, open_images
from .training.ema import EMAWeights
from .training.engine import Engine, Rollout, TrainingBatch, make_scheduler
from .training.evaluation import Evaluation, Evaluator
from .training.faults import FaultBoard, RankError
from .training.hacking_guard import HackingGuard
from .training.hub import HubTrainer, repository_of
from .training.interruptions import Interruptions, StopOnAllRanks
from .training.memory import find_pass_size
from .training.metrics import MetricBuffer, by_place
from .training.nonfinite import NonFiniteSteps, gradient_norm
from .training.plan import IterationPlan, PromptDataset, PromptSampler, Row, indices_of_run, prompts_of_run
from .training.preflight import preflight
from .training.preflight_report import PreflightReport
from .training.samples import Sample, SampleGroup, Samples, are_due, extreme_groups, fixed_rows, sample_fixed
from .training.saving import ON_ALL_RANKS
from .training.sharding import check_launch, use_autocast_in_deepspeed


logger = logging.get_logger(__name__)


class MixGRPOTrainer(HubTrainer):
    """
    Trainer for MixGRPO (https://arxiv.org/abs/2507.21802): a [`~transformers.Trainer`] of a pipeline's transformer.

    Each iteration samples groups of images, scores them with the reward functions, and trains the policy's window of
    stochastic steps towards the better images of each group. See [`MixGRPOConfig`] for the batch sizes.

    Args:
        model ([`~diffusers.DiffusionPipeline`] or `str` or `os.PathLike`):
            The pipeline, or the folder or Hub repository to load it from. Its transformer is trained in place; its
            other models are frozen.
        reward_funcs (callable or `str`, or a `list` of these):
            `reward(prompts, images, **columns) -> list[float | None]`, called once per iteration with all images (PIL)
            and the other columns of the dataset, one entry per image. `None` means that an image could not be scored:
            it is left out of its group. An `async` function is called as soon as there are images, and runs while the
            next ones are sampled. One that names them in its signature also gets TRL's `trainer_state`,
            `log_metric(name, value)` and `log_extra` (see [`~rewards.runner.RewardRunner`]). The name in the logs is
            the function's `__name__`. A `str` is a name, a path or a Hub id as in [`~rewards.load_reward`].
        args ([`MixGRPOConfig`], *optional*):
            The configuration.
        train_dataset (`datasets.Dataset` or any sized, indexable collection of `dict`):
            Rows with a `"prompt"`. A pipeline that edits images needs an `"image"` in each row, a PIL image or its
            path; rewards then get the PIL images as `image`.
        eval_dataset (the same, or a `dict` of them by name, *optional*):
            Prompts for [`evaluate`].
        peft_config ([`~peft.LoraConfig`], *optional*):
            Train this LoRA instead of the transformer's own weights. Without `target_modules` it adapts the layers
            that suit the pipeline's family. A LoRA that is loaded in the pipeline is trained further.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            As in [`~transformers.Trainer`].
        optimizers (`tuple`, *optional*):
            An optimizer and a learning rate scheduler, as in [`~transformers.Trainer`].
        eval_reward_funcs (callable or `str`, or a `list` of these, *optional*):
            Rewards that are never trained on, as `reward_funcs`. They score the same images in evaluations and are not
            part of `eval_reward`. Higher must be better: one that falls while `eval_reward` rises is an alarm, see
            [`MixGRPOConfig.hacking_guard`].

    Attributes:
        engine ([`~training.engine.Engine`]): Samples, scores and trains the images of an iteration.
        evaluator ([`~training.evaluation.Evaluator`]): Samples and scores the images of evaluations.
        ema ([`~training.ema.EMAWeights`], *optional*): With `ema_decay`, the moving average of the trained weights.
        eval_rewards (`torch.Tensor` of shape `(K, n)`, *optional*): The `K` trained rewards of each of the `n` prompts
            in the last evaluation of the trained weights, NaN where an image could not be scored.

    Raises:
        `ValueError`, `TypeError`, `FileNotFoundError`: If an argument cannot work; the message says how to fix it.

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
    train_dataset: PromptDataset | None
    eval_dataset: PromptDataset | dict[str, PromptDataset] | None

    def __init__(
        self,
        model: DiffusionPipeline | str | os.PathLike,
        reward_funcs: RewardFunc | str | list[RewardFunc | str],
        args: MixGRPOConfig | None = None,
        train_dataset: PromptDataset | None = None,
        eval_dataset: PromptDataset | dict[str, PromptDataset] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        eval_reward_funcs: RewardFunc | str | list[RewardFunc | str] | None = None,
    ) -> None:
        # 1. Refuse what cannot work, before anything large is loaded
        args = MixGRPOConfig() if args is None else args
        funcs = _as_list(reward_funcs)
        eval_funcs = [] if eval_reward_funcs is None else _as_list(eval_reward_funcs)
        _check_arguments(args, model, funcs, eval_funcs, peft_config)
        _check_evaluation(args, eval_dataset)
        check_dataset("train_dataset", train_dataset)
        for name, part in evaluations(eval_dataset).items():
            check_dataset(name, part)
        is_first = args.process_index == 0
        self._opened = repository_of(args).open() if args.push_to_hub and is_first else None
        family = check_source(model, args, peft_config)
        if family.takes_image:
            pipeline = family.pipeline_class.__name__
            if train_dataset is not None:
                train_dataset = open_images("train_dataset", train_dataset, pipeline)
            eval_dataset = open_evaluations(eval_dataset, pipeline)

        # 2. The rewards
        kwargs = args.reward_init_kwargs if isinstance(args.reward_init_kwargs, dict) else {}
        self.reward_funcs, self.eval_reward_funcs = (
            [load_reward(f, **kwargs.get(f, {})) if isinstance(f, str) else f for f in given]
            for given in (funcs, eval_funcs)
        )
        # The Trainer replaces its state when training begins.
        settings = args.reward_timeout, args.device, args.offload_rewards, lambda: self.state
        rewards = RewardRunner(self.reward_funcs, *settings)
        eval_rewards = RewardRunner(self.eval_reward_funcs, *settings) if eval_funcs else None
        eval_names = eval_rewards.names if eval_rewards is not None else []
        _check_names(rewards.names, eval_names)
        if args.eval_strategy != "no":
            _check_metric(args, eval_dataset, [*rewards.names, *eval_names])

        # 3. The pipeline, whose transformer is the model to train
        self.pipe = load_pipeline(model, args, with_lora=peft_config is not None)
        if type(self.pipe).__name__ != PAPERS_PIPELINE:
            args = args.for_other_models()
        policy = policy_class(type(self.pipe).__name__)(
            self.pipe,
            height=args.height,
            width=args.width,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            max_sequence_length=args.max_sequence_length,
            negative_prompt=args.negative_prompt,
        )
        for name, size in (("eval_height", args.eval_height), ("eval_width", args.eval_width)):
            if size is not None:
                require_multiple(name, size, policy.size_multiple)
        scheduler = make_scheduler(self.pipe.scheduler, args)
        set_seed(args.seed)  # the Trainer's own call comes after the LoRA has drawn its weights
        self.weights = prepare_pipeline(policy, peft_config, args)
        if args.merge_lora and not self.weights.is_lora:
            raise ValueError(_MERGE_NEEDS_LORA)
        rename_gradient_checkpointing(self.pipe.transformer)

        # 4. Everything else is the Trainer's
        use_autocast_in_deepspeed(args)
        super().__init__(
            model=self.pipe.transformer,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # a batch is a list of rows
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.engine = Engine(policy, scheduler, args, rewards, self.accelerator, self.weights)
        self.evaluator = Evaluator(self.engine, eval_rewards)
        self.metrics = MetricBuffer(self.accelerator, args.device)
        self.ema: EMAWeights | None = None
        if args.ema_decay is not None:
            self.ema = EMAWeights(self.engine.trained_parameters, args.ema_decay)
            self.add_callback(self.ema)
        self.interruptions = Interruptions()
        self._iteration_callback = IterationCallback(self.interruptions)
        self.add_callback(self._iteration_callback)
        if args.hacking_guard != "off":
            self.add_callback(HackingGuard)
        prepare_trackers(self.callback_handler.callbacks, self.pipe.transformer, args)
        eval_names = eval_rewards.names if eval_rewards is not None else []
        facts = run_facts(
            policy,
            args,
            self.weights,
            rewards.names,
            self.engine.reward_weights.tolist(),
            eval_names,
            self.accelerator.num_processes,
        )
        self.add_callback(RunFolder(args.output_dir, facts))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RewardProgressCallback)
        place_components(self.pipe, args, stay=policy.text_encoders if args.cache_prompt_embeds else ())
        self._fixed_rows, self._fixed_seeds = self._rows_to_look_at()
        if args.cache_prompt_embeds:
            parts = [*evaluations(eval_dataset).values(), self._fixed_rows]
            prompts: Sequence[Prompt]
            if policy.takes_image:
                prompts = self._prompts_with_images(parts)
            else:
                prompts = prompts_of_run(args, train_dataset, parts, self.accelerator.num_processes)
            # Of several processes on a machine the first one encodes, and the others read its files.
            with args.main_process_first(desc="encoding the prompts"), self.engine.vae_on_device():
                self.engine.encode = cache_prompts(policy, prompts, args.device).encode
        self.rollout: Rollout | None = None
        self.eval_rewards: torch.Tensor | None = None
        self._batches_done: int | None = None
        self._pass_size: int | None = None
        self._nonfinite_steps = NonFiniteSteps(args.max_nonfinite_steps)
        self._resumed_from: str | None = None

    # ---- Data ----

    def _prompts_with_images(self, parts: Sequence[PromptDataset]) -> ImagePrompts:
        """As [`~training.plan.prompts_of_run`], with the images to edit."""
        places = []
        if (dataset := self.train_dataset) is not None:
            needed = indices_of_run(self.args, len(dataset), self.accelerator.num_processes)
            places += [(dataset, i, self.engine.policy.fit_image) for i in needed]
        places += [(part, i, self.evaluator.policy.fit_image) for part in parts for i in range(len(part))]
        return ImagePrompts(places)

    def get_train_dataloader(self) -> DataLoader:
        # Overridden since a batch is the prompts of an iteration, not the images of a training batch.
        if self.train_dataset is None:
            raise ValueError("`train_dataset` must have rows with a 'prompt', got None.")
        return self._get_dataloader(
            dataset=self.train_dataset,  # type: ignore[arg-type]
            description="Training",
            batch_size=self.args.prompts_per_iteration,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        # Overridden since the prompts of an iteration come once per training batch, see PromptSampler.
        assert self.train_dataset is not None
        self._iteration_callback.sampler = PromptSampler.of_run(
            self.args,
            len(self.train_dataset),
            self.accelerator.num_processes,
            repeats=self.args.batches_per_iteration,
        )
        return self._iteration_callback.sampler

    # ---- Training ----

    def preflight(self) -> PreflightReport:
        """
        What the run will do and cost, measured on its first iteration and without a trace: see
        [`~training.preflight.preflight`].
        """
        if self.train_dataset is None:
            raise ValueError("`train_dataset` must have rows with a 'prompt', got None.")
        return preflight(self.engine, self.train_dataset, self.optimizer)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        # Overridden to try the rewards first, to resume from whole checkpoints, and to lose nothing when training ends
        # with an error or a signal.
        check_prepared(self.pipe.transformer, self.weights)
        self._forget_iteration()
        self._faults = FaultBoard()
        with self.interruptions:
            try:
                if self.train_dataset is not None:
                    self.state.max_steps = self._count_steps(len(self.train_dataset))  # which rewards may look at
                    self.engine.try_rewards(self.train_dataset)
                    self.evaluator.try_rewards(self.train_dataset)
                self._resumed_from = self._find_checkpoint(resume_from_checkpoint)
                return super().train(self._resumed_from, trial, ignore_keys_for_eval)
            except BaseException as error:
                with self.interruptions.dropped():
                    if self.ema is not None:
                        self.ema.restore()
                    others = None
                    if not isinstance(error, ON_ALL_RANKS):
                        others = self._faults.report(error, f"after {self.state.global_step} optimizer steps")
                    self._save_after(error)
                if others is not None and isinstance(error, Exception):
                    raise RankError(others) from error
                raise

    def _count_steps(self, num_prompts: int) -> int:
        """The optimizer steps of the run, as the Trainer will count them."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        sampler = PromptSampler.of_run(self.args, num_prompts, self.accelerator.num_processes, repeats=1)
        steps_per_epoch = len(sampler) // sampler.prompts_per_iteration * self.args.optimizer_steps_per_iteration
        return math.ceil(self.args.num_train_epochs * steps_per_epoch)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Overridden since the Trainer takes a step before it looks whether the run is finished already.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        is_last = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        if is_last and self.args.logging_images_steps is not None:
            self._log_images(self._sample_fixed(), groups=[])

    def _forget_iteration(self) -> None:
        """Drop everything of an earlier run, which may have been interrupted."""
        self.rollout = None
        self._batches_done = None
        self._pass_size = None
        self._nonfinite_steps = NonFiniteSteps(self.args.max_nonfinite_steps)
        self._iteration_callback.reset()
        self.evaluator.clear()
        self.engine.timer.pop()
        self.metrics.clear()

    def training_step(  # type: ignore[override]  # the inputs are rows, not tensors
        self, model: nn.Module, inputs: list[Row], num_items_in_batch: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        # Overridden since one call samples when an iteration begins, and may run several backward passes. The model's
        # train and eval modes are the same here: all dropout is off, or the ratio would not start at 1.
        args = self.args
        self._stop_if_asked()
        if self._batches_done is None:
            self._batches_done = self.state.global_step * args.gradient_accumulation_steps
        iteration, batch = divmod(self._batches_done, args.batches_per_iteration)
        if self.rollout is None or batch == 0:
            self.rollout = None  # frees its memory before the next one needs it
            self.rollout = self._roll_out(self.engine.plan(iteration, inputs), is_resuming=batch != 0)
        if callable(switch_to_training := getattr(self.optimizer, "train", None)):
            switch_to_training()  # schedule-free optimizers have two modes

        batches = self.rollout.training_batches(args.per_device_train_batch_size)
        images = batches[batch % args.steps_per_generation]
        if self._pass_size is None:
            self._pass_size = find_pass_size(self.engine, self.rollout, images, self.optimizer)
        trained = self.engine.backward(
            self.rollout, images, model, self._pass_size, self.current_gradient_accumulation_steps
        )
        plan = self.rollout.plan
        for training_pass in trained.passes:
            self.metrics.add(training_pass.statistics)
            self.metrics.add(by_place({"clip_ratio": training_pass.statistics["clip_ratio/region_mean"]}, plan))
            if batch < args.gradient_accumulation_steps:
                # Before the iteration's first update, so this is the effect of precision alone.
                deviation = training_pass.statistics["ratio/max_deviation"]
                self.metrics.add({"ratio/on_policy_max_deviation": deviation})
        if self.accelerator.sync_gradients:
            self._look_at_gradient(self.rollout, trained)
        self._batches_done += 1
        if batch == args.batches_per_iteration - 1:
            self.metrics.add({f"time/{phase}": seconds for phase, seconds in self.engine.timer.pop().items()})
        return trained.loss

    def _stop_if_asked(self) -> None:
        """Raise the exception of a signal that came during the optimizer step, on all ranks of a sharded run."""
        self._release_signals()
        if not self.engine.is_sharded:
            return
        if bool(self.engine.gather(torch.tensor([self.interruptions.is_pending])).any()):
            raise StopOnAllRanks(128 + signal.SIGTERM)
        self.interruptions.hold()

    def _roll_out(self, plan: IterationPlan, is_resuming: bool) -> Rollout:
        """Sample and log the images of an iteration, or go on with those of an interrupted one."""
        if is_resuming and (restored := self._restore_rollout(plan)) is not None:
            return restored
        # Before the rollout, which may hold the activations of its forward passes until it is trained on
        is_due = are_due(self.args, self.state.global_step, self.state.max_steps)
        fixed = self._sample_fixed() if is_due else []
        rollout = self.engine.roll_out(plan, self._inference_model)
        if is_due:
            self._log_images(fixed, extreme_groups(self.engine, rollout))
        self.metrics.add(rollout.statistics)
        self.metrics.add(by_place({"reward_std": rollout.statistics["reward_std"]}, plan))
        if count := int(rollout.statistics["nonfinite/images"]):
            logger.warning(
                f"Step {self.state.global_step}: {count} images of iteration {plan.iteration} were infinite or NaN "
                f"and are left out. Prompts on this process: {plan.prompts}."
            )
        return rollout

    def _restore_rollout(self, plan: IterationPlan) -> Rollout | None:
        """The rollout of an interrupted iteration, if each rank has its own."""
        path = os.path.join(self._resumed_from or "", ROLLOUT_NAME.format(rank=self.args.process_index))
        restored = None
        if self._resumed_from is not None and os.path.isfile(path):
            restored = self.engine.restore(plan, torch.load(path, map_location="cpu", weights_only=True))
        if not self.engine.gather(torch.tensor([restored is not None])).all():
            logger.warning(
                f"Step {self.state.global_step}: resuming inside iteration {plan.iteration} without its images, which "
                "are sampled again with other weights."
            )
            return None
        return restored

    def _look_at_gradient(self, rollout: Rollout, trained: TrainingBatch) -> None:
        """
        Log the gradient's norm before clipping, and leave the weights alone where it is infinite or NaN.

        All ranks see the same gradient.
        """
        norm = gradient_norm(self.engine.trained_parameters)
        finite = norm is None or math.isfinite(norm)
        if finite and norm is not None:
            scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
            self.metrics.add(by_place({"grad_norm": norm / scale}, rollout.plan))
        if not finite:
            images = torch.cat([p.images[~p.losses.isfinite().cpu()] for p in trained.passes]).unique()
            prompts = sorted({rollout.rows[i]["prompt"] for i in images.tolist()})
            cause = f"losses of the prompts {prompts}" if prompts else "finite losses on this process"
            logger.warning(
                f"Step {self.state.global_step}: the gradient was infinite or NaN, from {cause}. The optimizer step "
                "is dropped."
            )
            if self.accelerator.scaler is None:  # a scaler drops the step itself, and lowers its scale
                for parameter in self.engine.trained_parameters:
                    parameter.grad = None
        self.metrics.add({"nonfinite/steps": float(not finite)})
        has_images = rollout.statistics.get("nonfinite/images") != len(rollout.trajectory) * self.args.world_size
        self._nonfinite_steps.count(finite and has_images, self.state.global_step)

    @property
    def _inference_model(self) -> nn.Module:
        # The module in training, without the communication of DDP: the same autocast and hence the same numbers.
        is_ddp = self.accelerator.num_processes > 1 and not self.engine.is_sharded
        return self.pipe.transformer if is_ddp else self.model_wrapped

    # ---- Evaluation ----

    def evaluate(  # type: ignore[override]  # any indexable collection will do
        self,
        eval_dataset: PromptDataset | dict[str, PromptDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Mean rewards of the deterministic sampler. Prompt `i` is always sampled with seed `eval_seed + i`. With
        `ema_decay` the moving average of the weights is evaluated too, on the same prompts and seeds.

        Args:
            eval_dataset (dataset or `dict` of datasets, *optional*): Defaults to the trainer's.
            ignore_keys: Unused; part of the Trainer's interface.
            metric_key_prefix (`str`, defaults to `"eval"`): First part of the metrics' names.

        Returns:
            `dict[str, float]`: `eval_reward` (weighted mean over the rewards) and its standard error `eval_reward_se`,
            `eval_rewards/<name>/mean`, `.../std` and `.../failed` for each reward, means of the image statistics
            `eval_images/<name>` (see [`~training.image_statistics`]), and `eval_runtime` in seconds. Those of the
            moving average are `eval_ema_reward`, .... `eval_nonfinite/images` counts images that were infinite or NaN,
            which are left out. For the trainer's own datasets `eval_alarms`, the number of
            alarms of `hacking_guard`. Of a `dict` of datasets, those of each with its name (`eval_<dataset>_reward`),
            and the mean of `eval_reward` and of `eval_ema_reward` over the datasets.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in eval_dataset.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            for reward in ("reward", "ema_reward"):  # metrics of the best checkpoint
                names = [f"{metric_key_prefix}_{name}_{reward}" for name in eval_dataset]
                means = [metrics[name] for name in names if name in metrics]
                if means:
                    metrics[f"{metric_key_prefix}_{reward}"] = sum(means) / len(means)
            return metrics
        if eval_dataset is None:
            raise ValueError(
                "`eval_dataset` must have rows with a 'prompt', got None. Pass it here or to the trainer."
            )
        check_dataset("eval_dataset", eval_dataset)
        is_own = any(eval_dataset is part for part in evaluations(self.eval_dataset).values())
        if self.engine.policy.takes_image and not is_own:
            eval_dataset = open_images("eval_dataset", eval_dataset, type(self.pipe).__name__)
        self._release_signals()
        evaluation, metrics = self._evaluate_weights(eval_dataset)
        self.eval_rewards = evaluation.rewards
        if self.ema is not None:
            with self.ema.applied():
                _, averaged = self._evaluate_weights(eval_dataset)
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
        if is_own and (guard := self._hacking_guard) is not None:
            metrics["alarms"] = len(guard.judge(metric_key_prefix, evaluation.series, self.args, self.state))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        super().log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_weights(self, dataset: PromptDataset) -> tuple[Evaluation, dict[str, float]]:
        """An evaluation of the weights that the model has now, and what to log about it."""
        start = time.perf_counter()
        evaluation = self.evaluator.evaluate(dataset, self._inference_model)
        return evaluation, evaluation.statistics | {"runtime": time.perf_counter() - start}

    @property
    def _hacking_guard(self) -> HackingGuard | None:
        # Looked up anew, since the Trainer may replace callbacks when it resumes.
        return next((part for part in self.callback_handler.callbacks if isinstance(part, HackingGuard)), None)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Overridden so that an evaluation that stops the run does not take the place of the best one before it.
        if self.args.hacking_guard == "stop" and any(metrics[name] for name in metrics if name.endswith("_alarms")):
            return False
        return super()._determine_best_metric(metrics, trial)

    def sample_images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        images: Sequence[Image.Image] | None = None,
    ) -> list[Image.Image]:
        """
        Images of the current policy by the deterministic sampler, as `evaluate` scores them.

        Args:
            prompts (`Sequence[str]` of length `n`): The prompts.
            seeds (`Sequence[int]` of length `n`, *optional*): Their seeds. Defaults to those of evaluation:
                `eval_seed + i`.
            images (`Sequence[PIL.Image.Image]` of length `n`, *optional*): The images to edit, for pipelines that do.

        Returns:
            `list[PIL.Image.Image]` of length `n`: those of the stock pipeline with the same prompts and generators.
        """
        seeds = [self.args.eval_seed + i for i in range(len(prompts))] if seeds is None else seeds
        return self.evaluator.sample_images(prompts, seeds, self._inference_model, images=images)

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not part of this trainer, whose model predicts velocities: see [`sample_images`] and [`evaluate`]."""
        raise NotImplementedError(
            "`predict` is not part of this trainer, whose model predicts velocities. Use "
            "trainer.sample_images(prompts) for images, or trainer.evaluate(dataset) for their rewards."
        )

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not part of this trainer, which trains the pipeline that it was given: make a trainer per trial."""
        raise NotImplementedError(
            "`hyperparameter_search` is not part of this trainer, which trains the pipeline that it was given. Make a "
            "trainer with a new pipeline for each setting, for example in the objective of an optuna study, and "
            "compare trainer.evaluate()['eval_reward'] after trainer.train()."
        )

    # ---- Logging ----

    @property
    def reward_names(self) -> list[str]:
        return self.engine.rewards.names

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Overridden to add the metrics since the last log.
        logs.update(self.metrics.pop())
        super().log(logs, start_time)

    def _rows_to_look_at(self) -> tuple[list[Row], list[int]]:
        """The rows and seeds of sample grids, from the first evaluation dataset or else the training dataset."""
        parts = [*evaluations(self.eval_dataset).values(), self.train_dataset]
        dataset = next((part for part in parts if part is not None), None)
        if dataset is None or self.args.logging_images_steps is None:
            return [], []
        return fixed_rows(self.args, dataset)

    def _sample_fixed(self) -> list[Sample]:
        """Images of the fixed prompts and seeds by the current policy. All ranks take part."""
        return sample_fixed(self.evaluator, self._fixed_rows, self._fixed_seeds, self._inference_model)

    def _log_images(self, fixed: list[Sample], groups: list[SampleGroup]) -> None:
        """Draw, save and send what there is to see at this step."""
        if not self.is_world_process_zero():
            return
        step = self.state.global_step
        samples = Samples(step, self.state.max_steps, fixed, self.args.num_logged_seeds, groups)
        grid = draw_samples(samples)
        try:
            save_samples(samples, grid, self.args.output_dir)
        except OSError as error:  # such as a full disk: no reason to lose the run
            logger.warning(f"The images of step {step} could not be written to {self.args.output_dir}: {error}")
        send_samples(self.callback_handler.callbacks, samples, grid)

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
        """Write `README.md`: the training run, and code that loads its result. The arguments go into its metadata."""
        if not self.is_world_process_zero():
            return
        entries = {"language": language, "license": license, "tags": [tags] if isinstance(tags, str) else tags}
        name = model_name or os.path.basename(os.path.abspath(self.args.output_dir))
        card = mixgrpo_model_card(
            self.engine.policy,
            self.args,
            repo_id=self.hub_model_id or self.args.hub_model_id or name,
            base_model=finetuned_from or self.pipe.config.get("_name_or_path"),
            reward_weights=dict(zip(self.reward_names, self.engine.reward_weights.tolist(), strict=True)),
            is_lora=self.weights.is_lora,
            optimizer_steps=self.state.global_step,
            num_processes=self.accelerator.num_processes,
            prompt=self.train_dataset[0]["prompt"] if self.train_dataset is not None else "a photo",
            metadata={key: value for key, value in (entries | metadata).items() if value},
            eval_reward_names=[] if self.evaluator.rewards is None else self.evaluator.rewards.names,
            run=self._logged_run(),
            num_eval_prompts=self._num_eval_prompts(),
        )
        card.save(os.path.join(self.args.output_dir, "README.md"))

    def _num_eval_prompts(self) -> int | dict[str, int] | None:
        """The number of held-out prompts, or that of each dataset."""
        datasets = self.eval_dataset
        if isinstance(datasets, dict):
            return {name: len(dataset) for name, dataset in datasets.items()}
        return None if datasets is None else len(datasets)

    def _logged_run(self) -> LoggedRun | None:
        """What is logged in `output_dir`, if it is of this run."""
        folder = Path(self.args.output_dir)
        if not (folder / HISTORY_NAME).is_file():
            return None
        run = read_run(folder)
        return run if run.last_step == self.state.global_step > 0 else None


_MERGE_NEEDS_LORA = "`merge_lora` must be False without a LoRA, got True. Pass a `peft_config`, or leave it False."


def _as_list(reward_funcs: RewardFunc | str | list[RewardFunc | str]) -> list[RewardFunc | str]:
    return list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]


def _check_names(trained: Sequence[str], others: Sequence[str]) -> None:
    """Refuse a name of two rewards, which would be one in the logs."""
    if common := [name for name in others if name in trained]:
        raise ValueError(
            f"`eval_reward_funcs` must have other names than `reward_funcs`, got {', '.join(common)} in both. Remove "
            "it from one of them, or give a function another `__name__`."
        )


def _check_evaluation(args: MixGRPOConfig, eval_dataset: PromptDataset | dict[str, PromptDataset] | None) -> None:
    """Refuse evaluations without prompts."""
    if eval_dataset is not None:
        return
    for name, default in (("eval_strategy", "no"), ("eval_on_start", False)):
        if (value := getattr(args, name)) != default:
            raise ValueError(
                f"`{name}` must be {default!r} without an `eval_dataset`, got {value!r}. Pass prompts to evaluate, or "
                "leave it out."
            )


def _check_metric(
    args: MixGRPOConfig, eval_dataset: PromptDataset | dict[str, PromptDataset] | None, names: Sequence[str]
) -> None:
    """Refuse a metric that no evaluation with rewards of these names has."""
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    known = ["reward", *(f"rewards/{name}/mean" for name in names)]
    known = list(dict.fromkeys(["reward", *(prefix + metric for prefix in prefixes for metric in known)]))
    metric = (args.metric_for_best_model or "reward").removeprefix("eval_")
    own = next((prefix for prefix in prefixes if metric.startswith(f"{prefix}ema_")), "")
    if args.ema_decay is not None:
        metric = own + metric.removeprefix(own).removeprefix("ema_")
    if metric not in known:
        raise ValueError(
            f"`metric_for_best_model` must be one of {', '.join(known)}, got {args.metric_for_best_model!r}, which no "
            "evaluation has. Change it, or leave it out for 'reward'."
        )


def _check_arguments(
    args: MixGRPOConfig,
    model: DiffusionPipeline | str | os.PathLike,
    reward_funcs: Sequence[RewardFunc | str],
    eval_reward_funcs: Sequence[RewardFunc | str],
    peft_config: PeftConfig | None,
) -> None:
    """Refuse arguments that cannot work together."""
    if not reward_funcs:
        raise ValueError(
            "`reward_funcs` must have at least one reward, got an empty list. Pass a function "
            "`reward(prompts, images, **columns) -> list[float | None]`, or a name such as 'hpsv2'."
        )
    check_launch(args)
    if peft_config is not None:
        check_peft_config(peft_config)
    if args.n_gpu > 1:
        raise ValueError(
            f"One process must see one GPU, got {args.n_gpu}, which torch's DataParallel would share. Start one "
            "process per GPU (`accelerate launch script.py`), or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if args.merge_lora and peft_config is None and isinstance(model, (str, os.PathLike)):
        raise ValueError(_MERGE_NEEDS_LORA)
    if isinstance(args.reward_init_kwargs, dict):
        known = [*reward_funcs, *eval_reward_funcs]
        if unknown := [name for name in args.reward_init_kwargs if name not in known]:
            raise ValueError(
                f"`reward_init_kwargs` must be for rewards among `reward_funcs` and `eval_reward_funcs`, {known}, got "
                f"{', '.join(unknown)}."
            )
    normalize_weights(args.reward_weights, len(reward_funcs))  # checks their number
    trained, others = (
        [name for f in funcs for name in ([f] if isinstance(f, str) else reward_names([f], argument))]
        for funcs, argument in ((reward_funcs, "reward_funcs"), (eval_reward_funcs, "eval_reward_funcs"))
    )
    _check_names(trained, others)
