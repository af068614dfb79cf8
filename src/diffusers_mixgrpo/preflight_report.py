"""What [`preflight`] found out, in numbers and in words."""

from dataclasses import dataclass, field


@dataclass
class RatioCheck:
    """
    The ratio of new to old probability before any update, which would be 1 but for rounding.

    Args:
        max_deviation, mean_deviation (`float`): Of `|ratio - 1|` over the transitions of the first optimizer step.
        same_batch (`float`): The largest when they are replayed in the batches that they were sampled in.
        float32 (`float`, *optional*): The largest in float32, in the batches of training; `None` if not tried.
        precision (`str`): What the transformer computes in: `"float32 weights"`, or `"bf16 autocast"`.
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
        """What makes the ratio differ from 1, in words."""
        if self.max_deviation == 0:
            return "nothing, it is 1"
        if self.same_batch > self.max_deviation / 10:
            return "the forward pass gives other numbers each time (dropout, or kernels that are not deterministic)"
        shapes = f"batch shape (sampled {self.sampled_at_once} at once, replayed {self.replayed_at_once})"
        if self.float32 is not None and self.float32 < self.max_deviation / 2:
            return f"{self.precision}: {self.max_deviation:.1g}; {shapes} in float32: {self.float32:.1g}"
        return f"{shapes} with {self.precision}: {self.max_deviation:.1g}"

    def __str__(self) -> str:
        verdict = "fine" if self.share < 0.1 else "felt" if self.share < 1 else "larger than the clip range"
        return (
            f"max |ratio - 1| = {self.max_deviation:.2g}, mean {self.mean_deviation:.2g}\n"
            f"what makes it differ from 1: {self.cause}; replayed in the batches of sampling: {self.same_batch:.1g}\n"
            f"{self.share:.2%} of the clip range, epsilon={self.epsilon:g}: {verdict}"
        )


@dataclass
class PreflightReport:
    """
    What [`preflight`] found out. `str(report)` is the report to read.

    Args:
        batch (`list[str]`): The batch arithmetic in words.
        images (`int`): Images of an iteration, per device.
        iterations (`int`): Iterations of the run.
        nfe (`dict[str, float]`):
            Passes of one image through the transformer, per iteration and device, by part: `prefix`, `window`,
            `suffix`, `reference` (with `beta > 0`), `replay forward`, `replay backward`; the mean over the run. A
            backward pass counts as two, or as one where the weights are frozen (LoRA), and as one more with gradient
            checkpointing. All images are taken to have an advantage; those without are not replayed.
        nfe_per_image (`float`): Steps from noise to picture: `nfe` in the logs.
        memory (`dict[str, int | None]`): Bytes per device by part while training; `None` where not known.
        sampling_memory (`int`, *optional*): Bytes that sampling and decoding take at their peak, on CUDA.
        device_memory (`int`, *optional*): Bytes that the device has, on CUDA.
        seconds (`dict[str, float]`): Per iteration: `sampling`, `decoding`, `training`, the mean over the run. Without
            rewards, evaluations and the optimizer's own arithmetic.
        ratio ([`RatioCheck`], *optional*): The ratio before the first update.
        warnings (`list[str]`): What should be changed, and to what.
        replay_batch_size (`int`, *optional*): Transitions in one pass of training that were found to fit into memory,
            where [`MixGRPOConfig`] leaves that open, on an accelerator.
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
        """Passes computed per image until it is sampled: `nfe_amortized` in the logs."""
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
        total, sampling = sum(self.nfe.values()), f"{self.nfe_amortized:.4g} passes for {self.nfe_per_image:.4g} steps"
        together = f"{'together':<16}{total:>10.5g}, of which an image takes {sampling} to be sampled"
        nfe = [f"{part:<16}{passes:>10.5g}{passes / total:>8.1%}" for part, passes in self.nfe.items()]
        memory = [
            f"{part:<20}{in_bytes(size):>10}" for part, size in [*self.memory.items(), ("peak", self.memory_peak)]
        ]
        times = [f"{part:<16}{in_time(seconds):>10}" for part, seconds in self.seconds.items()]
        run = in_time(self.seconds_per_iteration * self.iterations)
        times.append(f"{'the run':<16}{run:>10}, and the time of rewards and evaluations")
        sections = {
            "Batches": self.batch,
            "NFE (passes of one image through the transformer) per iteration and device": [*nfe, together],
            "Memory per device": memory,
            "Time per iteration": times if self.seconds else ["not measured"],
            "The ratio before the first update": str(self.ratio).splitlines() if self.ratio else ["not measured"],
            "Warnings": self.warnings or ["none"],
        }
        return "\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())


# ---- Words ----


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
