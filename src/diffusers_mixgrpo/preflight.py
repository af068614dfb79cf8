"""[`preflight`]: what a run will do and cost, found out on its first iteration before any weight moves."""

import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .advantages import keep_extremes
from .iteration_draws import draw_order, draw_seeds, draw_steps
from .peak_memory import PeakMemory
from .preflight_report import PreflightReport, RatioCheck, count, in_bytes, ranges
from .prepare_pipeline import vae_on_device
from .prompt_sampler import PromptSampler
from .replay_batch_size import find_replay_batch_size, has_to_search, optimizer_memory, optimizer_memory_to_come
from .rollout import Trajectory, _batches, replay_log_probs, sample_trajectories
from .scheduling_mixed_ode_sde import MixedODESDEScheduler


NATS = 13  # the paper's clip range, in the log-ratio of a whole transition; see `MixGRPOConfig.epsilon`
MOST_ITERATIONS = 10_000  # of which the window's places are looked up


# ---- The check ----


def preflight(trainer: Any) -> PreflightReport:
    """
    Find out what a run will do and cost, before it begins.

    The first iteration is sampled, decoded and replayed up to its first update, with its prompts, seeds and batch
    shapes; rewards are not called. This takes less than two iterations. The trainer is left as it was: a run
    afterwards is bit for bit the one without. With FSDP or DeepSpeed, which shard the model when training begins,
    nothing is measured.

    Args:
        trainer ([`MixGRPOTrainer`]): With a data set to train on. Of several processes each measures its own device.

    Returns:
        [`PreflightReport`]: The numbers; `print` it.

    Raises:
        `ValueError`: If the trainer has no `train_dataset`.

    Example:

    ```py
    >>> print(preflight(trainer))
    Batches
      12 images of 1 prompt per device, 4 optimizer steps per iteration
      ...
    ```
    """
    if trainer.train_dataset is None:
        raise ValueError("`train_dataset` is None; a preflight needs the prompts of the first iteration.")
    scheduler = MixedODESDEScheduler.from_config(trainer.noise_scheduler.config)
    images = trainer.args.prompts_per_iteration * trainer.args.num_generations
    iterations, batch = _batch_arithmetic(trainer, images)
    nfe, nfe_per_image = _count_passes(trainer, scheduler, images, iterations)
    report = PreflightReport(batch, images, iterations, nfe, nfe_per_image, _weights_memory(trainer))
    if _sharded(trainer):
        report.warnings.append("Memory is that of the whole model: FSDP or DeepSpeed shard it when training begins.")
    else:
        with _untouched(trainer):
            _measure(trainer, scheduler, report)
    report.warnings += _warnings(trainer, report)
    return report


# ---- Counting ----


