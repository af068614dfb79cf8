"""[`PreflightReport`]: the findings of [`preflight`], in numbers and in words."""

import math
from dataclasses import dataclass, field

from ..mixgrpo_config import MixGRPOConfig


@dataclass
class RatioCheck:
    """
    The ratio of new to old probability before any update: 1, up to rounding.

    Args:
        max_deviation, mean_deviation (`float`): `|ratio - 1|` over the transitions of the first optimizer step.
        same_batch (`float`): Its maximum when they are replayed in the batches that they were sampled in.
        float32 (`float`, *optional*): Its maximum in float32, in the batches of training; `None` if not tried.
        precision (`str`): The transformer's precision: `"float32 weights"`, or `"bf16 autocast"`.
        sampled_at_once, replayed_at_once (`int`): Batch sizes.
        epsilon (`float`): The clip range.
    """

    max_deviation: float
    mean_deviation: float
    same_batch: float
    float32: float | None
    precision: str
    sampled_at_once: int
    replayed_at_once: int
    epsilon: float

    @property
    def share(self) -> float:
        """The largest deviation in units of the clip range."""
        return self.max_deviation / self.epsilon

    @property
    def cause(self) -> str:
        """Why the ratio differs from 1, in words."""
        if self.max_deviation == 0:
            return "nothing, it is 1"
        if self.same_batch > self.max_deviation / 10:
            return "the forward pass is not deterministic (dropout, or nondeterministic kernels)"
        shapes = f"batch shape (sampled {self.sampled_at_once} at once, replayed {self.replayed_at_once})"
        if self.float32 is not None and self.float32 < self.max_deviation / 2:
            return f"{self.precision}: {self.max_deviation:.1g}; {shapes} in float32: {self.float32:.1g}"
        return f"{shapes} with {self.precision}: {self.max_deviation:.1g}"

    def __str__(self) -> str:
        verdict = "fine" if self.share < 0.1 else "noticeable" if self.share < 1 else "larger than the clip range"
        return (
            f"max |ratio - 1| = {self.max_deviation:.2g}, mean {self.mean_deviation:.2g}\n"
            f"cause: {self.cause}; replayed in the batches of sampling: {self.same_batch:.1g}\n"
            f"{self.share:.2%} of the clip range, epsilon={self.epsilon:g}: {verdict}"
        )


