"""
A flow-matching scheduler that takes a window of its steps as an SDE, and all the others as an ODE.

Importing this module is all that a saved pipeline which uses the scheduler needs in order to load again: diffusers
looks the class up under the module path in `model_index.json`, among the modules that are imported already.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .argument_rules import SWITCH, any_of, check, choice, integer, number, only, optional
from .core.scheduler_configs import flow_matching_config
from .core.transitions import SDE_TYPES, SDEType, Transitions, gaussian_log_prob, predict_x0, sde_transition


logger = logging.get_logger(__name__)

FlowSigmas = Literal[False, "unipc", "dpmsolver"]
ODESolver = Literal["euler", "dpmsolver++", "unipc"]
SolverType = Literal["midpoint", "heun"]
Generators = torch.Generator | list[torch.Generator]

LEAST_STD = 2.0**-23
"""
Least standard deviation of a stochastic step. Float32 rounds a latent of size 1 by up to half of this, so that with
less the difference between a sample and its mean, which the log-prob is made of, would be rounding.
"""
LEAST_ETA = 0.01
"""
Least `eta`. Over schedules of 1,000 steps or fewer, a step's std is at least about `1e-4 * eta` (`flow` and `cps`, at
the end of the schedule), which is then above `LEAST_STD`. The schedule that is set is checked against that itself.
"""
MOST_ETA = 3.0
"""
Most `eta`. Each of the first `flow` steps multiplies a deviation by up to `|1 - eta**2 / 2|`: by 3.5 here, and by 49
with an `eta` of 10, which drives latents out of all bounds.
"""

_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# The shift that `mu` stands for is its exponential.
_MU = optional(number(-2.3, 4.6))

SCHEDULER_RULES = {
    "num_train_timesteps": integer(1, 10_000),
    "shift": number(0.1, 100),
    "use_dynamic_shifting": SWITCH,
    "base_shift": _MU,
    "max_shift": _MU,
    "base_image_seq_len": integer(1),
    "max_image_seq_len": integer(1),
    "invert_sigmas": SWITCH,
    "shift_terminal": optional(number(0, 0.99)),
    **dict.fromkeys(_SPACINGS, SWITCH),
    "time_shift_type": choice(["exponential", "linear"]),
    "stochastic_sampling": only(False, "it has no part in an ODE step"),
    "use_flow_sigmas": any_of(only(False), choice(["unipc", "dpmsolver"])),
    "sde_type": choice(SDE_TYPES),
    "eta": number(LEAST_ETA, MOST_ETA),
    "window_start": integer(0),
    "window_size": any_of(integer(0), choice(["all"])),
    "ode_solver": choice(get_args(ODESolver)),
    "solver_order": integer(1, 3),
    "solver_type": choice(get_args(SolverType)),
    "suffix_ratio": number(0, 1, above=True),
    "prefix_ratio": number(0, 1, above=True),
}
"""What each argument of [`MixedODESDEScheduler`] must be."""


@dataclass
class MixedODESDESchedulerOutput(BaseOutput):
    """
    Output of [`MixedODESDEScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch, ...)`):
            The sample after the step, in the dtype of the model output.
        log_prob (`torch.Tensor` of shape `(batch,)`, *optional*):
            Log-density of `prev_sample` under the transition, averaged over latent elements. `None` for an ODE step.
        prev_sample_mean (`torch.Tensor` of shape `(batch, ...)`):
            Mean of the transition, in float32 or better. For an ODE step it is `prev_sample`.
        std_dev (0-d `torch.Tensor`):
            Standard deviation of the transition. 0 for an ODE step.
        pred_original_sample (`torch.Tensor` of shape `(batch, ...)`):
            The clean sample that the model predicts from here, in float32 or better.
    """

    prev_sample: Tensor
    log_prob: Tensor | None = None
    prev_sample_mean: Tensor | None = None
    std_dev: Tensor | None = None
    pred_original_sample: Tensor | None = None


class MixedODESDEScheduler(FlowMatchEulerDiscreteScheduler):
    """
    Flow-matching scheduler with a sliding window of stochastic steps, as in MixGRPO (https://arxiv.org/abs/2507.21802).

    Steps `window_start <= i < window_start + window_size` sample a Gaussian transition and report its log-probability;
    every other step is deterministic. It is a drop-in replacement of [`FlowMatchEulerDiscreteScheduler`]: a stock
    pipeline runs, saves and loads it, and with `window_size=0` gives the same images bit for bit. As such a pipeline
    passes [`step`] no generator and keeps no log-probs, the scheduler holds both: `generator`, `window_log_probs`.

    The window is given in steps of the schedule that was asked for, of `T = num_inference_steps` steps. Compression
    (`prefix_ratio`, `suffix_ratio`; MixGRPO-Flash) then runs `ceil(ratio * n)` steps where there were `n` before or
    after the window, at least one, evenly spaced along the whole schedule before shifting. The noise levels that the
    window sees stay what they were; `window` has its indices in the schedule that is run.

    Args:
        num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len,
        shift_terminal, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type:
            As in [`FlowMatchEulerDiscreteScheduler`].
        invert_sigmas (`bool`, defaults to `False`):
            As in the parent (Mochi, OmniGen): noise levels rise from 0 at pure noise to 1, and the model predicts
            (image - noise). Only with `ode_solver="euler"` and without compression.
        stochastic_sampling (`bool`, defaults to `False`):
            Argument of the parent that must stay `False`.
        use_flow_sigmas (`False` or `str`, defaults to `False`):
            Noise levels and timesteps where [`set_timesteps`] is given none: those of the parent, or those that
            diffusers' `"unipc"` or `"dpmsolver"` schedulers have with `use_flow_sigmas=True`. [`from_config`] sets it.
        sde_type (`str`, defaults to `"flow"`):
            The transition inside the window: `"flow"`, `"dance"`, `"cps"` or `"dpm"`; see
            [`~core.transitions.sde_transition`].
        eta (`float`, defaults to 0.7):
            Amount of noise inside the window, in [0.01, 3]; for `cps` at most 1; `dpm` ignores it.
        window_start (`int`, defaults to 0):
            First stochastic step.
        window_size (`int` or `"all"`, defaults to 4):
            Number of stochastic steps; 0 for none. `"all"` is every step from `window_start` on but the last. The last
            step is never stochastic: its noise would stay in the image.
        ode_solver (`str`, defaults to `"euler"`):
            The solver outside the window: `"euler"`, or diffusers' `"dpmsolver++"` or `"unipc"` multistep schedulers.
            The window's predictions are part of their history.
        solver_order (`int`, defaults to 2):
            Order of a multistep solver, 1 to 3.
        solver_type (`str`, defaults to `"midpoint"`):
            Form of the second order of `dpmsolver++`: `"midpoint"` or `"heun"`.
        suffix_ratio (`float`, defaults to 1.0):
            Share of the steps after the window to run, in (0, 1].
        prefix_ratio (`float`, defaults to 1.0):
            Share of the steps before the window to run, in (0, 1].

    Attributes:
        generator (`torch.Generator` or list of them, one per sample, *optional*):
            Source of the window's noise when [`step`] gets neither a generator nor noise. Not part of the config.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]
    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        use_flow_sigmas: FlowSigmas = False,
        sde_type: SDEType = "flow",
        eta: float = 0.7,
        window_start: int = 0,
        window_size: int | Literal["all"] = 4,
        ode_solver: ODESolver = "euler",
        solver_order: int = 2,
        solver_type: SolverType = "midpoint",
        suffix_ratio: float = 1.0,
        prefix_ratio: float = 1.0,
    ):
        self._check_config()
        # All arguments by name: diffusers then leaves the record of which values are defaults to the outer `__init__`.
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        self.num_inference_steps = None
        self.generator: Generators | None = None
        self._window = range(0)
        self._schedule_arguments: dict | None = None
        self._solver: SchedulerMixin | None = None
        self._window_log_probs: list[Tensor] = []

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """
        A scheduler from the configuration of any scheduler of flow matching: see
        [`~core.scheduler_configs.flow_matching_config`].

        Raises:
            `ValueError`: If it is the configuration of a scheduler that is not of flow matching.
        """
        if isinstance(config, dict):
            config = flow_matching_config(config)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def window(self) -> range:
        """Indices of the stochastic steps in the schedule that is run; empty before [`set_timesteps`]."""
        return self._window

    @property
    def window_log_probs(self) -> Tensor | None:
        """
        Log-probs of the current or last run's stochastic steps so far, `(batch, steps)`, detached; `None` without any.
        """
        return torch.stack(self._window_log_probs, dim=1) if self._window_log_probs else None

    def is_sde_step(self, step_index: int) -> bool:
        """Whether step `step_index` of the schedule that is run is stochastic."""
        return step_index in self._window

    def transitions(self) -> Transitions:
        """
        The stochastic steps of the schedule that is set, for a replay that no longer needs the scheduler.

        Raises:
            `ValueError`: If the schedule is not set, or with `invert_sigmas`.
        """
        if self.num_inference_steps is None:
            raise ValueError("The schedule is not set. Call `set_timesteps` first.")
        if self.config.invert_sigmas:
            raise ValueError("`invert_sigmas` must be False for a replay without the scheduler, got True.")
        start, stop = self._window.start, self._window.stop
        return Transitions(
            sde_type=self.config.sde_type,
            eta=self.config.eta,
            sigmas=self.sigmas[start:stop],
            next_sigmas=self.sigmas[start + 1 : stop + 1],
            sigma_max=self.sigmas[1],
            timesteps=self.timesteps[start:stop],
        )

    def set_window(self, start: int, size: int | Literal["all"]) -> None:
        """
        Moves the window, for the schedule that is set but not begun, if there is one, and for those to come.

        Args:
            start (`int`): First stochastic step, in steps of the uncompressed schedule.
            size (`int` or `"all"`): Number of stochastic steps.

        Raises:
            `ValueError`: In mid-run, or if the window does not fit the schedule.
        """
        if self.step_index is not None and self.step_index < len(self.timesteps):
            raise ValueError(
                f"`set_window({start}, {size!r})` came after step {self.step_index} of {len(self.timesteps)}: the "
                "window can only move between runs. Call `set_timesteps` to begin a new run first."
            )
        _check_window(start, size)
        pending = self._schedule_arguments if self.step_index is None else None
        if pending is not None:
            _resolve_window(_requested_steps(**pending), start, size)
        # A value that was left to its default has to leave that list too, or `from_config` would drop the new one.
        defaults = [k for k in self.config.get("_use_default_values", []) if k not in ("window_start", "window_size")]
        self.register_to_config(window_start=start, window_size=size, _use_default_values=defaults)
        if pending is not None:
            begin_index = self.begin_index
            self.set_timesteps(**pending)
            self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """
        Sets the schedule of a run: the parent's, with the steps before and after the window compressed if asked for.

        Args:
            num_inference_steps (`int`, *optional*): Steps `T` of the uncompressed schedule.
            device (`str` or `torch.device`, *optional*): Where `timesteps` and `sigmas` live.
            sigmas (`list[float]`, *optional*): `T` noise levels before shifting; evenly spaced ones if `None`.
            mu (`float`, *optional*): The shift, with `use_dynamic_shifting`.
            timesteps (`list[float]`, *optional*): `T` timesteps that the model is given, in the place of those of the
                noise levels. Compression interpolates them.

        Raises:
            `ValueError`: If the window does not fit `T` steps.
        """
        arguments: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "sigmas": sigmas,
            "mu": mu,
            "timesteps": timesteps,
        }
        # 1. Find the window, before anything is changed
        total = _requested_steps(**arguments)
        start, stop = _resolve_window(total, self.config.window_start, self.config.window_size)
        if self.config.use_flow_sigmas and sigmas is None and timesteps is None:
            arguments["sigmas"] = self._flow_times(total)
            arguments["timesteps"] = self._flow_timesteps(arguments["sigmas"], mu)

        # 2. The parent's schedule, compressed if need be: on the host, which then waits for no device
        super().set_timesteps(**arguments)
        self._schedule_arguments = {**arguments, "device": device}
        prefix = _compressed_length(self.config.prefix_ratio, start)
        suffix = _compressed_length(self.config.suffix_ratio, total - stop)
        if prefix < start or suffix < total - stop:
            self._compress(start, stop, prefix, suffix)
        self._window = range(prefix, prefix + stop - start)
        self._check_sigmas(mu)

        # 3. Begin a new record and a new solver history
        self._window_log_probs = []
        self._solver = self._make_solver()

        # 4. To the device once, so that no step copies anything there
        if device is not None:
            no_wait = torch.device(device).type != "mps"  # where it may read freed memory (pytorch issue 189690)
            self.timesteps = self.timesteps.to(device, non_blocking=no_wait)
            self.sigmas = self.sigmas.to(device, non_blocking=no_wait)
            if self._solver is not None:
                self._solver.sigmas = self._solver.sigmas.to(device, non_blocking=no_wait)

    def _compress(self, start: int, stop: int, prefix: int, suffix: int) -> None:
        """Replaces the points before `start` by `prefix` points, and those from `stop` on by `suffix`."""
        total = len(self.timesteps)
        arguments = self._schedule_arguments
        assert arguments is not None
        # 1. The times before shifting, of which the parent keeps no record
        given = arguments["timesteps"]
        if arguments["sigmas"] is not None:
            times = np.asarray(arguments["sigmas"], dtype=np.float32)
        elif given is not None:
            times = np.asarray(given, dtype=np.float32) / self.config.num_train_timesteps
        else:
            bounds = self._sigma_to_t(self.sigma_max), self._sigma_to_t(self.sigma_min)
            times = np.linspace(*bounds, total) / self.config.num_train_timesteps

        # 2. New points lie between the steps of the whole schedule. Times are linear between steps.
        before = np.linspace(0, start, prefix + 1)[:-1]
        after = np.linspace(stop, total, suffix + 1)[:-1]
        position = np.concatenate([before, np.arange(start, stop), after])
        new_times = np.interp(position, np.arange(total + 1), np.append(times, 0.0))

        # 3. Shift them like the rest, and the last old one with them: a stretch to `shift_terminal` goes by it
        shifted = self._shifted(np.append(new_times, times[-1]), arguments["mu"])

        # 4. Steps that the two schedules share keep their noise level to the last bit
        old = self.sigmas.numpy()
        new = np.where(position % 1 == 0, old[position.astype(int)], shifted[:-1]).astype(np.float32)
        self.sigmas = torch.from_numpy(np.append(new, np.float32(0)))
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        if given is not None:
            between = np.interp(position, np.arange(total + 1), np.append(np.asarray(given, dtype=np.float32), 0.0))
            if self.config.use_flow_sigmas:
                exact = between[position % 1 == 0]
                between = self._cut_off(shifted[:-1])
                between[position % 1 == 0] = exact
            self.timesteps = torch.from_numpy(between.astype(np.float32))
        self.num_inference_steps = len(self.timesteps)

    def _shifted(self, times: np.ndarray, mu: float | None) -> np.ndarray:
        """The noise levels of times before shifting, as the parent has them."""
        if self.config.use_dynamic_shifting:
            times = self.time_shift(mu, 1.0, times)
        else:
            times = self.shift * times / (1 + (self.shift - 1) * times)
        return self.stretch_shift_to_terminal(times) if self.config.shift_terminal else times

    def _flow_times(self, total: int) -> np.ndarray:
        """The times before shifting of diffusers' multistep schedulers: UniPC's begin at 1, the others below it."""
        least = 1 / self.config.num_train_timesteps
        times = np.linspace(1, least, total + 1)[:-1]
        return times if self.config.use_flow_sigmas == "unipc" else (1 - least) * np.linspace(1, 0, total + 1)[:-1]

    def _flow_timesteps(self, times: np.ndarray, mu: float | None) -> np.ndarray:
        if self.config.use_dynamic_shifting and mu is None:
            raise ValueError("`mu` must be a number with `use_dynamic_shifting=True`, got None. Pass it.")
        return self._cut_off(self._shifted(times, mu))

    def _cut_off(self, sigmas: np.ndarray) -> np.ndarray:
        """Timesteps as the multistep schedulers have them: integers, from noise levels of a millionth below 1."""
        return np.trunc(np.minimum(sigmas, 1 - 1e-6) * self.config.num_train_timesteps)

    def transition(self, model_output: Tensor, sample: Tensor, step_index: int | Tensor) -> tuple[Tensor, Tensor]:
        """
        The Gaussian `N(mean, std_dev^2)` of a stochastic step: what [`step`] samples and [`log_prob`] scores.

        Stateless but for the schedule, and differentiable in `model_output` and `sample`.

        Args:
            model_output (`torch.Tensor` of shape `(batch, ...)`): The predicted velocity.
            sample (`torch.Tensor` of shape `(batch, ...)`): The sample before the step.
            step_index (`int` or `torch.LongTensor` of shape `(batch,)`):
                Step in the schedule that is run, in the window or not, but not the last.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The mean, of the shape of `sample`, and the std, 0-d or
            `(batch, 1, ...)`; both in float32 or better.
        """
        self._check_step_index(step_index)
        sigmas = self._noise_levels(self.sigmas.to(sample.device))
        if isinstance(step_index, Tensor):
            step_index = step_index.to(sample.device).reshape(-1, *[1] * (sample.ndim - 1))
        return sde_transition(
            self.config.sde_type,
            self._velocity(model_output),
            sample,
            sigma=sigmas[step_index],
            sigma_next=sigmas[step_index + 1],
            eta=self.config.eta,
            sigma_max=sigmas[1],
        )

    def _noise_levels(self, sigmas: Tensor) -> Tensor:
        """The parent's `sigmas` as they are without `invert_sigmas`: 1 is noise, 0 the image."""
        return 1 - sigmas if self.config.invert_sigmas else sigmas

    def _velocity(self, model_output: Tensor) -> Tensor:
        """What the model predicts, as it is without `invert_sigmas`: (noise - image)."""
        return -model_output if self.config.invert_sigmas else model_output

    def log_prob(self, model_output: Tensor, sample: Tensor, prev_sample: Tensor, step_index: int | Tensor) -> Tensor:
        """
        Log-probability of a recorded transition under a (new) model output, averaged over latent elements.

        Given what [`step`] was given, and the `prev_sample` that it returned, it is the same number bit for bit.

        Args:
            model_output (`torch.Tensor` of shape `(batch, ...)`): The velocity predicted at `sample`.
            sample, prev_sample (`torch.Tensor` of shape `(batch, ...)`): Before and after the step, as stored.
            step_index (`int` or `torch.LongTensor` of shape `(batch,)`): Step of each sample.

        Returns:
            `torch.Tensor` of shape `(batch,)`, differentiable in `model_output`.
        """
        mean, std_dev = self.transition(model_output, sample, step_index)
        return gaussian_log_prob(prev_sample, mean, std_dev)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself, for pipelines (such as Bria) that call this on all but the parent class."""
        return sample

    def step(  # without churn, which has no transition to report
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
    ) -> MixedODESDESchedulerOutput | tuple:
        """
        One step of the schedule: stochastic inside the window, deterministic outside.

        Args:
            model_output (`torch.Tensor` of shape `(batch, ...)`): The predicted velocity.
            timestep (`float` or `torch.Tensor`):
                The current one of `self.timesteps`. With `use_flow_sigmas` a tensor may be of integers.
            sample (`torch.Tensor` of shape `(batch, ...)`): The sample at `timestep`.
            generator (`torch.Generator` or list of them, one per sample, *optional*):
                Source of the noise; `self.generator` if `None`.
            variance_noise (`torch.Tensor` of the shape of `sample`, *optional*):
                Standard normal noise to use instead of a generator.
            return_dict (`bool`, defaults to `True`): Whether to return a [`MixedODESDESchedulerOutput`] or a tuple.
            per_token_timesteps (`torch.Tensor` of shape `(batch, tokens)`, *optional*):
                A timestep for each token, as in the parent (LTXCondition). Only with `window_size=0` and
                `ode_solver="euler"`, since such a step has no single transition.

        Returns:
            [`MixedODESDESchedulerOutput`] or a tuple of its five values.

        Raises:
            `ValueError`: For an integer timestep, noise of another shape, a schedule that is not set, or timesteps per
                token with a window or another solver.
        """
        # 1. Find the step
        if self.config.use_flow_sigmas and isinstance(timestep, Tensor) and not timestep.is_floating_point():
            timestep = timestep.to(self.timesteps.dtype)  # whole numbers then: some pipelines of UniPC pass integers
        self._check_step(timestep, sample, variance_noise)
        if self.step_index is None:
            self._init_step_index(timestep)
            self._window_log_probs = []
            self._warn_of_steps_left_out()
        index = self.step_index
        sigma = self.sigmas[index]
        if per_token_timesteps is not None:
            self._check_per_token()
            sigma = (per_token_timesteps / self.config.num_train_timesteps)[..., None]
        pred_original_sample = predict_x0(self._velocity(model_output), sample, self._noise_levels(sigma))

        # 2. Take it
        if per_token_timesteps is not None:
            token_step = super().step(model_output, timestep, sample, per_token_timesteps=per_token_timesteps)
            prev_sample = token_step.prev_sample
            log_prob, mean, std_dev = None, prev_sample, torch.zeros((), device=sample.device)
        elif not self.is_sde_step(index):
            prev_sample = self._ode_step(model_output, timestep, sample)
            log_prob, mean, std_dev = None, prev_sample, torch.zeros((), device=sample.device)
        else:
            mean, std_dev = self.transition(model_output, sample, index)
            if variance_noise is None:
                generator = self.generator if generator is None else generator
                variance_noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            # The log-prob is that of the sample as stored, so a replay scores the number that the model will see.
            prev_sample = (mean + std_dev * variance_noise.to(mean)).to(model_output.dtype)
            log_prob = gaussian_log_prob(prev_sample, mean, std_dev)
            self._window_log_probs.append(log_prob.detach())
            self._feed_solver(pred_original_sample)
            self._step_index += 1

        if not return_dict:
            return prev_sample, log_prob, mean, std_dev, pred_original_sample
        return MixedODESDESchedulerOutput(prev_sample, log_prob, mean, std_dev, pred_original_sample)

    def _ode_step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        if self._solver is None:
            return super().step(model_output, timestep, sample, return_dict=False)[0]
        self._solver._step_index = self._step_index
        # float32, since a multistep solver subtracts predictions that lie close together
        dtype = torch.promote_types(torch.float32, model_output.dtype)
        prev_sample = self._solver.step(model_output.to(dtype), timestep, sample.to(dtype), return_dict=False)[0]
        self._step_index += 1
        return prev_sample.to(model_output.dtype)

    def _make_solver(self) -> SchedulerMixin | None:
        """diffusers' multistep scheduler with the noise levels of this run, on the host, and an empty history."""
        if self.config.ode_solver == "euler":
            return None
        options = {
            "num_train_timesteps": self.config.num_train_timesteps,
            "solver_order": self.config.solver_order,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }
        if self.config.ode_solver == "unipc":
            solver = UniPCMultistepScheduler(**options)
            # It steps off sigma == 1 by a millionth, where its corrector would be singular.
            solver.set_timesteps(sigmas=self.sigmas[:-1].numpy())
        else:
            solver = DPMSolverMultistepScheduler(solver_type=self.config.solver_type, **options)
            solver.set_timesteps(len(self.timesteps))
            solver.sigmas = self.sigmas
        return solver

    def _feed_solver(self, pred_original_sample: Tensor) -> None:
        """Adds the prediction of a stochastic step to the history of the solver."""
        if self._solver is None:
            return
        solver = self._solver
        solver.model_outputs = [*solver.model_outputs[1:], pred_original_sample]
        solver.lower_order_nums = min(solver.lower_order_nums + 1, self.config.solver_order)
        # UniPC corrects a sample by the step that led to it. This one was led to by noise: nothing to correct.
        solver.last_sample = None

    def repeat_history(self, repeats: int) -> None:
        """
        Repeats each sample of the solver's history, as `latents.repeat_interleave(repeats, dim=0)` does the latents.

        For a rollout that takes the steps before the window once per prompt, and the others once per image.
        """
        if self._solver is not None:
            for name in ("model_outputs", "last_sample"):
                values = getattr(self._solver, name, None)
                if isinstance(values, list):
                    values = [None if v is None else v.repeat_interleave(repeats, dim=0) for v in values]
                elif values is not None:
                    values = values.repeat_interleave(repeats, dim=0)
                setattr(self._solver, name, values)

    def _check_config(self) -> None:
        config = self.config
        for name, rule in SCHEDULER_RULES.items():
            check(name, config[name], rule)
        if config.sde_type == "cps" and config.eta > 1:
            raise ValueError(f"`eta` must be in [{LEAST_ETA}, 1] for `sde_type='cps'`, got {config.eta!r}.")
        if config.max_image_seq_len <= config.base_image_seq_len:
            raise ValueError(
                f"`max_image_seq_len` must be more than base_image_seq_len={config.base_image_seq_len}, since a "
                f"pipeline interpolates between the two, got {config.max_image_seq_len}."
            )
        is_plain = config.ode_solver == "euler" and not config.use_flow_sigmas
        if config.invert_sigmas and not (is_plain and min(config.prefix_ratio, config.suffix_ratio) == 1):
            raise ValueError(
                "`invert_sigmas` must be False with a multistep `ode_solver`, `use_flow_sigmas`, or `prefix_ratio` or "
                "`suffix_ratio` below 1, got True."
            )
        spacings = [name for name in _SPACINGS if config[name]]
        if len(spacings) > 1:
            raise ValueError(f"`{spacings[1]}` must be False with {spacings[0]}=True, got True. Choose one of them.")
        for name in spacings:
            if config.use_flow_sigmas:
                raise ValueError(f"`{name}` must be False with use_flow_sigmas={config.use_flow_sigmas!r}, got True.")
            if min(config.prefix_ratio, config.suffix_ratio) < 1:
                raise ValueError(f"`{name}` must be False with `prefix_ratio` or `suffix_ratio` below 1, got True.")

    def _check_sigmas(self, mu: float | None) -> None:
        """Check that no step is too small for float32. On the host."""
        sigmas, window = self._noise_levels(self.sigmas), slice(self._window.start, self._window.stop)
        now, after = sigmas[:-1], sigmas[1:]
        is_legal = sigmas.isfinite().all()
        if self.config.ode_solver != "euler":
            is_legal &= (now > after).all()  # a multistep solver divides by the step
        if self._window:
            zeros = torch.zeros_like(now[window])
            _, std = sde_transition(
                self.config.sde_type, zeros, zeros, now[window], after[window], self.config.eta, sigmas[1]
            )
            is_legal &= (std >= LEAST_STD).all()
        if is_legal:
            return
        steps = self.num_inference_steps
        self.num_inference_steps = None  # the schedule is not set
        names = ("eta", "shift", "use_dynamic_shifting", "shift_terminal", "num_train_timesteps", *_SPACINGS)
        arguments = {"num_inference_steps": steps, "mu": mu} | {name: self.config[name] for name in names}
        raise ValueError(
            f"`sigmas` must be finite, and fall in each step by enough for a noise of {LEAST_STD:.1g} or more in the "
            f"window, got {sigmas.tolist()[:8]}... from {', '.join(f'{k}={v!r}' for k, v in arguments.items())}. Take "
            "fewer steps, a shift closer to 1, or a larger `eta`."
        )

    def _check_per_token(self) -> None:
        if self._window or self._solver is not None:
            raise ValueError(
                "`per_token_timesteps` must be None with a window or a multistep solver, since such a step has no "
                f"single transition, got one for each token with window_size={self.config.window_size!r} and "
                f"ode_solver={self.config.ode_solver!r}. Use window_size=0 and ode_solver='euler'."
            )

    def _warn_of_steps_left_out(self) -> None:
        """Say so if a run begins after the window does, as that of an image-to-image pipeline with its `strength`."""
        first, window = self.step_index, self._window
        if window and first > window.start:
            left_out = min(first, window.stop) - window.start
            logger.warning(
                f"The run begins at step {first} of {len(self.timesteps)}, so {left_out} of the window's {len(window)}"
                f" stochastic steps ({window.start} to {window.stop - 1}) are not run and have no log-prob. Raise the "
                "pipeline's `strength`, or move the window with `set_window`."
            )

    def _check_step_index(self, step_index: int | Tensor) -> None:
        last = len(self.sigmas) - 3
        if self.num_inference_steps is None:
            raise ValueError("The schedule is not set. Call `set_timesteps` first.")
        if isinstance(step_index, Tensor):
            if step_index.is_floating_point():
                raise ValueError(f"`step_index` must be an int or a LongTensor, got dtype {step_index.dtype}.")
            # Only a tensor of the host is looked into: for another, the host would have to wait for the device.
            inside = step_index.device.type != "cpu" or bool(((step_index >= 0) & (step_index <= last)).all())
        else:
            inside = 0 <= step_index <= last
        if not inside:
            raise ValueError(f"`step_index` must be in [0, {last}], all steps but the last, got {step_index}.")

    def _check_step(self, timestep: float | Tensor, sample: Tensor, variance_noise: Tensor | None) -> None:
        if self.num_inference_steps is None:
            raise ValueError("The schedule is not set. Call `set_timesteps` first.")
        if not (timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, float)):
            raise ValueError(f"`timestep` must be one of `scheduler.timesteps`, a float, got {timestep!r}.")
        if self.step_index is not None and self.step_index >= len(self.timesteps):
            raise ValueError(f"All {len(self.timesteps)} steps are taken: call `set_timesteps` to begin a new run.")
        if variance_noise is not None and variance_noise.shape != sample.shape:
            raise ValueError(
                f"`variance_noise` must have the sample's shape {tuple(sample.shape)}, got "
                f"{tuple(variance_noise.shape)}."
            )