def _batch_arithmetic(trainer: Any, images: int, found: int | None = None) -> tuple[int, list[str]]:
    """Iterations of the run, and the batch arithmetic in words; `found` transitions fit into memory at once."""
    args, devices, num_prompts = trainer.args, trainer.accelerator.num_processes, len(trainer.train_dataset)
    prompts, steps = args.prompts_per_iteration, args.optimizer_steps_per_iteration
    per_epoch = max(1, num_prompts // (prompts * devices))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch * steps)
    iterations = math.ceil(total / steps)
    windows = {trainer.window_schedule.schedule(i) for i in range(min(iterations, MOST_ITERATIONS))}
    visited = sorted({step for start, size in windows for step in range(start, start + size)})
    own, trained = args.per_device_train_batch_size * args.gradient_accumulation_steps, _trained_steps(trainer)
    at_once = f"{found} in one pass, as memory allows" if found else f"{_pass_size(args, trained)} in one pass"
    words = [
        f"{count(images, 'image')} of {count(prompts, 'prompt')} per device, "
        f"{count(steps, 'optimizer step')} per iteration",
        f"an optimizer step: {count(own, 'image')} x {count(trained, 'window step')} = "
        f"{count(own * trained, 'transition')} per device, up to {at_once}",
        f"the run: {count(iterations, 'iteration')} = {count(total, 'optimizer step')} = "
        f"{iterations / per_epoch:.3g} epochs over {count(num_prompts, 'prompt')}",
        f"the window comes to steps {ranges(visited)} of 0-{args.num_inference_steps - 1}",
    ]
    if devices > 1:
        words[1:1] = [
            f"over {devices} devices: {images * devices} images of {prompts * devices} prompts per iteration, "
            f"{own * devices} images in an optimizer step"
        ]
    return iterations, words


def _count_passes(
    trainer: Any, scheduler: MixedODESDEScheduler, images: int, iterations: int
) -> tuple[dict[str, float], float]:
    """Passes per iteration by part, and the steps of an image: means over the run."""
    args, group = trainer.args, trainer.args.num_generations
    # A prompt's prefix is computed in each of the parts that its group is sampled in
    parts = math.ceil(group / (args.sample_batch_size or group)) if args.shared_noise else group
    count = min(iterations, MOST_ITERATIONS)
    nfe, steps_per_image = dict.fromkeys(("prefix", "window", "suffix"), 0.0), 0.0
    for place, times in Counter(map(trainer.window_schedule.schedule, range(count))).items():
        scheduler.set_window(*place)
        trainer.policy.prepare_scheduler(scheduler)
        window, steps, share = scheduler.window, len(scheduler.timesteps), times / count
        nfe["prefix"] += share * args.prompts_per_iteration * parts * window.start
        nfe["window"] += share * images * len(window)
        nfe["suffix"] += share * images * (steps - window.stop)
        steps_per_image += share * steps
    kept = min(group, 2 * args.replay_top_k) if args.replay_top_k is not None and not _sharded(trainer) else group
    trained = images * _trained_steps(trainer)
    if args.beta > 0:
        nfe["reference"] = trained
    passes = trained * kept / group * args.num_iterations
    nfe["replay forward"] = 0.0 if args.reuse_rollout_graph else passes
    nfe["replay backward"] = passes * ((1 if trainer.is_lora else 2) + bool(args.activation_checkpointing))
    return nfe, steps_per_image


def _weights_memory(trainer: Any) -> dict[str, int | None]:
    """Bytes of what lies on the device throughout, of gradients, and of the optimizer's state."""
    trained = _trained(trainer)
    memory: dict[str, int | None] = {
        "frozen weights": _bytes(p for p in trainer.pipe.transformer.parameters() if not p.requires_grad),
        "LoRA" if trainer.is_lora else "trained weights": _bytes(trained),
        "gradients": _bytes(trained) * (2 if trainer.accelerator.num_processes > 1 else 1),  # and DDP's buckets
        "optimizer": optimizer_memory(trainer, trained),
    }
    if trainer.reference is not None:
        memory["reference"] = _bytes(trainer.reference.parameters())
    for name, component in trainer.pipe.components.items():
        if isinstance(component, nn.Module) and component is not trainer.pipe.transformer:
            memory[name] = _bytes(p for p in component.parameters() if p.device.type == trainer.args.device.type)
    return memory


# ---- Measuring ----


@dataclass
class _Sample:
    """The first iteration's images of this device, and the passes up to its first update."""

    trajectory: Trajectory
    conditioning: Any
    passes: list[tuple[Tensor, Tensor]]  # images and window steps of each


def _measure(trainer: Any, scheduler: MixedODESDEScheduler, report: PreflightReport) -> None:
    """Sample and replay, and write memory, seconds and the ratio into the report."""
    device, memory, reuse = trainer.args.device, report.memory, trainer.args.reuse_rollout_graph
    if on_cuda := device.type == "cuda":
        later = ("gradients",) if getattr(trainer.optimizer, "state", None) else ("gradients", "optimizer")
        known = sum(size or 0 for part, size in memory.items() if part not in later)
        memory["rewards and others"] = max(0, torch.cuda.memory_allocated(device) - known)
        report.device_memory = torch.cuda.get_device_properties(device).total_memory
    with PeakMemory(device, on_cuda or reuse) as peak:
        sample = _sample(trainer, scheduler, report.seconds)
        deviations = _train(trainer, scheduler, sample, report.seconds) if reuse else []
    passes = report.images * report.nfe_amortized + report.nfe.get("reference", 0)
    report.seconds["sampling"] *= passes / (len(sample.trajectory) * sample.trajectory.nfe_computed)
    report.sampling_memory = peak.bytes if on_cuda else None
    states = [sample.trajectory.states, sample.trajectory.log_probs, sample.trajectory.latents]
    memory["rollout"] = rollout = _bytes([*states, states[0][:, 1:]] if trainer.args.beta > 0 else states)
    if reuse:  # the graph of the rollout holds them
        memory["activations"] = max(0, peak.bytes - rollout - _bytes(_trained(trainer)))
    else:
        if has_to_search(trainer):
            report.replay_batch_size = size = _find_pass_size(trainer, scheduler, sample)
            report.batch = _batch_arithmetic(trainer, report.images, size)[1]
            sample.passes = [p for images, steps in sample.passes for p in _split(size, images, steps)]
        memory["activations"] = _activations(trainer, scheduler, sample)
        deviations = _train(trainer, scheduler, sample, report.seconds)
    report.ratio = _check_ratio(trainer, scheduler, sample, deviations)


def _find_pass_size(trainer: Any, scheduler: MixedODESDEScheduler, sample: _Sample) -> int:
    """Transitions of a training batch that fit into memory at once, as a run finds it too."""
    trained, (images, steps) = _trained(trainer), sample.passes[0]
    buckets = _bytes(trained) if trainer.accelerator.num_processes > 1 else 0  # DDP makes them when training begins
    return find_replay_batch_size(
        lambda size: _train_pass(trainer, scheduler, sample, images[:size], steps[:size]),
        len(images),
        trained,
        reserve=buckets + optimizer_memory_to_come(trainer, trained),
        accumulates=len(sample.passes) > 1,
    )


def _activations(trainer: Any, scheduler: MixedODESDEScheduler, sample: _Sample) -> int:
    """Bytes that a forward and backward pass of the largest size takes at its peak, beside the gradients."""
    trained = _trained(trainer)
    adds = len(sample.passes) > 1  # all passes but the first find gradients to add to
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if adds else None
    with PeakMemory(trainer.args.device) as peak:
        _train_pass(trainer, scheduler, sample, *sample.passes[0])
    for parameter in trained:
        parameter.grad = None
    return peak.bytes if adds else max(0, peak.bytes - _bytes(trained))


def _sample(trainer: Any, scheduler: MixedODESDEScheduler, seconds: dict[str, float]) -> _Sample:
    """The images that the run's first iteration will sample on this device, decoded and not scored."""
    args, policy, accelerator, dataset = trainer.args, trainer.policy, trainer.accelerator, trainer.train_dataset
    count, group, rank = args.prompts_per_iteration, args.num_generations, accelerator.process_index
    seed = args.seed if args.data_seed is None else args.data_seed
    order = PromptSampler(len(dataset), count * accelerator.num_processes, 1, args.shuffle_dataset, seed)
    prompts = [dataset[i]["prompt"] for i in islice(order, rank * count, (rank + 1) * count)]
    _warm_up(trainer, scheduler, prompts[:1])
    start, size = trainer.window_schedule.schedule(0)
    scheduler.set_window(start, size)
    steps = draw_steps(args.seed, 0, size, args.window_train_fraction)
    seconds |= {"sampling": 0.0, "decoding": 0.0}

    def decode(batch: slice, latents: Tensor) -> None:
        half = torch.autocast(args.device.type, enabled=False)
        with _timed(seconds, "decoding", args.device), half, vae_on_device(trainer.pipe, args):
            policy.decode(latents, args.decode_batch_size or args.sample_batch_size)

    with _timed(seconds, "sampling", args.device):
        conditioning = policy.encode(prompts)
        seeds = draw_seeds(args.seed, 0, "latents", rank, count * (1 if args.shared_noise else group))
        with accelerator.autocast():
            trajectory = sample_trajectories(
                policy,
                scheduler,
                conditioning,
                policy.initial_latents(seeds).float(),
                num_generations=group,
                generator=torch.Generator(policy.device).manual_seed(draw_seeds(args.seed, 0, "sde", rank)[0]),
                batch_size=args.sample_batch_size,
                on_batch=decode,
                keep_graph=steps.tolist() if args.reuse_rollout_graph else (),
                outside_window=trainer.accelerated_ode,
            )
    seconds["sampling"] -= seconds["decoding"]
    return _Sample(trajectory, conditioning, _first_passes(trainer, trajectory))


@torch.no_grad()
def _warm_up(trainer: Any, scheduler: MixedODESDEScheduler, prompts: list[str]) -> None:
    """Call everything once, as what runs for the first time takes longer."""
    policy, latents = trainer.policy, trainer.policy.initial_latents([0]).float()
    with trainer.accelerator.autocast():
        policy.velocity(latents, scheduler.timesteps[:1], policy.encode(prompts))
    with vae_on_device(trainer.pipe, trainer.args):
        policy.decode(latents)


def _first_passes(trainer: Any, trajectory: Trajectory) -> list[tuple[Tensor, Tensor]]:
    """The images and window steps of each forward and backward pass before the first update, if no advantage is 0."""
    args = trainer.args
    passes: list[tuple[Tensor, Tensor]] = []
    advantages = torch.arange(1.0, args.num_generations + 1).expand(args.prompts_per_iteration, -1)
    if args.replay_top_k is not None:
        advantages = keep_extremes(advantages, args.replay_top_k)
    seed = draw_seeds(args.seed, 0, "order", trainer.accelerator.process_index)[0]
    order = draw_order(seed, advantages.flatten(), args.per_device_train_batch_size)
    batches = order.split(args.per_device_train_batch_size)
    steps = draw_steps(args.seed, 0, trajectory.window_size, args.window_train_fraction)
    for batch in range(args.gradient_accumulation_steps):
        images = batches[batch % args.steps_per_generation]
        images = images[advantages.flatten()[images] != 0]
        pair = images.repeat_interleave(len(steps)), steps.repeat(len(images))
        size = len(pair[0]) if args.reuse_rollout_graph else args.replay_batch_size or len(pair[0])
        passes += _split(size, *(index.to(trajectory.states.device) for index in pair))
    return passes


def _split(size: int, images: Tensor, steps: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), steps.split(size), strict=True))


