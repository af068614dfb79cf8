"""[`preflight`]: what a run will do and cost, measured on its first iteration before any weight changes."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..core.rollout import Trajectory, batches_of_images
from ..mixgrpo_config import MixGRPOConfig
from ..scheduling_mixed_ode_sde import MixedODESDEScheduler
from .engine import Engine, Rollout, TrainingPass
from .memory import PeakMemory, find_pass_size, has_to_search, optimizer_memory, tensor_bytes
from .phase_timer import PhaseTimer
from .plan import IterationPlan, PromptDataset, draw_steps, first_rows, iterations_of_run
from .preflight_report import PreflightReport, RatioCheck, describe_batches, in_bytes


PAPER_NATS = 13  # the paper's clip range in the log-ratio of a whole transition; see `MixGRPOConfig.epsilon`
MOST_ITERATIONS = 10_000  # whose windows are looked up


def preflight(
    engine: Engine, dataset: PromptDataset, optimizer: torch.optim.Optimizer | None = None
) -> PreflightReport:
    """
    Find out what a run will do and cost, before it begins.

    The first iteration is sampled, decoded and trained up to its first update, with its prompts, seeds, batch shapes
    and KL term; rewards are not called. This takes less than two iterations. The engine is left as it was: a run
    afterwards is bit for bit the one without. With FSDP or DeepSpeed, which shard the model when training begins,
    nothing is measured.

    Args:
        engine ([`Engine`]): The engine of the run. Each rank measures its own device.
        dataset ([`PromptDataset`]): The prompts to train on.
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer, if it exists already.

    Returns:
        [`PreflightReport`]: The numbers; `print` it.

    Example:

    ```py
    >>> print(preflight(trainer.engine, trainer.train_dataset))
    Batches
      12 images of 1 prompt per device, 4 optimizer steps per iteration
      ...
    ```
    """
    settings = engine.settings
    nfe, nfe_per_image = _count_passes(engine, len(dataset))
    report = PreflightReport(
        batch=_describe(engine, len(dataset)),
        images=settings.prompts_per_iteration * settings.num_generations,
        iterations=_iterations(engine, len(dataset)),
        nfe=nfe,
        nfe_per_image=nfe_per_image,
        memory=_weights_memory(engine, optimizer),
    )
    if engine.is_sharded:
        report.warnings.append("Memory is that of the whole model: FSDP or DeepSpeed shard it when training begins.")
    else:
        with _untouched(engine):
            _measure(engine, dataset, optimizer, report)
    report.warnings += _warnings(engine, report)
    return report


# ---- Counting ----


def _iterations(engine: Engine, num_prompts: int) -> int:
    per_iteration = engine.settings.prompts_per_iteration * engine.accelerator.num_processes
    return iterations_of_run(engine.settings, max(1, num_prompts // per_iteration))


def _windows(engine: Engine, num_prompts: int) -> Counter:
    """The windows of the run, each with the number of iterations in which it occurs."""
    iterations = min(_iterations(engine, num_prompts), MOST_ITERATIONS)
    return Counter(map(engine.window_schedule.schedule, range(iterations)))


def _describe(engine: Engine, num_prompts: int, pass_size: int | None = None) -> list[str]:
    windows = _windows(engine, num_prompts)
    return describe_batches(
        engine.settings,
        num_prompts=num_prompts,
        num_devices=engine.accelerator.num_processes,
        trained_steps=_trained_steps(engine),
        visited_steps=sorted({step for start, size in windows for step in range(start, start + size)}),
        found_pass_size=pass_size,
    )


def _count_passes(engine: Engine, num_prompts: int) -> tuple[dict[str, float], float]:
    """Forward passes per iteration by part, and those of an image, as in the stock pipeline: means over the run."""
    settings = engine.settings
    group = settings.num_generations
    images = settings.prompts_per_iteration * group
    # A prompt's prefix is computed in each of the parts that its group is sampled in.
    prefixes = math.ceil(group / (settings.sample_batch_size or group)) if settings.shared_noise else group
    windows = _windows(engine, num_prompts)
    scheduler = MixedODESDEScheduler.from_config(engine.scheduler.config)
    nfe = {"prefix": 0.0, "window": 0.0, "suffix": 0.0}
    steps_per_image = 0.0
    for place, times in windows.items():
        scheduler.set_window(*place)
        engine.policy.prepare_scheduler(scheduler)
        window = scheduler.window
        num_steps = len(scheduler.timesteps)
        share = times / windows.total()
        nfe["prefix"] += share * settings.prompts_per_iteration * prefixes * window.start
        nfe["window"] += share * images * len(window)
        nfe["suffix"] += share * images * (num_steps - window.stop)
        steps_per_image += share * num_steps
    trained = images * _trained_steps(engine)
    if settings.beta > 0:
        nfe["reference"] = trained
    kept = group
    if settings.replay_top_k is not None and not engine.is_sharded:
        kept = min(group, 2 * settings.replay_top_k)
    replayed = trained * kept / group * settings.num_iterations
    backward_cost = (1 if engine.weights.is_lora else 2) + bool(settings.activation_checkpointing)
    nfe["replay forward"] = 0.0 if settings.reuse_rollout_graph else replayed
    nfe["replay backward"] = replayed * backward_cost
    passes = engine.policy.passes_per_step
    return {part: passes * count for part, count in nfe.items()}, passes * steps_per_image


def _trained_steps(engine: Engine) -> int:
    """Window steps of each image that are trained in an iteration."""
    size = engine.window_schedule.schedule(0).size
    return len(draw_steps(engine.settings.seed, 0, size, engine.settings.window_train_fraction))


def _weights_memory(engine: Engine, optimizer: torch.optim.Optimizer | None) -> dict[str, int | None]:
    """Bytes of the weights on the device, of gradients, and of the optimizer's state."""
    settings = engine.settings
    pipe = engine.policy.pipe
    trained = engine.trained_parameters
    buckets = 2 if engine.accelerator.num_processes > 1 else 1  # DDP copies gradients into buckets
    memory: dict[str, int | None] = {
        "frozen weights": tensor_bytes(p for p in pipe.transformer.parameters() if not p.requires_grad),
        "LoRA" if engine.weights.is_lora else "trained weights": tensor_bytes(trained),
        "gradients": tensor_bytes(trained) * buckets,
        "optimizer": optimizer_memory(settings, optimizer, trained),
    }
    if engine.reference is not None:
        memory["reference"] = tensor_bytes(engine.reference.parameters())
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and component is not pipe.transformer:
            on_device = (p for p in component.parameters() if p.device.type == settings.device.type)
            memory[name] = tensor_bytes(on_device)
    return memory


