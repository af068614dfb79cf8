"""[`MixGRPOConfig`]: the arguments of [`MixGRPOTrainer`]."""

import copy
import dataclasses
import importlib
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available

from . import argument_rules as must_be
from .config_rules import config_rules
from .core.window_schedule import WindowSchedule
from .presets import PAPERS_MODEL, PRESETS
from .scheduling_mixed_ode_sde import MixedODESDEScheduler


# Ends of names whose values are secrets, as of `token` and `api_key`, or may hold some
_SECRETS = re.compile(
    r"(token|key|secret|password|credentials?|authorization|headers|cookies|proxies)$", re.IGNORECASE
)
# Optimizers that can only be built for the model, and their packages
_OPTIMIZERS_OF_MODELS = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "adalomo": "lomo_optim",
}
# Learning rates that follow `metric_for_best_model`
_METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
_QUANTIZATION_KEYS = ("quant_backend", "quant_kwargs", "components_to_quantize")


@dataclass
class MixGRPOConfig(TrainingArguments):
    r"""
    Arguments of [`MixGRPOTrainer`], in addition to those of [`~transformers.TrainingArguments`].

    One *iteration* samples `num_generations` images of each of a few prompts, scores them, and trains on the window of
    stochastic steps. The batch arithmetic is TRL's, with images in the place of completions: an iteration samples
    `per_device_train_batch_size * steps_per_generation` images per device, trains on all of them `num_iterations`
    times, `per_device_train_batch_size` at once, and takes an optimizer step every `gradient_accumulation_steps` of
    these. By default, as in the paper, these are 12 images of one prompt per device, 3 per optimizer step, and 4
    optimizer steps an iteration.

    The defaults differ from the paper in settings that keep what a sweep of the window has gained (docs/sweep.md):
    `sde_type="cps"` with `eta=0.5`, `step_weighting="rectified"`, `scale_rewards="batch"`, and a learning rate that
    decays (`lr_scheduler_type="linear"`). [`from_preset`] has the published settings.

    Args:
        > Arguments of the sampler

        height (`int`, *optional*):
            Height of the training images in pixels. Defaults to the pipeline's own default, such as 1024 of FLUX.1;
            the papers train it at 720.
        width (`int`, *optional*):
            Width of the training images in pixels. Defaults to the pipeline's own default.
        num_inference_steps (`int`, defaults to 25):
            Sampling steps `T`.
        guidance_scale (`float`, *optional*):
            Guidance scale, as in the pipeline's `__call__`, in training and evaluation. Defaults to the pipeline's own
            default, such as 3.5 of FLUX.1. Where it means classifier-free guidance, each step takes two forward
            passes, in the rollout and in training; a value that switches it off (1, of Z-Image 0) saves the second.
        max_sequence_length (`int`, *optional*):
            Text tokens per prompt. Defaults to the pipeline's own default.
        negative_prompt (`str`, *optional*):
            The negative prompt of classifier-free guidance. Defaults to an empty one. Pipelines without it refuse it.
        shift (`float`, *optional*):
            Static timestep shift, in training and evaluation. `None` keeps the times at which the pipeline's own
            scheduler samples (for many models a shift that depends on the image size), so that the policy is
            trained as a stock pipeline will use it. The paper's runs used 3.0.
        sde_type (`str`, defaults to `"cps"`):
            Kind of stochastic step inside the window: `"flow"` (the paper's), `"dance"`, `"cps"` or `"dpm"`.
        eta (`float`, defaults to 0.5):
            Amount of noise inside the window, in [0.01, 3], of `"cps"` in [0.01, 1]: below, float32 would lose the
            noise of small steps; above, the first steps amplify deviations. The paper's `"flow"` has 0.7.
        ode_solver (`str`, defaults to `"euler"`):
            Solver outside the window: `"euler"`, `"dpmsolver++"` or `"unipc"`.
        solver_order (`int`, defaults to 2):
            Order of a higher-order solver.
        prefix_ratio (`float`, defaults to 1.0):
            Share of the steps before the window that are run.
        suffix_ratio (`float`, defaults to 1.0):
            Share of the steps after the window that are run (MixGRPO-Flash: 0.4, Flash*: 0.2).
        shared_noise (`bool`, defaults to `True`):
            Whether the images of a prompt start from the same noise. Then the steps before the window are computed
            once per prompt.
        sample_batch_size (`int`, *optional*):
            Images per forward pass while sampling. `None`: all of an iteration at once.
        ode_cache (`dict`, *optional*):
            One of diffusers' caches for the steps outside the window, by the name of its configuration class and
            the arguments of that class: `{"name": "TaylorSeerCacheConfig", "cache_interval": 2,
            "disable_cache_before_step": 1, "use_lite_mode": true}`. An approximation of the ODE; the window, its
            log-probs, the replay and evaluations do not use it.
        merge_lora (`bool`, defaults to `False`):
            Add the LoRA to copies of the weights for the steps outside the window, instead of computing it beside
            them. Exact up to rounding in the dtype of the weights, so an approximation in bfloat16. While sampling,
            the adapted weights take their memory a second time.
        decode_batch_size (`int`, *optional*):
            Images decoded at once by the VAE. `None`: as `sample_batch_size`.

        > Arguments of the window

        window_strategy (`str`, defaults to `"progressive"`):
            How the window moves with the iterations: `"progressive"`, `"exp_decay"`, `"linear_decay"`, `"random"` or
            `"frozen"`; see [`WindowSchedule`].
        window_size (`int`, defaults to 4):
            Stochastic steps `w`. -1 (or `"all"` in Python) means all steps except the last.
        window_start (`int`, defaults to 0):
            First step of a `"frozen"` window.
        window_interval (`int`, defaults to 25):
            Iterations `tau` that the window stays in one place.
        window_stride (`int`, defaults to 1):
            Steps `s` by which it moves.
        window_decay_rate (`float`, defaults to 0.1):
            `k` of `"exp_decay"`.
        window_decay_start (`int`, defaults to 13):
            `l0` of `"exp_decay"`.
        window_min_interval (`int`, defaults to 1):
            Iterations in the last place of `"linear_decay"`, which starts with `window_interval`.
        window_last_start (`float`, *optional*):
            Last place at which a window may start, as a step or, below 1, as a share of `num_inference_steps`, rounded
            down: 0.5 bounds the window to starts in the first half. `None`: the last legal one,
            `num_inference_steps - 1 - window_size`.
        window_train_fraction (`float`, defaults to 1.0):
            Share of the window's steps that are trained, drawn anew in each iteration (DanceGRPO: 0.6).

        > Arguments of the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function, scaled so that they sum to 1. A reward of weight 0 is only logged. `None`:
            equal weights.
        multi_objective_aggregation (`str`, defaults to `"normalize_then_sum"`):
            `"normalize_then_sum"` normalizes each reward in its group before they are summed, as the paper does, so
            that no reward dominates by its scale; unlike TRL's option of this name the sum is not normalized again.
            `"sum_then_normalize"`, TRL's default, normalizes the weighted sum of the rewards.
        scale_rewards (`str`, defaults to `"batch"`):
            Divide rewards, less the mean of their group, by the standard deviation within the `"group"` (the paper),
            of all images of the iteration (`"batch"`), or not at all (`"none"`). Groups whose rewards hardly differ
            count as much as the others with `"group"`, and little with the other two.
        advantage_clip (`float`, *optional*, defaults to 5.0):
            Advantages are limited to plus and minus this. TRL does not clip them.
        reward_init_kwargs (`dict`, *optional*):
            Arguments of rewards that are given by name: `{"hpsv2": {"version": "v2.0"}}`.
        reward_timeout (`float`, *optional*):
            Seconds that one call of a reward function may take before its images count as not scored.
        offload_rewards (`bool`, defaults to `False`):
            Keep reward models on the CPU while the policy samples and trains.
        max_reward_failure_rate (`float`, defaults to 0.5):
            Save and stop when a reward could not score more than this share of an iteration's images. Below it,
            such images are left out of their group.

        > Arguments of the objective

        num_generations (`int`, defaults to 12):
            Images per prompt `G`, at least 2 (TRL: 8). A prompt's images stay on one device.
        steps_per_generation (`int`, defaults to 4):
            Training batches that the images of one iteration are split into, per device (TRL: as many as
            `gradient_accumulation_steps`).
        num_iterations (`int`, defaults to 1):
            Passes over the images of one iteration.
        epsilon (`float`, defaults to 1e-4):
            Clip range of the ratio `exp(log_prob_new - log_prob_old)`, 0.2 in TRL. Here a log-prob is the *mean* over
            all latent elements of an image, not their sum, so the right value depends on the image size: at 720x720
            the paper's model has 129,600 latent elements, and 1e-4 in the mean is 13 nats in the log-ratio of the
            whole transition. On a toy of 512 elements the same 1e-4 is 0.05 nats, and nearly every step would be
            clipped. For the same trust region, use `13 / number of latent elements`.
        epsilon_high (`float`, *optional*):
            Upper clip range, `epsilon` if `None`.
        loss_type (`str`, defaults to `"grpo"`):
            `"grpo"` clips the ratio (MixGRPO, Flow-GRPO, DanceGRPO); `"grpo_guard"` clips a ratio that is centered and
            has the same scale at all steps; `"dppo"` does not clip, and drops updates that would raise the exact KL
            divergence from the sampling policy where it is above `kl_threshold`. See [`~core.objectives`].
        step_weighting (`str`, defaults to `"rectified"`):
            Weights of the steps' losses, with mean 1 over the steps that are trained: `"none"`, as published;
            `"rectified"`, so that the gradients of all steps are equally large; `"noise"`, the noise of the step. See
            [`~core.step_weights.step_weights`].
        kl_threshold (`float`, defaults to 1e-5):
            Trust region of `loss_type="dppo"`, in nats per latent element. As `epsilon`, it depends on the image size.
        beta (`float`, defaults to 0.0):
            Coefficient of a divergence from the reference model. The reference is the model without its LoRA, or a
            frozen copy in full fine-tuning. 0 needs none.
        kl_type (`str`, defaults to `"transition"`):
            That divergence: `"transition"`, the exact KL divergence of a window step, a mean over latent elements; or
            `"velocity"`, the mean squared difference of the velocities, which weighs all steps alike.
        replay_top_k (`int`, *optional*):
            Replay only the images with the `k` highest and the `k` lowest advantages of each group. An approximation;
            `None` replays all images whose advantage is not 0.
        reuse_rollout_graph (`bool`, defaults to `False`):
            Keep the graph of the window's forward passes during the rollout, so that training costs a backward pass
            only. The gradient is that of a replay. For one update per iteration (`steps_per_generation=1`,
            `num_iterations=1`), and where memory holds the activations of all images and window steps at once.
        replay_batch_size (`int`, *optional*):
            Transitions (one image at one window step) per forward and backward pass in training. Gradients do not
            depend on it, memory does. `None`: all of a training batch at once, and if these do not fit on the
            accelerator half of them, a quarter, ...: each device searches for itself before the first training batch
            of a run. There is no search with FSDP, with DeepSpeed or on a CPU: set it where memory is short.
        max_nonfinite_steps (`int`, defaults to 10):
            Stop after this many optimizer steps in a row whose gradient was infinite or NaN. Such a step is dropped:
            the weights and the optimizer's state stay as they were.
        ema_decay (`float`, *optional*):
            Keep an exponential moving average of the trained weights with this decay, in (0, 1), evaluate it beside
            the trained weights (`eval_ema_reward`, ...), and save it in the folder `ema/`. It takes the memory of the
            trained weights a second time, on the device, and each evaluation runs twice. After `t` optimizer steps
            the decay is at most `t / (9 + t)`, as in diffusers' `EMAModel`, so the first weights are soon forgotten.

        > Arguments of data, evaluation and logging

        shuffle_dataset (`bool`, defaults to `True`):
            Whether prompts come in a random order, a new one in each epoch.
        cache_prompt_embeds (`bool`, defaults to `False`):
            Encode the prompts of the run and of its evaluations beforehand, each alone, and keep them on disk in the
            cache of datasets (`HF_DATASETS_CACHE`): about 4 MB per prompt for 512 tokens of a T5-XXL in bfloat16. The
            text encoders then leave the device; `pipe.to(device)` brings them back after training. A later run with
            the same encoders only encodes new prompts.
        eval_num_inference_steps (`int`, *optional*):
            Sampling steps in evaluation. `None`: as in training.
        eval_height (`int`, *optional*):
            Height in pixels of the images in evaluation and of `sample_images`, with the timestep shift of that size.
            `None`: as in training.
        eval_width (`int`, *optional*):
            Their width.
        eval_seed (`int`, defaults to 0):
            Prompt `i` of the evaluation set is always sampled with seed `eval_seed + i`.
        hacking_guard (`str`, defaults to `"warn"`):
            What to do when the reward rises on held-out prompts while a reward of `eval_reward_funcs` falls or a
            statistic of the images moves, compared with the first evaluation: `"warn"`, `"stop"` the training after
            that evaluation, or `"off"`. See [`~training.hacking_guard.find_alarms`].
        logging_images_steps (`float`, *optional*, defaults to 0.2):
            Interval of sample grids, in optimizer steps or, below 1, as a share of the run. A grid shows the same
            prompts and seeds each time, sampled as in evaluations and scored; it is saved in `output_dir/images` and
            sent to the trackers of `report_to`. The first one is that of the first iteration, the last one that of
            the trained weights. `None`: never.
        num_logged_prompts (`int`, defaults to 4):
            Prompts of a grid: the first ones of the evaluation dataset, or of the training dataset without one.
        num_logged_seeds (`int`, defaults to 2):
            Images of each of these prompts.
        model_init_kwargs (`dict`, *optional*):
            Passed to the pipeline's `from_pretrained` when the trainer is given a path.

        > Arguments of speed and memory, which enable features of diffusers

        attention_backend (`str`, *optional*):
            The transformer's attention backend, by its name in diffusers: `"flash"`, `"sage"`, `"_native_cudnn"`, ...
            `None` keeps the current one.
        compile_repeated_blocks (`bool`, defaults to `False`):
            Compile the transformer's repeated blocks with `torch.compile`. The `torch_compile` of
            [`~transformers.TrainingArguments`] does not work here.
        quantization (`dict`, *optional*):
            Load models of the pipeline with quantized weights, to train a LoRA on them. `"quant_backend"`,
            `"quant_kwargs"` and `"components_to_quantize"` as in diffusers' `PipelineQuantizationConfig`:
            `{"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": true, "bnb_4bit_quant_type":
            "nf4", "bnb_4bit_compute_dtype": "bfloat16"}, "components_to_quantize": ["transformer"]}`.
            The `"quant_type"` of torchao is the name of one of its configuration classes, such as
            `"Int8WeightOnlyConfig"`, or the output of its `config_to_dict`.
        offload_vae (`bool`, defaults to `False`):
            Keep the VAE on the CPU except while it decodes. It stays there after training; `pipe.to(device)` brings
            it back.

    > [!NOTE]
    > Defaults that differ from [`~transformers.TrainingArguments`]:
    > - as in TRL: `logging_steps=10`, `remove_unused_columns=False` (other columns go to the rewards);
    > - `dataloader_pin_memory=False`, since batches are prompts;
    > - `metric_for_best_model="reward"` where there are evaluations, so that `save_total_limit` keeps the best
    >   checkpoint by the reward on held-out prompts;
    > - from the paper: `learning_rate=1e-5` (of full fine-tuning; LoRAs usually take 1e-4 to 3e-4),
    >   `weight_decay=1e-4`, `per_device_train_batch_size=3`;
    > - `bf16` is on where the GPU supports it and `fp16` is off; `output_dir="mixgrpo"`.

    Raises:
        `ValueError`: If a value, including those of [`~transformers.TrainingArguments`], has a wrong type or is out of
            range, or if values do not fit together. The message names the argument.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "reward_init_kwargs",
        "ode_cache",
        "quantization",
    ]

    # Defaults that differ from TrainingArguments
    output_dir: str = field(default="mixgrpo", metadata={"help": "Where checkpoints, weights and images are saved."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "The learning rate scheduler."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(default=3, metadata={"help": "Images per device and training batch."})
    logging_steps: float = field(default=10, metadata={"help": "Log at this interval of optimizer steps."})
    dataloader_pin_memory: bool = field(
        default=False, metadata={"help": "Pin the memory of batches. They are prompts, which have none to pin."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: other columns than 'prompt' go to the reward functions."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # resolved in __post_init__
        default=None, metadata={"help": "bfloat16 autocast. If not set, on where the GPU supports it and fp16 is off."}
    )

    # The sampler
    height: int | None = field(
        default=None,
        metadata={"help": "Height of the training images in pixels. The pipeline's own default if unset."},
    )
    width: int | None = field(
        default=None, metadata={"help": "Width of the training images in pixels. The pipeline's own default if unset."}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Sampling steps T."})
    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Guidance scale, as in the pipeline's `__call__`. If not set, the pipeline's own default."},
    )
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Text tokens per prompt. If not set, the pipeline's own default."}
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "Negative prompt of classifier-free guidance. An empty one if not set."}
    )
    shift: float | None = field(
        default=None,
        metadata={"help": "Static timestep shift (the paper's runs: 3). If not set, the pipeline's own schedule."},
    )
    sde_type: str = field(default="cps", metadata={"help": "Stochastic step: flow, dance, cps or dpm."})
    eta: float = field(default=0.5, metadata={"help": "Amount of noise inside the window."})
    ode_solver: str = field(default="euler", metadata={"help": "Outside the window: euler, dpmsolver++ or unipc."})
    solver_order: int = field(default=2, metadata={"help": "Order of a higher-order solver."})
    prefix_ratio: float = field(default=1.0, metadata={"help": "Share of the steps before the window to run."})
    suffix_ratio: float = field(default=1.0, metadata={"help": "Share of the steps after the window to run."})
    shared_noise: bool = field(default=True, metadata={"help": "All images of a prompt start from the same noise."})
    sample_batch_size: int | None = field(default=None, metadata={"help": "Images per forward pass while sampling."})
    ode_cache: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'A cache of diffusers outside the window: {"name": "FirstBlockCacheConfig", "threshold": 0.1}.'
        },
    )
    merge_lora: bool = field(
        default=False, metadata={"help": "Merge the LoRA into copies of the weights outside the window."}
    )
    decode_batch_size: int | None = field(default=None, metadata={"help": "Images decoded by the VAE at once."})

    # The window
    window_strategy: str = field(
        default="progressive",
        metadata={"help": "How the window moves: progressive, exp_decay, linear_decay, random or frozen."},
    )
    window_size: int = field(default=4, metadata={"help": "Stochastic steps; -1 for all except the last."})
    window_start: int = field(default=0, metadata={"help": "First step of a frozen window."})
    window_interval: int = field(default=25, metadata={"help": "Iterations that the window stays in one place."})
    window_stride: int = field(default=1, metadata={"help": "Steps by which the window moves."})
    window_decay_rate: float = field(default=0.1, metadata={"help": "k of exp_decay."})
    window_decay_start: int = field(default=13, metadata={"help": "l0 of exp_decay."})
    window_min_interval: int = field(default=1, metadata={"help": "Iterations in the last place of linear_decay."})
    window_last_start: float | None = field(
        default=None, metadata={"help": "Last start of the window: a step, or a share of the steps below 1."}
    )
    window_train_fraction: float = field(default=1.0, metadata={"help": "Share of the window's steps trained."})

    # The rewards
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward function."})
    multi_objective_aggregation: str = field(
        default="normalize_then_sum",
        metadata={"help": "Several rewards: normalize_then_sum (as the paper) or sum_then_normalize."},
    )
    scale_rewards: str = field(default="batch", metadata={"help": "Scale rewards by the std of: group, batch, none."})
    advantage_clip: float | None = field(default=5.0, metadata={"help": "Limit of the advantages."})
    reward_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Arguments of rewards given by name, as JSON: {"hpsv2": {"version": "v2.0"}}.'},
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that one call of a reward may take."}
    )
    offload_rewards: bool = field(
        default=False, metadata={"help": "Keep reward models on the CPU between iterations."}
    )
    max_reward_failure_rate: float = field(
        default=0.5, metadata={"help": "Stop when a reward fails on more than this share of an iteration's images."}
    )

    # The objective
    num_generations: int = field(default=12, metadata={"help": "Images per prompt."})
    steps_per_generation: int = field(default=4, metadata={"help": "Training batches per iteration and device."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over the images of one iteration."})
    epsilon: float = field(
        default=1e-4,
        metadata={"help": "Clip range of the ratio of mean log-probs per latent element; about 13 / latent elements."},
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range; epsilon if not set."})
    loss_type: str = field(default="grpo", metadata={"help": "The objective: grpo, grpo_guard or dppo."})
    step_weighting: str = field(
        default="rectified", metadata={"help": "Weights of the steps' losses: none, rectified or noise."}
    )
    kl_threshold: float = field(default=1e-5, metadata={"help": "Trust region of dppo, in nats per latent element."})
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the KL divergence from the reference model."})
    kl_type: str = field(
        default="transition", metadata={"help": "Divergence from the reference: of the transition or the velocity."}
    )
    replay_top_k: int | None = field(
        default=None, metadata={"help": "Replay only the k highest and k lowest advantages of each group."}
    )
    reuse_rollout_graph: bool = field(
        default=False, metadata={"help": "Train on the rollout's own graph: one update per iteration, no replay."}
    )
    replay_batch_size: int | None = field(
        default=None, metadata={"help": "Transitions per forward pass in training. If not set, as many as fit."}
    )
    max_nonfinite_steps: int = field(
        default=10, metadata={"help": "Stop after this many steps in a row whose gradient was infinite or NaN."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Keep, evaluate and save a moving average of the trained weights."}
    )

    # Data, evaluation and logging
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether prompts come in a random order."})
    cache_prompt_embeds: bool = field(
        default=False,
        metadata={"help": "Encode the prompts beforehand, on disk, and take the text encoders off the device."},
    )
    eval_num_inference_steps: int | None = field(default=None, metadata={"help": "Sampling steps in evaluation."})
    eval_height: int | None = field(default=None, metadata={"help": "Height of the images in evaluation."})
    eval_width: int | None = field(default=None, metadata={"help": "Width of the images in evaluation."})
    eval_seed: int = field(default=0, metadata={"help": "Evaluation prompt i is sampled with seed eval_seed + i."})
    hacking_guard: str = field(
        default="warn",
        metadata={"help": "When evaluations look as if the reward was exploited: warn, stop or off."},
    )
    logging_images_steps: float | None = field(
        default=0.2, metadata={"help": "Interval of sample grids: optimizer steps, or a share of the run below 1."}
    )
    num_logged_prompts: int = field(default=4, metadata={"help": "Prompts of a sample grid."})
    num_logged_seeds: int = field(default=2, metadata={"help": "Images of each prompt of a sample grid."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Passed to the pipeline's from_pretrained, as JSON."}
    )

    # Speed and memory
    attention_backend: str | None = field(
        default=None, metadata={"help": "An attention backend of diffusers: flash, sage, _native_cudnn, ..."}
    )
    compile_repeated_blocks: bool = field(
        default=False, metadata={"help": "Compile the transformer's repeated blocks."}
    )
    quantization: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Quantized weights under a LoRA, as JSON with 'quant_backend', 'quant_kwargs' and "
            "'components_to_quantize'."
        },
    )
    offload_vae: bool = field(default=False, metadata={"help": "Keep the VAE on the CPU except while it decodes."})

    def __post_init__(self) -> None:
        if isinstance(self.window_size, str) and self.window_size == "all":
            self.window_size = -1
        must_be.check_fields(self, config_rules(type(self)))  # type: ignore[arg-type]  # a class is hashable
        self._of_papers_model: tuple[str, ...] = ()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        # PyTorch's optimizers refuse a pair of an int and a float.
        self.adam_beta1 = float(self.adam_beta1)
        self.adam_beta2 = float(self.adam_beta2)
        if isinstance(self.accelerator_config, dict):
            known = [field.name for field in dataclasses.fields(AcceleratorConfig)]
            must_be.check_names(self.accelerator_config, known, "a key of `accelerator_config`")
        needs_metric = self.load_best_model_at_end or self.save_strategy == "best"
        needs_metric = (
            needs_metric or self.eval_strategy != "no"
        )  # so that `save_total_limit` keeps the best checkpoint
        needs_metric = needs_metric or self.lr_scheduler_type in _METRIC_SCHEDULES
        if needs_metric and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"  # the Trainer's own fallback, the loss, is meaningless here
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # each trained weight contributes to each velocity
        if self.lr_scheduler_type in _METRIC_SCHEDULES and self.eval_strategy == "no":
            raise ValueError(
                f"`eval_strategy` must be 'steps' or 'epoch' with lr_scheduler_type={self.lr_scheduler_type!s}, which "
                "follows a metric of evaluations, got 'no'. Set it, or choose another `lr_scheduler_type`."
            )
        super().__post_init__()
        if self.lr_scheduler_type in _METRIC_SCHEDULES:
            mode = "max" if self.greater_is_better else "min"  # theirs is "min", for a loss
            self.lr_scheduler_kwargs = {"mode": mode} | (self.lr_scheduler_kwargs or {})  # type: ignore[operator]
        # With ZeRO-3 transformers would shard all models that are loaded from here on. But text encoders and rewards
        # run outside DeepSpeed's engine and stay whole, and the engine itself shards the transformer.
        unset_hf_deepspeed_config()
        self._validate_window()
        MixedODESDEScheduler(**self.scheduler_arguments())  # checks `eta` with `sde_type`, ...
        self.ode_cache_config()
        self._validate_combinations()
        self._validate_training_arguments()
        self._validate_speed_and_memory()
        self._validate_batch_arithmetic()
        if self.deepspeed is None:  # whose configuration may have its own
            self._try_optimizer()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MixGRPOConfig":
        """
        The configuration of a published method, for full fine-tuning of the papers' model at 720x720.

        With a pipeline of another family, the trainer takes the image size, the shift and the guidance of that
        pipeline.

        All share the setting of the comparison in the MixGRPO paper (arXiv 2507.21802, and its released scripts): 25
        steps, static shift 3, guidance 3.5, groups of 12 images, 4 optimizer steps an iteration for 300 iterations,
        AdamW at 1e-5 with weight decay 1e-4, gradient norm 1, clip range 1e-4, advantages up to 5. They differ in:

        | preset | stochastic steps | trained | source |
        |---|---|---|---|
        | `"mixgrpo"` | 4, progressive, 25 iterations in a place | all of them | MixGRPO |
        | `"mixgrpo-flash"` | 4, progressive, 20 iterations; 40% of the steps after, DPM-Solver++ | all | MixGRPO |
        | `"mixgrpo-flash-star"` | the first 4; 20% of the steps after, DPM-Solver++ | all | MixGRPO |
        | `"flow-grpo"` | all except the last, `flow`, eta 0.7 | all | Flow-GRPO (2505.05470) |
        | `"dancegrpo"` | all except the last, `dance`, eta 0.3 | a random 60% each time | DanceGRPO (2505.07818) |

        Args:
            name (`str`): One of the five.
            overrides: Other arguments of [`MixGRPOConfig`], and those that should differ from the published ones.

        Raises:
            `ValueError`: If there is no such preset, or no such argument.
        """
        must_be.check("name", name, must_be.choice(PRESETS))
        fields = [field.name for field in dataclasses.fields(cls) if field.init]
        must_be.check_names(overrides, fields, f"an argument of {cls.__name__}")
        config = cls(**(PRESETS[name] | overrides))
        config._of_papers_model = tuple(argument for argument in PAPERS_MODEL if argument not in overrides)
        return config

    def for_other_models(self) -> "MixGRPOConfig":
        """
        A copy in which the pipeline decides what [`from_preset`] has set for the papers' model alone: image size,
        shift and guidance.

        Values that were passed to [`from_preset`], or changed since, stay.
        """
        config = copy.copy(self)
        for argument in self._of_papers_model:
            if getattr(self, argument) == PAPERS_MODEL[argument]:
                setattr(config, argument, None)
        return config

    @property
    def batches_per_iteration(self) -> int:
        """Training batches (calls of `training_step`) in one iteration."""
        return self.steps_per_generation * self.num_iterations

    @property
    def optimizer_steps_per_iteration(self) -> int:
        return self.batches_per_iteration // self.gradient_accumulation_steps

    @property
    def prompts_per_iteration(self) -> int:
        """Prompts per device and iteration."""
        return self.per_device_train_batch_size * self.steps_per_generation // self.num_generations

    @property
    def sharding(self) -> str | None:
        """`"FSDP"` or `"DeepSpeed"`, if the arguments or `accelerate launch` ask for it."""
        if self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            return "FSDP"
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            return "DeepSpeed"
        return None

    @property
    def fsdp_version(self) -> int:
        """The version of FSDP that the arguments or `accelerate launch` ask for."""
        if self.fsdp:
            return int(self.fsdp_plugin_args["fsdp_version"])
        return int(os.environ.get("FSDP_VERSION", "1"))  # accelerate's default

    def window_schedule(self) -> WindowSchedule:
        """The window's place as a function of the iteration."""
        last = self.num_inference_steps - 1
        return WindowSchedule(
            strategy=self.window_strategy,  # type: ignore[arg-type]  # checked there
            num_inference_steps=self.num_inference_steps,
            window_size=last - self.window_start if self.window_size == -1 else self.window_size,
            window_interval=self.window_interval,
            window_stride=self.window_stride,
            seed=self.seed,
            start=self.window_start,
            decay_rate=self.window_decay_rate,
            decay_start=self.window_decay_start,
            min_interval=self.window_min_interval,
            last=self._last_start(),
        )

    def _last_start(self) -> int | None:
        bound = self.window_last_start
        if bound is None:
            return None
        legal = 0 if self.window_size == -1 else self.num_inference_steps - 1 - self.window_size
        return min(legal, int(bound * self.num_inference_steps)) if 0 < bound < 1 else int(bound)

    def scheduler_arguments(self) -> dict[str, Any]:
        """The arguments of [`MixedODESDEScheduler`] in training, with the window of the first iteration."""
        window = self.window_schedule().schedule(0)
        return {
            "sde_type": self.sde_type,
            "eta": self.eta,
            "ode_solver": self.ode_solver,
            "solver_order": self.solver_order,
            "prefix_ratio": self.prefix_ratio,
            "suffix_ratio": self.suffix_ratio,
            "window_start": window.start,
            "window_size": window.size,
        }

    def ode_cache_config(self) -> Any:
        """
        The cache configuration of diffusers that `ode_cache` describes, or `None`.

        Raises:
            `ValueError`: If there is no such class, or it does not take these arguments.
        """
        if self.ode_cache is None:
            return None
        settings = self.ode_cache if isinstance(self.ode_cache, dict) else {}
        names = [name for name in dir(diffusers) if name.endswith("CacheConfig")]
        if settings.get("name") not in names:
            raise ValueError(
                f"`ode_cache` must be a dict, or JSON of one, with a 'name' among {', '.join(names)}, got "
                f'{self.ode_cache!r}. For example {{"name": "TaylorSeerCacheConfig", "cache_interval": 2, '
                '"disable_cache_before_step": 1, "use_lite_mode": true}.'
            )
        cls = getattr(diffusers, settings["name"])
        try:
            cache = cls(**{name: value for name, value in settings.items() if name != "name"})
            must_be.check_fields(cache, must_be.rules_of(cls))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`ode_cache` must hold arguments of {settings['name']}, got {must_be.shown(settings)}: {error}"
            ) from error
        if getattr(cache, "cache_interval", 1) < 1:
            raise ValueError(f"`ode_cache` must have a cache_interval of 1 or more, got {must_be.shown(settings)}.")
        return cache

    # ---- Secrets: pickles (`training_args.bin`), logs and reports are shared, so they hold none ----

    def __getstate__(self) -> dict[str, Any]:
        return without_secrets(self.__dict__)

    def __copy__(self) -> "MixGRPOConfig":
        return self._with_state(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MixGRPOConfig":
        return self._with_state(copy.deepcopy(self.__dict__, memo))

    def without_secrets(self) -> "MixGRPOConfig":
        """A copy in which secrets are `None`, for reports that read the arguments themselves."""
        return self._with_state(self.__getstate__())

    def to_dict(self) -> dict[str, Any]:
        return super(MixGRPOConfig, self.without_secrets()).to_dict()

    def __str__(self) -> str:
        return super(MixGRPOConfig, self.without_secrets()).__str__()

    __repr__ = __str__

    def _with_state(self, state: dict[str, Any]) -> "MixGRPOConfig":
        other = object.__new__(type(self))
        other.__dict__.update(state)
        return other

    def _validate_window(self) -> None:
        last = self.num_inference_steps - 1
        size = last - self.window_start if self.window_size == -1 else self.window_size
        if self.window_start < 0 or size < 1 or self.window_start + size > last:
            raise ValueError(
                f"`window_start` and `window_size` must lie within the first {last} of "
                f"num_inference_steps={self.num_inference_steps} steps, got window_start={self.window_start} and "
                f"window_size={self.window_size}: noise of the last step would stay in the image. Choose window_size "
                f"in [1, {max(1, last - max(0, self.window_start))}], or -1 for all steps except the last, or more "
                "num_inference_steps."
            )
        if self.window_start > 0 and self.window_strategy != "frozen":
            raise ValueError(
                f"`window_start` must be 0 with window_strategy={self.window_strategy!r}, which moves the window, got "
                f"{self.window_start}. Use window_strategy='frozen' for a window that stays there."
            )
        legal = 0 if self.window_size == -1 else last - self.window_size
        if self.window_last_start is not None and (self._last_start() or 0) > legal:
            raise ValueError(
                f"`window_last_start` must be at most {legal} with num_inference_steps={self.num_inference_steps} and "
                f"window_size={self.window_size}, got {self.window_last_start}: later windows would hold the last "
                "step. Use a smaller one, or None for all places."
            )
        if self.window_last_start is not None and self.window_start > (self._last_start() or 0):
            raise ValueError(
                f"`window_start` must be at most window_last_start={self.window_last_start}, got {self.window_start}."
                " Change one of them."
            )
        if self.window_strategy == "linear_decay" and self.window_min_interval > self.window_interval:
            raise ValueError(
                f"`window_min_interval` must be at most window_interval={self.window_interval}, got "
                f"{self.window_min_interval}. The window's stay falls from window_interval to window_min_interval."
            )

    def _validate_combinations(self) -> None:
        if self.beta > 0 and (self.replay_top_k is not None or self.reuse_rollout_graph):
            name = "replay_top_k" if self.replay_top_k is not None else "reuse_rollout_graph"
            raise ValueError(
                f"`{name}` must be at its default with a KL term, since it leaves out forward passes that the KL term "
                f"needs, got beta={self.beta}. Use beta=0, or leave out `{name}`."
            )
        for name in ("reuse_rollout_graph", "merge_lora"):
            if getattr(self, name) and self.sharding is not None:
                raise ValueError(
                    f"`{name}` must be False with {self.sharding}, which gathers the weights anew for each forward "
                    "pass, got True. Leave it at its default, or train without sharding."
                )
        if self.ema_decay is not None and self.sharding is not None:
            raise ValueError(
                f"`ema_decay` must be None with {self.sharding}, which spreads the weights over processes, got "
                f"{self.ema_decay}. Leave it out, or train without sharding."
            )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("`fp16` must be False on a CPU, which has no kernels for it, got True. Use `bf16`.")
        if self.dataloader_num_workers == 0:
            for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
                if value := getattr(self, name, None):
                    raise ValueError(
                        f"`{name}` must be at its default with dataloader_num_workers=0, got {value!r}. Leave it out, "
                        "or set `dataloader_num_workers` to 1 or more."
                    )
        if self.metric_for_best_model is not None and "reward" not in self.metric_for_best_model:
            raise ValueError(
                "`metric_for_best_model` must be a metric of the evaluation, which has no loss, got "
                f"{self.metric_for_best_model!r}. Use 'reward', or 'rewards/<name>/mean' for one of several."
            )
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if metric.startswith("ema_reward") and self.ema_decay is None:
            raise ValueError(
                "`metric_for_best_model` must be a metric of the trained weights without `ema_decay`, got "
                f"{self.metric_for_best_model!r}. Set `ema_decay`, or use {metric.removeprefix('ema_')!r}."
            )

    def _validate_training_arguments(self) -> None:
        """Refuse what the Trainer would take and this training would pass over, or fail on later."""
        # Where transformers has both names, it gives both the same value.
        checkpointing = self.gradient_checkpointing_kwargs
        if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs` (or `activation_checkpointing_kwargs`) must have "
                "use_reentrant=False, since the reentrant kind gives no gradient where a block's inputs need none, as "
                f"with a LoRA, got {must_be.shown(checkpointing)}. Leave it out."
            )
        for name in ("split_batches", "dispatch_batches"):
            if value := getattr(self.accelerator_config, name):
                raise ValueError(
                    f"`accelerator_config` must leave {name} at its default, since each process takes whole groups of "
                    f"its own prompts, got {name}={value!r}. Leave it out."
                )
        is_of_model = str(getattr(self.optim, "value", self.optim)).startswith(tuple(_OPTIMIZERS_OF_MODELS))
        if self.optim_target_modules is not None and not is_of_model:
            raise ValueError(
                "`optim_target_modules` must be None with an optimizer that does not project gradients, got "
                f"{must_be.shown(self.optim_target_modules)} with optim={self.optim!s}. For the layers of a LoRA use "
                "`target_modules` of the `peft_config`."
            )

    def _validate_speed_and_memory(self) -> None:
        if self.attention_backend is not None:
            try:
                _check_attention_backend_requirements(AttentionBackendName(self.attention_backend.lower()))
            except RuntimeError as error:
                raise ValueError(
                    "`attention_backend` must be one whose package is installed, got "
                    f"{self.attention_backend!r}: {error}"
                ) from error
        if isinstance(self.reward_init_kwargs, dict):
            for name, kwargs in self.reward_init_kwargs.items():
                if not isinstance(kwargs, dict):
                    raise ValueError(
                        "`reward_init_kwargs` must hold a dict for each reward, got "
                        f'{must_be.shown(kwargs)} for {name!r}. For example {{"hpsv2": {{"version": "v2.0"}}}}.'
                    )
        if self.quantization is not None:
            settings = self.quantization if isinstance(self.quantization, dict) else {}
            is_complete = settings.get("quant_backend") and settings.get("components_to_quantize")
            if not is_complete or set(settings) - set(_QUANTIZATION_KEYS):
                raise ValueError(
                    "`quantization` must be a dict, or JSON of one, with 'quant_backend' and "
                    f"'components_to_quantize', and optionally 'quant_kwargs', got {self.quantization!r}."
                )

    def _validate_batch_arithmetic(self) -> None:
        images = self.per_device_train_batch_size * self.steps_per_generation
        if images % self.num_generations:
            raise ValueError(
                "`num_generations` must divide the images of an iteration on a device, per_device_train_batch_size * "
                f"steps_per_generation = {self.per_device_train_batch_size} * {self.steps_per_generation} = {images}, "
                f"since a prompt's images stay on one device, got {self.num_generations}. Change one of the three "
                f"numbers, for example num_generations={images if images > 1 else 2}."
            )
        if self.batches_per_iteration % self.gradient_accumulation_steps:
            raise ValueError(
                "`gradient_accumulation_steps` must divide the training batches of an iteration, steps_per_generation "
                f"* num_iterations = {self.steps_per_generation} * {self.num_iterations} = "
                f"{self.batches_per_iteration}, or an optimizer step would mix two iterations, got "
                f"{self.gradient_accumulation_steps}. Use gradient_accumulation_steps={self.batches_per_iteration} "
                "for one optimizer step per iteration, or another divisor."
            )
        if self.reuse_rollout_graph and self.batches_per_iteration > 1:
            raise ValueError(
                "`reuse_rollout_graph` must be False with several updates per iteration, since the rollout's graph "
                f"holds for one, got steps_per_generation={self.steps_per_generation} and num_iterations="
                f"{self.num_iterations}. Set both to 1, and per_device_train_batch_size={images} for as many images."
            )
        steps = self.optimizer_steps_per_iteration
        if self.max_steps > 0 and self.max_steps % steps:
            near = [count * steps for count in (self.max_steps // steps, self.max_steps // steps + 1) if count]
            raise ValueError(
                f"`max_steps` must be a multiple of {steps}, the optimizer steps of an iteration of "
                f"steps_per_generation={self.steps_per_generation}, num_iterations={self.num_iterations} and "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}, got {self.max_steps}. Use "
                f"{' or '.join(map(str, near))}."
            )

    def _try_optimizer(self) -> None:
        """Build the optimizer and its schedule for two numbers, and take a step, to find what cannot work."""
        weights = torch.nn.Parameter(torch.ones(2))
        optimizer: torch.optim.Optimizer = torch.optim.SGD([weights], lr=self.learning_rate)
        try:
            name = str(getattr(self.optim, "value", self.optim))
            package = next((value for key, value in _OPTIMIZERS_OF_MODELS.items() if name.startswith(key)), None)
            if package is not None:
                importlib.import_module(package)
            else:
                optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(self)
                optimizer = optimizer_class([weights], **kwargs)
        except Exception as error:
            raise ValueError(
                "`optim` must be an installed optimizer that takes the `optim_args`, got "
                f"{name!r} with optim_args={self.optim_args!r}: {error}. Change one of them."
            ) from error
        steps = max(self.max_steps, 10)
        try:
            schedule = get_scheduler(
                self.lr_scheduler_type,
                optimizer,
                num_warmup_steps=self.get_warmup_steps(steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=self.lr_scheduler_kwargs or None,  # type: ignore[arg-type]  # parsed
            )
            factors = [factor(step) for factor in getattr(schedule, "lr_lambdas", []) for step in (0, 1, steps // 2)]
            if not all(map(math.isfinite, factors)):
                raise ValueError("the learning rate would not be finite")
        except Exception as error:
            raise ValueError(
                "`lr_scheduler_kwargs` must hold what the `lr_scheduler_type` needs, got "
                f"{must_be.shown(self.lr_scheduler_kwargs)} for {self.lr_scheduler_type!s}: {error}. Change it."
            ) from error
        if type(optimizer).__module__.startswith("torch.optim"):  # others may need a GPU
            # A LoRA begins with gradients of 0.
            weights.grad = torch.tensor([0.0, 1.0])
            optimizer.step()
            if not weights.isfinite().all():
                raise ValueError(
                    "`optim_args`, `learning_rate` and `weight_decay` must leave the weights finite, got "
                    f"{self.optim_args!r}, {self.learning_rate} and {self.weight_decay}. Choose smaller values."
                )


def without_secrets(value: Any, is_secret: bool = False) -> Any:
    """
    A copy of nested `dict`s, `list`s and `tuple`s in which strings are `None` where their names say that they are
    secret, as `token`, `hub_token` and `api_key`. Without a token the login is used.
    """
    if isinstance(value, dict):
        return {k: without_secrets(v, is_secret or bool(_SECRETS.search(str(k)))) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_secrets(item, is_secret) for item in value)
    return None if is_secret and isinstance(value, str | bytes) else value