def _train(trainer: Any, scheduler: Any, sample: _Sample, seconds: dict[str, float]) -> list[Tensor]:
    """The first optimizer step without its update: `|ratio - 1|` of each pass, and `seconds` of an iteration."""
    with _timed(seconds, "training", trainer.args.device):
        deviations = [_train_pass(trainer, scheduler, sample, *part) for part in sample.passes]
    seconds["training"] *= trainer.args.optimizer_steps_per_iteration
    return deviations


def _train_pass(trainer: Any, scheduler: Any, sample: _Sample, images: Tensor, steps: Tensor) -> Tensor:
    recorded = sample.trajectory.log_probs[images, steps]
    reuse = trainer.args.reuse_rollout_graph
    log_probs = recorded if reuse else _replay(trainer, scheduler, sample, images, steps)
    ratio = torch.exp(log_probs - recorded.detach())
    ratio.mean().backward()
    return (ratio.detach() - 1).abs()


def _replay(
    trainer: Any, scheduler: Any, sample: _Sample, images: Tensor, steps: Tensor, float32: bool = False
) -> Tensor:
    """Log-probs of transitions, as training computes them or all in float32."""
    conditioning, autocast = sample.conditioning, trainer.accelerator.autocast()
    if float32:
        conditioning, autocast = conditioning.to(torch.float32), torch.autocast(images.device.type, enabled=False)
    with autocast:
        output = replay_log_probs(trainer.policy, scheduler, sample.trajectory, conditioning, images, steps)
    return output.log_probs