# ---- Measuring ----


def _measure(
    engine: Engine, dataset: PromptDataset, optimizer: torch.optim.Optimizer | None, report: PreflightReport
) -> None:
    """Run the first iteration up to its first update, and write memory, seconds and the ratio into the report."""
    settings = engine.settings
    accelerator = engine.accelerator
    device = settings.device
    on_cuda = device.type == "cuda"
    reuse = settings.reuse_rollout_graph
    plan = engine.plan(0, first_rows(settings, dataset, accelerator.process_index, accelerator.num_processes))
    _warm_up(engine, plan)
    if on_cuda:
        _note_cuda_memory(device, optimizer, report)

    with PeakMemory(device, on_cuda or reuse) as peak:
        rollout = _roll_out(engine, plan)
        passes = _first_update(engine, rollout, None) if reuse else []
    report.sampling_memory = peak.bytes if on_cuda else None
    trajectory = rollout.trajectory
    kept = [trajectory.states, trajectory.log_probs, trajectory.latents]
    if rollout.reference_means is not None:
        kept.append(rollout.reference_means)
    report.memory["rollout"] = tensor_bytes(kept)
    if reuse:  # the graph of the rollout holds the activations
        trained = tensor_bytes(engine.trained_parameters)
        report.memory["activations"] = max(0, peak.bytes - tensor_bytes(kept) - trained)
    else:
        pass_size = _find_pass_size(engine, rollout, optimizer)
        if has_to_search(engine):
            report.replay_batch_size = pass_size
            report.batch = _describe(engine, len(dataset), pass_size)
        report.memory["activations"] = _activations(engine, rollout, pass_size)
        passes = _first_update(engine, rollout, pass_size)

    report.seconds = _seconds_per_iteration(engine, trajectory, report)
    report.ratio = _check_ratio(engine, trajectory, passes)


def _note_cuda_memory(device: torch.device, optimizer: torch.optim.Optimizer | None, report: PreflightReport) -> None:
    """Of the device: its memory, and the part of it that is taken by something else than the weights."""
    later = ("gradients",) if getattr(optimizer, "state", None) else ("gradients", "optimizer")
    known = sum(size or 0 for part, size in report.memory.items() if part not in later)
    report.memory["rewards and others"] = max(0, torch.cuda.memory_allocated(device) - known)
    report.device_memory = torch.cuda.get_device_properties(device).total_memory


@torch.no_grad()
def _warm_up(engine: Engine, plan: IterationPlan) -> None:
    """Call everything once, as the first call takes longer. The time does not count."""
    policy = engine.policy
    scheduler = MixedODESDEScheduler.from_config(engine.scheduler.config)
    policy.prepare_scheduler(scheduler)
    latents = policy.initial_latents([0]).float()
    with engine.autocast():
        policy.velocity(latents, scheduler.timesteps[:1], engine.condition(policy, plan.rows[:1]))
    engine.decode(engine.policy, latents, None)