@dataclass
class PreflightReport:
    """
    The findings of [`preflight`]. `str(report)` is the report to read.

    Args:
        batch (`list[str]`): The batch sizes in words.
        images (`int`): Images of an iteration, per device.
        iterations (`int`): Iterations of the run.
        nfe (`dict[str, float]`):
            Forward passes of one image, per iteration and device, by part: `prefix`, `window`, `suffix`, `reference`
            (with `beta > 0`), `replay forward`, `replay backward`; the mean over the run. A backward pass counts as
            two, or as one where the weights are frozen (LoRA), and as one more with gradient checkpointing. All
            images are assumed to have an advantage; those without are not replayed.
        nfe_per_image (`float`): Denoising steps of one image: `nfe` in the logs.
        memory (`dict[str, int | None]`): Bytes per device by part in training; `None` if not known.
        sampling_memory (`int`, *optional*): Bytes of sampling and decoding at their peak, on CUDA.
        device_memory (`int`, *optional*): Bytes of the device, on CUDA.
        seconds (`dict[str, float]`): Seconds per iteration of `sampling`, `decoding` and `training`, the mean over the
            run, without rewards, evaluations and the optimizer's own arithmetic.
        ratio ([`RatioCheck`], *optional*): The ratio before the first update.
        warnings (`list[str]`): Settings that should be changed, and to which values.
        replay_batch_size (`int`, *optional*): The number of transitions per forward and backward pass that was found
            to fit into memory, if [`MixGRPOConfig`] does not set it, on an accelerator.
    """

    batch: list[str]
    images: int
    iterations: int
    nfe: dict[str, float]
    nfe_per_image: float
    memory: dict[str, int | None]
    sampling_memory: int | None = None
    device_memory: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ratio: RatioCheck | None = None
    warnings: list[str] = field(default_factory=list)
    replay_batch_size: int | None = None

    @property
    def nfe_amortized(self) -> float:
        """Forward passes computed to sample an image: `nfe_amortized` in the logs."""
        return sum(self.nfe[part] for part in ("prefix", "window", "suffix")) / self.images

    @property
    def memory_peak(self) -> int | None:
        """Bytes at the peak of training, or of sampling if that takes more. `None` if a part is not known."""
        if None in self.memory.values():
            return None
        training = sum(size or 0 for size in self.memory.values())
        passing = sum(self.memory.get(part) or 0 for part in ("gradients", "activations", "rollout"))
        return max(training, training - passing + (self.sampling_memory or 0))

    @property
    def seconds_per_iteration(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        sections = {
            "Batches": self.batch,
            "NFE (forward passes of one image) per iteration and device": self._nfe_lines(),
            "Memory per device": self._memory_lines(),
            "Time per iteration": self._time_lines(),
            "The ratio before the first update": str(self.ratio).splitlines() if self.ratio else ["not measured"],
            "Warnings": self.warnings or ["none"],
        }
        return "\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())

    def _nfe_lines(self) -> list[str]:
        total = sum(self.nfe.values())
        lines = [f"{part:<16}{passes:>10.5g}{passes / total:>8.1%}" for part, passes in self.nfe.items()]
        sampling = f"{self.nfe_amortized:.4g} passes for {self.nfe_per_image:.4g} denoising steps"
        return [*lines, f"{'total':<16}{total:>10.5g}, of which sampling takes {sampling} of each image"]

    def _memory_lines(self) -> list[str]:
        parts = {**self.memory, "peak": self.memory_peak}
        return [f"{part:<20}{in_bytes(size):>10}" for part, size in parts.items()]

    def _time_lines(self) -> list[str]:
        if not self.seconds:
            return ["not measured"]
        run = in_time(self.seconds_per_iteration * self.iterations)
        lines = [f"{part:<16}{in_time(seconds):>10}" for part, seconds in self.seconds.items()]
        return [*lines, f"{'the run':<16}{run:>10}, plus rewards and evaluations"]


# ---- Words ----


def describe_batches(
    settings: MixGRPOConfig,
    num_prompts: int,
    num_devices: int,
    trained_steps: int,
    visited_steps: list[int],
    found_pass_size: int | None = None,
) -> list[str]:
    """
    The batch sizes of a run in words.

    Args:
        settings ([`MixGRPOConfig`]): The configuration.
        num_prompts (`int`): Prompts of the dataset.
        num_devices (`int`): Devices of the run.
        trained_steps (`int`): Window steps of each image that are trained in an iteration.
        visited_steps (`list[int]`): Denoising steps that the window visits in the run.
        found_pass_size (`int`, *optional*): Transitions per pass that fit into memory, if they were searched for.
    """
    prompts = settings.prompts_per_iteration
    images = prompts * settings.num_generations
    steps = settings.optimizer_steps_per_iteration
    per_epoch = max(1, num_prompts // (prompts * num_devices))
    total = settings.max_steps
    if total <= 0:
        total = math.ceil(settings.num_train_epochs * per_epoch * steps)
    iterations = math.ceil(total / steps)
    own = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    whole = settings.per_device_train_batch_size * trained_steps
    if found_pass_size:
        at_once = f"{found_pass_size} in one pass, as memory allows"
    elif settings.reuse_rollout_graph:
        at_once = f"{whole} in one pass"
    else:
        at_once = f"{min(whole, settings.replay_batch_size or whole)} in one pass"
    lines = [
        f"{count(images, 'image')} of {count(prompts, 'prompt')} per device, "
        f"{count(steps, 'optimizer step')} per iteration"
    ]
    if num_devices > 1:
        lines.append(
            f"over {num_devices} devices: {images * num_devices} images of {prompts * num_devices} prompts per "
            f"iteration, {own * num_devices} images in an optimizer step"
        )
    lines += [
        f"an optimizer step: {count(own, 'image')} x {count(trained_steps, 'window step')} = "
        f"{count(own * trained_steps, 'transition')} per device, up to {at_once}",
        f"the run: {count(iterations, 'iteration')} = {count(total, 'optimizer step')} = "
        f"{iterations / per_epoch:.3g} epochs over {count(num_prompts, 'prompt')}",
        f"the window visits steps {ranges(visited_steps)} of 0-{settings.num_inference_steps - 1}",
    ]
    return lines


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def in_bytes(size: int | None) -> str:
    if size is None:
        return "unknown"
    unit, name = next((u for u in ((1e9, "GB"), (1e6, "MB")) if size >= u[0]), (1e3, "KB"))
    return f"{size / unit:.1f} {name}"


def in_time(seconds: float) -> str:
    unit, name = next((u for u in ((3600, "h"), (60, "min")) if seconds >= 2 * u[0]), (1, "s"))
    return f"{seconds / unit:.2f} {name}"