@torch.no_grad()
def _check_ratio(trainer: Any, scheduler: Any, sample: _Sample, deviations: list[Tensor]) -> RatioCheck:
    """Replay the pass and window step that deviate most once more, in the batches of sampling and in float32."""
    args, trajectory, half = trainer.args, sample.trajectory, trainer.accelerator.mixed_precision
    worst = max(range(len(deviations)), key=lambda i: deviations[i].max().item())
    images, steps = sample.passes[worst]
    step = steps[deviations[worst].argmax()]
    chosen = steps == step
    batches = [b.stop - b.start for b in _batches(len(trajectory), args.num_generations, args.sample_batch_size)]

    def as_sampled(float32: bool) -> Tensor:
        every = torch.arange(len(trajectory), device=steps.device).split(batches)
        parts = [_replay(trainer, scheduler, sample, batch, step.expand(len(batch)), float32) for batch in every]
        return torch.cat(parts)[images[chosen]]

    def largest(new: Tensor, old: Tensor) -> float:
        return (torch.exp(new - old) - 1).abs().max().item()

    dtypes = {p.dtype for p in trainer.pipe.transformer.parameters()}
    weights = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) + " weights"
    float32 = None
    # Once a transformer has been trained, autocast is part of its own forward and cannot be left out.
    if half in ("bf16", "fp16") and dtypes == {torch.float32} and not hasattr(trainer.model, "_original_forward"):
        float32 = largest(_replay(trainer, scheduler, sample, images, steps, True)[chosen], as_sampled(True))
    return RatioCheck(
        max_deviation=max(deviation.max().item() for deviation in deviations),
        mean_deviation=torch.cat(deviations).mean().item(),
        same_batch=largest(as_sampled(False), trajectory.log_probs[images[chosen], step]),
        float32=float32,
        precision=weights if half == "no" else f"{half} autocast",
        sampled_at_once=max(batches),
        replayed_at_once=len(images),
        epsilon=args.epsilon,
    )