def _roll_out(engine: Engine, plan: IterationPlan) -> Rollout:
    """The images of an iteration without scores. Each gets another advantage, and none of them is 0."""
    batches = list(engine.sample(plan))
    images = [image for batch in batches for image in batch.images]
    trajectory = Trajectory.concatenate([batch.trajectory for batch in batches])
    reference_means = engine.reference_means(plan, trajectory)
    advantages = torch.arange(1.0, engine.settings.num_generations + 1).expand(len(plan.rows), -1)
    rewards = advantages.flatten()[None]
    return engine.make_rollout(plan, trajectory, images, rewards, advantages, reference_means, statistics={})


def _first_update(engine: Engine, rollout: Rollout, pass_size: int | None) -> list[TrainingPass]:
    """The forward and backward passes before the first update."""
    settings = engine.settings
    batches = rollout.training_batches(settings.per_device_train_batch_size)
    passes: list[TrainingPass] = []
    for number in range(settings.gradient_accumulation_steps):
        images = batches[number % settings.steps_per_generation]
        batch = engine.backward(
            rollout, images, pass_size=pass_size, accumulation_steps=settings.gradient_accumulation_steps
        )
        passes += batch.passes
    return passes


def _find_pass_size(engine: Engine, rollout: Rollout, optimizer: torch.optim.Optimizer | None) -> int:
    """Transitions per pass of the first training batch, as a run finds them too."""
    images = rollout.training_batches(engine.settings.per_device_train_batch_size)[0]
    is_distributed = engine.accelerator.num_processes > 1
    buckets = tensor_bytes(engine.trained_parameters) if is_distributed else 0  # DDP makes them in training
    return find_pass_size(engine, rollout, images, optimizer, reserve=buckets)


def _activations(engine: Engine, rollout: Rollout, pass_size: int) -> int:
    """Bytes that the largest forward and backward pass takes at its peak, without the gradients."""
    settings = engine.settings
    trained = engine.trained_parameters
    batch = rollout.training_batches(settings.per_device_train_batch_size)[0]
    images, steps = engine.transitions_to_train(rollout, batch)
    # All passes of an optimizer step except the first find gradients to add to.
    adds = len(images) > pass_size or settings.gradient_accumulation_steps > 1
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if adds else None
    with PeakMemory(settings.device) as peak:
        engine.objective(rollout, images[:pass_size], steps[:pass_size]).losses.sum().backward()
    for parameter in trained:
        parameter.grad = None
    return peak.bytes if adds else max(0, peak.bytes - tensor_bytes(trained))


def _seconds_per_iteration(engine: Engine, trajectory: Trajectory, report: PreflightReport) -> dict[str, float]:
    """The measured seconds of each phase, for the mean iteration of the run."""
    seconds = engine.timer.pop()
    reference = report.nfe.get("reference", 0.0)
    expected = report.images * report.nfe_amortized + reference
    measured = len(trajectory) * engine.policy.passes_per_step * trajectory.nfe_computed + reference
    return {
        "sampling": seconds["sampling"] * expected / measured,
        "decoding": seconds["decoding"],
        "training": seconds["training"] * engine.settings.optimizer_steps_per_iteration,
    }


@torch.no_grad()
def _check_ratio(engine: Engine, trajectory: Trajectory, passes: list[TrainingPass]) -> RatioCheck:
    """
    The ratio before the first update, and what makes it differ from 1.

    The pass and window step that deviate most are replayed once more, in the batches of sampling and in float32.
    """
    settings = engine.settings
    mixed_precision = engine.accelerator.mixed_precision
    device = trajectory.states.device
    deviations = [(training_pass.ratio - 1).abs() for training_pass in passes]
    worst = max(range(len(passes)), key=lambda i: deviations[i].max().item())
    images = passes[worst].images.to(device)
    steps = passes[worst].steps.to(device)
    step = steps[deviations[worst].argmax()]
    chosen = steps == step
    batches = batches_of_images(len(trajectory), settings.num_generations, settings.sample_batch_size)
    sizes = [batch.stop - batch.start for batch in batches]

    def as_sampled(in_float32: bool) -> Tensor:
        every = torch.arange(len(trajectory), device=device).split(sizes)
        parts = [_replay(engine, trajectory, batch, step.expand(len(batch)), in_float32) for batch in every]
        return torch.cat(parts)[images[chosen]]

    def largest_deviation(new: Tensor, old: Tensor) -> float:
        return (torch.exp(new - old) - 1).abs().max().item()

    dtypes = {parameter.dtype for parameter in engine.policy.transformer.parameters()}
    weights = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) + " weights"
    float32 = None
    # Once a transformer has been trained, autocast is part of its own forward and cannot be left out.
    is_plain = not hasattr(engine.policy.transformer, "_original_forward")
    if mixed_precision in ("bf16", "fp16") and dtypes == {torch.float32} and is_plain:
        replayed = _replay(engine, trajectory, images, steps, in_float32=True)[chosen]
        float32 = largest_deviation(replayed, as_sampled(in_float32=True))
    return RatioCheck(
        max_deviation=max(deviation.max().item() for deviation in deviations),
        mean_deviation=torch.cat(deviations).mean().item(),
        same_batch=largest_deviation(as_sampled(in_float32=False), trajectory.log_probs[images[chosen], step]),
        float32=float32,
        precision=weights if mixed_precision == "no" else f"{mixed_precision} autocast",
        sampled_at_once=max(sizes),
        replayed_at_once=len(images),
        epsilon=settings.epsilon,
    )