def _requested_steps(
    num_inference_steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    **_: object,
) -> int:
    """Steps of the uncompressed schedule."""
    for given in (sigmas, timesteps):
        if num_inference_steps is None and given is not None:
            num_inference_steps = len(given)
    if not isinstance(num_inference_steps, numbers.Integral) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be an integer >= 1, got {num_inference_steps!r}.")
    return int(num_inference_steps)


def _resolve_window(total: int, start: int, size: int | str) -> tuple[int, int]:
    """First stochastic step and the one after the last, in a schedule of `total` steps."""
    if start > total - 1:
        raise ValueError(f"`window_start` must be in [0, {total - 1}] for {total} steps, got {start}.")
    if size == "all":
        return start, total - 1
    if start + int(size) > total - 1:
        raise ValueError(
            f"`window_size` must be in [0, {total - 1 - start}] for {total} steps and `window_start={start}`, got "
            f"{size}. The last step is never stochastic."
        )
    return start, start + int(size)


def _check_window(start: int, size: int | str) -> None:
    check("window_start", start, SCHEDULER_RULES["window_start"])
    check("window_size", size, SCHEDULER_RULES["window_size"])


def _compressed_length(ratio: float, steps: int) -> int:
    """`ceil(ratio * steps)`; the rounding keeps 0.28 * 25, which is 7.000000000000001, from becoming 8."""
    return max(min(1, steps), math.ceil(round(ratio * steps, 9)))