@contextlib.contextmanager
def _untouched(trainer: Any) -> Iterator[None]:
    """Keep gradients and random states as they are, and check gradients as training will."""
    transformer, args = trainer.pipe.transformer, trainer.args
    gradients = [(p, p.grad) for p in transformer.parameters()]
    checkpointing = args.activation_checkpointing and not transformer.is_gradient_checkpointing
    with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            if checkpointing:
                transformer.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
            yield
        finally:
            if checkpointing:
                transformer.disable_gradient_checkpointing()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            if args.device.type == "cuda":
                torch.cuda.empty_cache()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the time spent inside, from when the device is done with what came before until it is done with this."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


# ---- Judging ----


def _warnings(trainer: Any, report: PreflightReport) -> list[str]:
    args, schedule, found = trainer.args, trainer.window_schedule, []
    elements = math.prod(trainer.policy.latent_shape)
    nats = args.epsilon * elements
    if not NATS / 10 < nats < NATS * 10:
        effect = "nearly every" if nats < NATS else "hardly any"
        found.append(
            f"epsilon={args.epsilon:g} is {nats:.2g} nats over the {elements} elements of an image's latents, the "
            f"paper's is {NATS}: {effect} update will be clipped. Use epsilon={NATS / elements:.1e}."
        )
    if report.ratio is not None and report.ratio.share >= 0.1:
        size = report.replay_batch_size or _pass_size(args, _trained_steps(trainer))
        found.append(
            f"Rounding moves the ratio by up to {report.ratio.share:.0%} of the clip range. Sample and replay in "
            f"batches of one size (sample_batch_size={size}, replay_batch_size={size}), or compute in float32."
        )
    if args.window_strategy not in ("frozen", "random") and report.iterations < schedule.sweep_length:
        found.append(
            f"The run ends before the window has been everywhere, which takes {schedule.sweep_length} iterations. "
            f"Use window_interval={max(1, report.iterations // len(schedule.stays))}, or a larger window_stride."
        )
    if report.device_memory and (report.memory_peak or 0) > 0.9 * report.device_memory:
        found.append(
            f"The peak comes near the {in_bytes(report.device_memory)} of the device. A smaller replay_batch_size, or "
            "gradient_checkpointing=True, takes fewer activations; a smaller sample_batch_size or decode_batch_size "
            "less in sampling. None of them changes the result."
        )
    return found


def _sharded(trainer: Any) -> bool:
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def _trained(trainer: Any) -> list[nn.Parameter]:
    return [p for p in trainer.pipe.transformer.parameters() if p.requires_grad]


def _trained_steps(trainer: Any) -> int:
    """Window steps of each image that are trained in an iteration."""
    size = trainer.window_schedule.schedule(0).size
    return len(draw_steps(trainer.args.seed, 0, size, trainer.args.window_train_fraction))


def _pass_size(args: Any, trained_steps: int) -> int:
    """Transitions in one forward and backward pass."""
    whole = args.per_device_train_batch_size * trained_steps
    return whole if args.reuse_rollout_graph else min(whole, args.replay_batch_size or whole)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.nbytes for tensor in tensors for part in _parts(tensor))


def _parts(tensor: Tensor) -> list[Tensor]:
    """What a quantised tensor of torchao holds; its own `nbytes` is that of the numbers it stands for."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # type: ignore[attr-defined]