def _replay(engine: Engine, trajectory: Trajectory, images: Tensor, steps: Tensor, in_float32: bool) -> Tensor:
    """Log-probs of transitions, as training computes them or all in float32."""
    if in_float32:
        trajectory = trajectory.with_conditioning(trajectory.conditioning.to(torch.float32))
        precision: contextlib.AbstractContextManager = torch.autocast(images.device.type, enabled=False)
    else:
        precision = engine.autocast()
    with precision:
        return trajectory.replay(engine.policy, images, steps).log_probs


@contextlib.contextmanager
def _untouched(engine: Engine) -> Iterator[None]:
    """Keep gradients, random states and the engine as they are, and use gradient checkpointing as training will."""
    settings = engine.settings
    transformer = engine.policy.pipe.transformer
    gradients = [(parameter, parameter.grad) for parameter in transformer.parameters()]
    scheduler, timer = engine.scheduler, engine.timer
    checkpointing = settings.activation_checkpointing and not transformer.is_gradient_checkpointing
    with torch.random.fork_rng([settings.device] if settings.device.type == "cuda" else []):
        try:
            engine.timer = PhaseTimer(settings.device)
            for parameter, _ in gradients:
                parameter.grad = None
            if checkpointing:
                transformer.activation_checkpointing_enable(settings.activation_checkpointing_kwargs)
            yield
        finally:
            engine.scheduler, engine.timer = scheduler, timer
            if checkpointing:
                transformer.disable_gradient_checkpointing()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()


# ---- Warnings ----


def _warnings(engine: Engine, report: PreflightReport) -> list[str]:
    settings = engine.settings
    schedule = engine.window_schedule
    found = []
    elements = math.prod(engine.policy.latent_shape)
    nats = settings.epsilon * elements
    if not PAPER_NATS / 10 < nats < PAPER_NATS * 10:
        effect = "nearly every" if nats < PAPER_NATS else "hardly any"
        found.append(
            f"epsilon={settings.epsilon:g} is {nats:.2g} nats over the {elements} elements of an image's latents, the "
            f"paper's is {PAPER_NATS}: {effect} update will be clipped. Use epsilon={PAPER_NATS / elements:.1e}."
        )
    if report.ratio is not None and report.ratio.share >= 0.1:
        size = report.replay_batch_size or _pass_size(settings, _trained_steps(engine))
        found.append(
            f"Rounding changes the ratio by up to {report.ratio.share:.0%} of the clip range. Sample and replay in "
            f"batches of one size (sample_batch_size={size}, replay_batch_size={size}), or compute in float32."
        )
    if settings.window_strategy not in ("frozen", "random") and report.iterations < schedule.sweep_length:
        found.append(
            "The run ends before the window has visited all its places, which takes "
            f"{schedule.sweep_length} iterations. Use "
            f"window_interval={max(1, report.iterations // len(schedule.stays))}, or a larger window_stride."
        )
    if report.device_memory and (report.memory_peak or 0) > 0.9 * report.device_memory:
        found.append(
            f"The peak is close to the {in_bytes(report.device_memory)} of the device. A smaller replay_batch_size or "
            "gradient_checkpointing=True reduces activations; a smaller sample_batch_size or decode_batch_size "
            "reduces the memory of sampling. None of them changes the result."
        )
    return found


def _pass_size(settings: MixGRPOConfig, trained_steps: int) -> int:
    """Transitions in one forward and backward pass, without a search."""
    whole = settings.per_device_train_batch_size * trained_steps
    if settings.reuse_rollout_graph:
        return whole
    return min(whole, settings.replay_batch_size or whole)
