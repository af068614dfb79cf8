"""[`MixGRPOConfig`]: everything that [`MixGRPOTrainer`] can be told, with the paper's values as defaults."""

from dataclasses import dataclass, field
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from .advantages import AGGREGATIONS, SCALINGS
from .presets import PRESETS
from .window_schedule import WindowSchedule


@dataclass
class MixGRPOConfig(TrainingArguments):
    r"""
    Arguments of [`MixGRPOTrainer`], beside those of [`~transformers.TrainingArguments`].

    One *iteration* samples `num_generations` images of each of a few prompts, scores them, and trains on the window of
    stochastic steps. The batch arithmetic is TRL's, with images in the place of completions: an iteration samples
    `per_device_train_batch_size * steps_per_generation` images per device, trains on all of them `num_iterations`
    times, `per_device_train_batch_size` at once, and takes an optimizer step every `gradient_accumulation_steps` of
    these. The defaults are the paper's setting: 12 images of one prompt per device, 3 per optimizer step, 4 optimizer
    steps an iteration.

    Args:
        > Arguments of the sampler

        height (`int`, defaults to 720):
            Height of the training pictures in pixels.
        width (`int`, defaults to 720):
            Width of the training pictures in pixels.
        num_inference_steps (`int`, defaults to 25):
            Sampling steps `T`.
        guidance_scale (`float`, defaults to 3.5):
            Guidance given to the transformer.
        max_sequence_length (`int`, defaults to 512):
            T5 tokens per prompt.
        shift (`float`, *optional*):
            Static timestep shift, in training and evaluation. `None` keeps the times at which the pipeline's own
            scheduler samples (for FLUX.1-dev a shift that depends on the picture's size), so that the policy is
            trained as a stock pipeline will use it. The paper's runs used 3.0.
        sde_type (`str`, defaults to `"flow"`):
            Kind of stochastic step inside the window: `"flow"`, `"dance"`, `"cps"` or `"dpm"`.
        eta (`float`, defaults to 0.7):
            Amount of noise inside the window.
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
            One of diffusers' caches for the steps outside the window, by the name of its configuration and the
            arguments of that: `{"name": "TaylorSeerCacheConfig", "cache_interval": 2, "disable_cache_before_step": 1,
            "use_lite_mode": true}`. An approximation of the ODE; the window, its log-probs, the replay and
            evaluations never see it.
        merge_lora (`bool`, defaults to `False`):
            Add the LoRA to copies of the weights for the steps outside the window, instead of computing it beside
            them. Exact up to rounding in the dtype of the weights, so in bfloat16 an approximation. Takes the memory
            of the adapted weights a second time while sampling.
        decode_batch_size (`int`, *optional*):
            Images decoded at once by the VAE. `None`: as `sample_batch_size`.

        > Arguments of the window

        window_strategy (`str`, defaults to `"progressive"`):
            How the window moves with the iterations: `"progressive"`, `"exp_decay"`, `"linear_decay"`, `"random"` or
            `"frozen"`; see [`WindowSchedule`].
        window_size (`int`, defaults to 4):
            Stochastic steps `w`. -1 (or `"all"` in Python) stands for all steps but the last.
        window_start (`int`, defaults to 0):
            Where a `"frozen"` window is.
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
        window_train_fraction (`float`, defaults to 1.0):
            Share of the window's steps that are trained, drawn anew in each iteration (DanceGRPO: 0.6).

        > Arguments of the rewards

        reward_weights (`list[float]`, *optional*):
            Weight of each reward function, scaled so that they sum to 1. A reward of weight 0 is only logged. `None`:
            equal weights.
        multi_objective_aggregation (`str`, defaults to `"normalize_then_sum"`):
            `"normalize_then_sum"` normalises each reward in its group before they are summed, as the paper does, so
            that no reward dominates by its scale; unlike TRL's option of this name the sum is not normalised again.
            `"sum_then_normalize"`, TRL's default, normalises the weighted sum of the rewards.
        scale_rewards (`str`, defaults to `"group"`):
            Divide by the standard deviation within the `"group"`, over the whole `"batch"`, or not at all (`"none"`).
        advantage_clip (`float`, *optional*, defaults to 5.0):
            Advantages are limited to plus and minus this. TRL does not clip them.
        reward_init_kwargs (`dict`, *optional*):
            Arguments of rewards that the trainer is given by name: `{"hpsv2": {"version": "v2.0"}}`.
        reward_timeout (`float`, *optional*):
            Seconds that one call of a reward function may take before its images count as not scored.
        offload_rewards (`bool`, defaults to `False`):
            Keep reward models on the CPU while the policy samples and trains.
        max_reward_failure_rate (`float`, defaults to 0.5):
            Stop, with what was trained saved, when a reward could not score more than this share of an iteration's
            images. Up to there such images are left out of their group.

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
            all latent elements of a picture, not their sum, so the number depends on the size of the picture: at
            720x720 on FLUX there are 129,600 of them, and 1e-4 in the mean is 13 nats in the log-ratio of the whole
            transition. On a toy of 512 elements the same 1e-4 is 0.05 nats, and nearly every step would be clipped.
            For the same trust region elsewhere take `13 / number of latent elements`.
        epsilon_high (`float`, *optional*):
            Upper clip range, `epsilon` if `None`.
        beta (`float`, defaults to 0.0):
            Coefficient of the exact KL divergence of a window step from the reference model, also a mean over latent
            elements. The reference is the model without its LoRA, or a frozen copy in full fine-tuning. 0 needs none.
        replay_top_k (`int`, *optional*):
            Replay only the `k` highest and the `k` lowest advantages of each group. An approximation; `None` replays
            all whose advantage is not 0.
        reuse_rollout_graph (`bool`, defaults to `False`):
            Keep the graph of the window's forward passes during the rollout, so that training costs a backward pass
            only. The gradient is that of a replay. For one update per iteration (`steps_per_generation=1`,
            `num_iterations=1`), and where memory holds the activations of all images and window steps at once.
        replay_batch_size (`int`, *optional*):
            Transitions (one image at one window step) per forward and backward pass in training. Gradients do not
            depend on it, memory does. `None`: all of a training batch at once, and if these do not fit on the
            accelerator half of them, a quarter, ...: tried out before the first training batch of a run, by each
            device for itself. With FSDP, DeepSpeed or on a CPU nothing is tried out: set it where memory is short.

        > Arguments of data, evaluation and logging

        shuffle_dataset (`bool`, defaults to `True`):
            Whether prompts come in a random order, another one in each epoch.
        cache_prompt_embeds (`bool`, defaults to `False`):
            Encode the prompts of the run and of its evaluations beforehand, each alone, and keep them on disk in the
            cache of datasets (`HF_DATASETS_CACHE`): about 4 MB per prompt for FLUX with 512 tokens in bfloat16. The
            text encoders then leave the device; `pipe.to(device)` brings them back after training. A later run with
            the same encoders encodes only prompts that are new.
        eval_num_inference_steps (`int`, *optional*):
            Sampling steps in evaluation. `None`: as in training.
        eval_seed (`int`, defaults to 0):
            Prompt number `i` of the evaluation set is always drawn with seed `eval_seed + i`.
        logging_images_steps (`int`, *optional*):
            Save a picture grid of the samples with their rewards every so many optimizer steps, in
            `output_dir/images`. `None`: never.
        num_logged_images (`int`, defaults to 16):
            Pictures in such a grid.
        model_init_kwargs (`dict`, *optional*):
            Passed to `FluxPipeline.from_pretrained` when the trainer is given a path.

        > Arguments of speed and memory, which reach what diffusers has

        attention_backend (`str`, *optional*):
            How the transformer computes attention, by diffusers' name: `"flash"`, `"sage"`, `"_native_cudnn"`, ...
            `None` leaves it as it is.
        compile_repeated_blocks (`bool`, defaults to `False`):
            Compile the transformer's blocks with `torch.compile`, one of each kind. The `torch_compile` of
            [`~transformers.TrainingArguments`] does not work here.
        quantization (`dict`, *optional*):
            Load parts of the pipeline with quantised weights, for training a LoRA on them. `"quant_backend"`,
            `"quant_kwargs"` and `"components_to_quantize"` as in diffusers' `PipelineQuantizationConfig`:
            `{"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": true, "bnb_4bit_quant_type":
            "nf4", "bnb_4bit_compute_dtype": "bfloat16"}, "components_to_quantize": ["transformer"]}`.
            The `"quant_type"` of torchao is the name of a configuration of its own, `"Int8WeightOnlyConfig"`, or what
            its `config_to_dict` gives.
        offload_vae (`bool`, defaults to `False`):
            Keep the VAE on the CPU while nothing is decoded. It stays there after training; `pipe.to(device)` brings
            it back.

    > [!NOTE]
    > Defaults that differ from [`~transformers.TrainingArguments`]:
    > - as in TRL: `logging_steps=10`, `remove_unused_columns=False` (other columns go to the rewards);
    > - from the paper: `learning_rate=1e-5` (of full fine-tuning; LoRAs usually take 1e-4 to 3e-4),
    >   `lr_scheduler_type="constant"`, `weight_decay=1e-4`, `per_device_train_batch_size=3`;
    > - `bf16` is on where the GPU can do it and `fp16` is off; `output_dir="mixgrpo"`.

    Raises:
        `ValueError`: If a value is out of its range or the batch arithmetic does not work out.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "reward_init_kwargs",
        "ode_cache",
        "quantization",
    ]

    # Defaults that differ from TrainingArguments
    output_dir: str = field(default="mixgrpo", metadata={"help": "Where checkpoints, weights and pictures go."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate scheduler."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(default=3, metadata={"help": "Images per device and training batch."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: other columns than 'prompt' go to the reward functions."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # resolved in __post_init__
        default=None, metadata={"help": "bfloat16 autocast. If not set, on where the GPU has it and fp16 is off."}
    )

    # The sampler
    height: int = field(default=720, metadata={"help": "Height of the training pictures in pixels."})
    width: int = field(default=720, metadata={"help": "Width of the training pictures in pixels."})
    num_inference_steps: int = field(default=25, metadata={"help": "Sampling steps T."})
    guidance_scale: float = field(default=3.5, metadata={"help": "Guidance given to the transformer."})
    max_sequence_length: int = field(default=512, metadata={"help": "T5 tokens per prompt."})
    shift: float | None = field(
        default=None,
        metadata={"help": "Static timestep shift (the paper's runs: 3). If not set, the pipeline's own schedule."},
    )
    sde_type: str = field(default="flow", metadata={"help": "Stochastic step: flow, dance, cps or dpm."})
    eta: float = field(default=0.7, metadata={"help": "Amount of noise inside the window."})
    ode_solver: str = field(default="euler", metadata={"help": "Outside the window: euler, dpmsolver++ or unipc."})
    solver_order: int = field(default=2, metadata={"help": "Order of a higher-order solver."})
    prefix_ratio: float = field(default=1.0, metadata={"help": "Share of the steps before the window to run."})
    suffix_ratio: float = field(default=1.0, metadata={"help": "Share of the steps after the window to run."})
    shared_noise: bool = field(default=True, metadata={"help": "All images of a prompt start from the same noise."})
    sample_batch_size: int | None = field(default=None, metadata={"help": "Images per pass while sampling."})
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
    window_size: int = field(default=4, metadata={"help": "Stochastic steps; -1 for all but the last."})
    window_start: int = field(default=0, metadata={"help": "Where a frozen window is."})
    window_interval: int = field(default=25, metadata={"help": "Iterations that the window stays in one place."})
    window_stride: int = field(default=1, metadata={"help": "Steps by which the window moves."})
    window_decay_rate: float = field(default=0.1, metadata={"help": "k of exp_decay."})
    window_decay_start: int = field(default=13, metadata={"help": "l0 of exp_decay."})
    window_min_interval: int = field(default=1, metadata={"help": "Iterations in the last place of linear_decay."})
    window_train_fraction: float = field(default=1.0, metadata={"help": "Share of the window's steps trained."})

    # The rewards
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward function."})
    multi_objective_aggregation: str = field(
        default="normalize_then_sum",
        metadata={"help": "Several rewards: normalize_then_sum (as the paper) or sum_then_normalize."},
    )
    scale_rewards: str = field(default="group", metadata={"help": "Scale rewards by the std of: group, batch, none."})
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
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the KL divergence from the reference model."})
    replay_top_k: int | None = field(
        default=None, metadata={"help": "Replay only the k highest and k lowest advantages of each group."}
    )
    reuse_rollout_graph: bool = field(
        default=False, metadata={"help": "Train on the rollout's own graph: one update per iteration, no replay."}
    )
    replay_batch_size: int | None = field(
        default=None, metadata={"help": "Transitions per pass in training. If not set, as many as fit."}
    )

    # Data, evaluation and logging
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether prompts come in a random order."})
    cache_prompt_embeds: bool = field(
        default=False,
        metadata={"help": "Encode the prompts beforehand, on disk, and take the text encoders off the device."},
    )
    eval_num_inference_steps: int | None = field(default=None, metadata={"help": "Sampling steps in evaluation."})
    eval_seed: int = field(default=0, metadata={"help": "Evaluation prompt i is drawn with seed eval_seed + i."})
    logging_images_steps: int | None = field(default=None, metadata={"help": "Save sample grids every so many steps."})
    num_logged_images: int = field(default=16, metadata={"help": "Pictures in a sample grid."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Passed to FluxPipeline.from_pretrained, as JSON."}
    )

    # Speed and memory
    attention_backend: str | None = field(
        default=None, metadata={"help": "An attention backend of diffusers: flash, sage, _native_cudnn, ..."}
    )
    compile_repeated_blocks: bool = field(
        default=False, metadata={"help": "Compile the transformer's blocks, one of each kind."}
    )
    quantization: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Quantised weights under a LoRA, as JSON with 'quant_backend', 'quant_kwargs' and "
            "'components_to_quantize'."
        },
    )
    offload_vae: bool = field(default=False, metadata={"help": "Keep the VAE on the CPU while nothing is decoded."})

    def __post_init__(self):
        if self.window_size == "all":
            self.window_size = -1
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"  # Trainer's own fallback is the loss, which says nothing here
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # each trained weight has its part in each velocity
        super().__post_init__()
        self._validate_ranges()
        self._validate_speed_and_memory()
        self._validate_batch_arithmetic()
        self._validate_window()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MixGRPOConfig":
        """
        The configuration of a published method, for full fine-tuning of FLUX.1-dev at 720x720.

        All share the setting of the comparison in the MixGRPO paper (arXiv 2507.21802, and its released scripts): 25
        steps, static shift 3, guidance 3.5, groups of 12 images, 4 optimizer steps an iteration for 300 iterations,
        AdamW at 1e-5 with weight decay 1e-4, gradient norm 1, clip range 1e-4, advantages up to 5. They differ in:

        | preset | stochastic steps | trained | source |
        |---|---|---|---|
        | `"mixgrpo"` | 4, progressive, 25 iterations in a place | all of them | MixGRPO |
        | `"mixgrpo-flash"` | 4, progressive, 20 iterations; 40% of the steps after, DPM-Solver++ | all | MixGRPO |
        | `"mixgrpo-flash-star"` | the first 4; 20% of the steps after, DPM-Solver++ | all | MixGRPO |
        | `"flow-grpo"` | all but the last, `flow`, eta 0.7 | all | Flow-GRPO (2505.05470) |
        | `"dancegrpo"` | all but the last, `dance`, eta 0.3 | a random 60% each iteration | DanceGRPO (2505.07818) |

        Args:
            name (`str`): One of the five.
            overrides: Any other arguments of [`MixGRPOConfig`], and what to have otherwise than published.

        Raises:
            `ValueError`: If there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {', '.join(map(repr, PRESETS))}, got {name!r}.")
        return cls(**(PRESETS[name] | overrides))

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

    def _validate_ranges(self) -> None:
        for name, choices in (("multi_objective_aggregation", AGGREGATIONS), ("scale_rewards", SCALINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("num_inference_steps", "steps_per_generation", "num_iterations", "num_logged_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")
        for name in (
            "sample_batch_size",
            "decode_batch_size",
            "replay_batch_size",
            "eval_num_inference_steps",
            "replay_top_k",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, or None, got {getattr(self, name)}.")
        for name in ("epsilon", "epsilon_high", "advantage_clip", "shift", "logging_images_steps", "reward_timeout"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")
        if not self.beta >= 0:
            raise ValueError(f"`beta` must be 0 or more, got {self.beta}.")
        if not 0 <= self.max_reward_failure_rate <= 1:
            raise ValueError(f"`max_reward_failure_rate` must be from 0 to 1, got {self.max_reward_failure_rate}.")
        if self.beta > 0 and (self.replay_top_k is not None or self.reuse_rollout_graph):
            name = "replay_top_k" if self.replay_top_k is not None else "reuse_rollout_graph"
            raise ValueError(
                f"`{name}` leaves out passes that the KL term of beta={self.beta} needs. Use beta=0, or leave "
                f"`{name}` at its default."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would take away 'prompt' and the columns that reward functions need. "
                "Leave it False."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size=True` is not supported: another batch size would break up the groups of "
                "`num_generations` images. Set `sample_batch_size`, `decode_batch_size` and `replay_batch_size` "
                "instead: they bound the memory and leave the result alone."
            )

    def _validate_speed_and_memory(self) -> None:
        backends = [backend.value for backend in AttentionBackendName]
        if self.attention_backend is not None and self.attention_backend.lower() not in backends:
            raise ValueError(
                f"`attention_backend` must be one of {', '.join(backends)}, or None, got {self.attention_backend!r}."
            )
        if self.quantization is not None and not isinstance(self.quantization, dict):
            raise ValueError(
                "`quantization` must be a dict, or JSON of one, with 'quant_backend', 'quant_kwargs' and "
                f"'components_to_quantize', got {self.quantization!r}."
            )
        if self.torch_compile:
            raise ValueError(
                "`torch_compile=True` would compile the model for training and, with several processes, not for "
                "sampling: their log-probs would differ by rounding. Use compile_repeated_blocks=True."
            )

    def _validate_batch_arithmetic(self) -> None:
        images = self.per_device_train_batch_size * self.steps_per_generation
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` must be 2 or more, got {self.num_generations}: advantages compare the images of "
                "one prompt with each other."
            )
        if images % self.num_generations:
            raise ValueError(
                "An iteration samples per_device_train_batch_size * steps_per_generation = "
                f"{self.per_device_train_batch_size} * {self.steps_per_generation} = {images} images per device, "
                f"which is not a multiple of num_generations={self.num_generations}, the images of one prompt. A "
                "prompt's images stay on one device: change one of the three numbers, for example "
                f"num_generations={images if images > 1 else 2}."
            )
        if self.batches_per_iteration % self.gradient_accumulation_steps:
            raise ValueError(
                f"An iteration has steps_per_generation * num_iterations = {self.steps_per_generation} * "
                f"{self.num_iterations} = {self.batches_per_iteration} training batches, which is not a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: an optimizer step would mix two "
                f"iterations. Use gradient_accumulation_steps={self.batches_per_iteration} for one optimizer step per "
                "iteration, or another divisor."
            )
        if self.reuse_rollout_graph and self.batches_per_iteration > 1:
            raise ValueError(
                "`reuse_rollout_graph=True` trains on the graph of the rollout, which holds for one update per "
                f"iteration: got steps_per_generation={self.steps_per_generation} and num_iterations="
                f"{self.num_iterations}. Set both to 1, and per_device_train_batch_size={images} for as many images."
            )
        steps = self.optimizer_steps_per_iteration
        if self.max_steps > 0 and self.max_steps % steps:
            near = [count * steps for count in (self.max_steps // steps, self.max_steps // steps + 1) if count]
            raise ValueError(
                f"`max_steps={self.max_steps}` ends inside an iteration, which has {steps} optimizer steps here. Use "
                f"{' or '.join(map(str, near))}, or another multiple of {steps}."
            )

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
        )

    def _validate_window(self) -> None:
        last = self.num_inference_steps - 1
        size = last - self.window_start if self.window_size == -1 else self.window_size
        if self.window_start < 0 or size < 1 or self.window_start + size > last:
            raise ValueError(
                f"The window must lie within the first {last} of num_inference_steps={self.num_inference_steps} steps "
                "(noise in the last one would stay in the picture), got window_start="
                f"{self.window_start} and window_size={self.window_size}. Choose window_size from 1 to "
                f"{max(1, last - max(0, self.window_start))}, or -1 for all steps but the last, or more "
                "num_inference_steps."
            )
        if self.window_start > 0 and self.window_strategy != "frozen":
            raise ValueError(
                f"`window_start={self.window_start}` is the place of a window that stays there, and "
                f"window_strategy={self.window_strategy!r} moves it. Use window_strategy='frozen' or window_start=0."
            )
        if not 0 < self.window_train_fraction <= 1:
            raise ValueError(
                f"`window_train_fraction` must be greater than 0 and at most 1, got {self.window_train_fraction}."
            )
        self.window_schedule()  # checks the rest
