"""
The mathematics of one stochastic step: pure functions of tensors, and [`Transitions`], the steps of one window.

Rectified flow: `x_sigma = (1 - sigma) * x_0 + sigma * noise`, and the network predicts the velocity
`v = noise - x_0`. A step goes from `sigma` to `sigma_next < sigma`. Inside the window it is a Gaussian transition
`N(mean, std^2)` per latent element. Rollout and replay both take mean, std and log-prob from this file.

Everything is computed in float32 or better: float64 stays float64, bfloat16 and float16 become float32. Means and
stds need only `+ - * /` and square roots of `sigma`, which round alike for every tensor shape, so a replay of several
steps in one batch has the coefficients of the steps it repeats bit for bit.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


SDEType = Literal["flow", "dance", "cps", "dpm"]
SDE_TYPES: tuple[str, ...] = get_args(SDEType)


def predict_x0(model_output: Tensor, sample: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample `x_0` that the velocity points to: `x - sigma * v`."""
    v, x, sigma = _upcast(model_output, sample, sigma)
    return x - sigma * v


def predict_noise(model_output: Tensor, sample: Tensor, sigma: Tensor) -> Tensor:
    """The noise that the velocity points from: `x + (1 - sigma) * v`. The score is `-noise / sigma`."""
    v, x, sigma = _upcast(model_output, sample, sigma)
    return x + (1 - sigma) * v


def sde_transition(
    sde_type: str,
    model_output: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    eta: float,
    sigma_max: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""
    Mean and standard deviation of one stochastic step, differentiable in `model_output` and `sample`.

    With \\(\Delta = \sigma' - \sigma\\), \\(\hat x_0 = x - \sigma v\\), \\(\hat\epsilon = x + (1 - \sigma) v\\):

    - `"flow"` (Flow-GRPO, and MixGRPO's default): the reverse SDE that keeps the flow's marginals,
      \\(x + (v + \frac{s^2}{2\sigma} \hat\epsilon) \Delta\\), std \\(s \sqrt{-\Delta}\\),
      \\(s = \eta \sqrt{\sigma / (1 - \sigma)}\\).
    - `"dance"` (DanceGRPO): the same with a constant \\(s = \eta\\).
    - `"cps"` (Flow-CPS): \\((1 - \sigma') \hat x_0 + \sigma' \cos(\eta\pi/2) \hat\epsilon\\), std
      \\(\sigma' \sin(\eta\pi/2)\\): the shares of signal and noise stay the schedule's own.
    - `"dpm"` (first-order SDE-DPM-Solver++):
      \\(\frac{\sigma'}{\sigma} e^{-h} x + (1 - \sigma')(1 - e^{-2h}) \hat x_0\\), std
      \\(\sigma' \sqrt{1 - e^{-2h}}\\), \\(h\\) the step in half log-SNR. It has no free noise level.

    All are finite at `sigma == 1`. There, `flow` uses `sigma_max` for the `sigma` of its denominator, and `dpm` takes
    its limit `h -> inf`, which is the sample `(1 - sigma') * x0 + sigma' * noise`.

    Args:
        sde_type (`str`): One of `"flow"`, `"dance"`, `"cps"`, `"dpm"`.
        model_output (`torch.Tensor` of shape `(batch, ...)`): The predicted velocity `noise - x_0`.
        sample (`torch.Tensor` of shape `(batch, ...)`): The sample at `sigma`.
        sigma (`torch.Tensor`): Noise level of `sample`, in (0, 1]; 0-d, or of a shape such as `(batch, 1, 1)`.
        sigma_next (`torch.Tensor`): Noise level after the step, `0 <= sigma_next < sigma`, of the shape of `sigma`.
        eta (`float`): Amount of noise, > 0. For `cps` in (0, 1]. `dpm` ignores it.
        sigma_max (`torch.Tensor`): The second noise level of the schedule, `sigmas[1]`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The mean, of the shape of `sample`, and the std, of the shape of `sigma`.

    Raises:
        `ValueError`: If `sde_type` is unknown.
    """
    v, x, sigma, sigma_next, sigma_max = _upcast(model_output, sample, sigma, sigma_next, sigma_max)
    if sde_type in ("flow", "dance"):
        dt = sigma_next - sigma
        if sde_type == "flow":
            # Not a Python `if`: a test of a device tensor would make the host wait for the device. A static shift of
            # 0.1 or more rounds the first noise level to at most 2^-18 below 1.
            s_squared = eta**2 * sigma / (1 - torch.where(sigma >= 1 - 2**-18, sigma_max, sigma))
        else:
            s_squared = torch.full_like(sigma, eta**2)
        drift = v + s_squared / (2 * sigma) * predict_noise(v, x, sigma)
        return x + drift * dt, torch.sqrt(s_squared * -dt)
    x0 = predict_x0(v, x, sigma)
    if sde_type == "cps":
        angle = eta * math.pi / 2
        mean = (1 - sigma_next) * x0 + sigma_next * math.cos(angle) * predict_noise(v, x, sigma)
        return mean, sigma_next * math.sin(angle)
    if sde_type == "dpm":
        # e^{-h} is a ratio of SNRs. Written so, it is 0 at sigma == 1, where h itself is infinite.
        decay = (1 - sigma) / (1 - sigma_next) * (sigma_next / sigma)
        mean = sigma_next / sigma * decay * x + (1 - sigma_next) * (1 - decay**2) * x0
        return mean, sigma_next * torch.sqrt(1 - decay**2)
    raise ValueError(f"`sde_type` must be one of {', '.join(map(repr, SDE_TYPES))}, got {sde_type!r}.")


@dataclass(frozen=True)
class Transitions:
    """
    The `w` stochastic steps of one window: everything that their means and stds depend on, except for the velocities.

    Args:
        sde_type (`str`): Kind of the steps, as in [`sde_transition`].
        eta (`float`): Amount of noise.
        sigmas (`torch.Tensor` of shape `(w,)`): Noise level before each step.
        next_sigmas (`torch.Tensor` of shape `(w,)`): Noise level after each step.
        sigma_max (0-d `torch.Tensor`): The second noise level of the schedule.
        timesteps (`torch.Tensor` of shape `(w,)`): The timestep `sigma * 1000` that the transformer sees at each step.
    """

    sde_type: str
    eta: float
    sigmas: Tensor
    next_sigmas: Tensor
    sigma_max: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.sigmas)

    def mean_and_std(self, model_output: Tensor, sample: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """
        Mean and std of `N` transitions, differentiable in `model_output` and `sample`.

        Args:
            model_output (`torch.Tensor` of shape `(N, ...)`): The predicted velocities.
            sample (`torch.Tensor` of shape `(N, ...)`): The samples before the step.
            steps (`torch.LongTensor` of shape `(N,)`): The step of each, counted from the start of the window.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Means of shape `(N, ...)` and stds of shape `(N, 1, ...)`.
        """
        steps = steps.reshape(-1, *[1] * (sample.ndim - 1))
        return sde_transition(
            self.sde_type,
            model_output,
            sample,
            sigma=self.sigmas[steps],
            sigma_next=self.next_sigmas[steps],
            eta=self.eta,
            sigma_max=self.sigma_max,
        )

    def velocity_coefficients(self) -> Tensor:
        """
        How far the mean of each step moves with the velocity, `d mean / d v`: shape `(w,)`, negative.

        A mean is linear in the velocity and the sample together, so this is the mean at `v = 1` and `x = 0`.
        """
        return self._at(torch.ones_like(self.sigmas))[0]

    def stds(self) -> Tensor:
        """The std of each step, of shape `(w,)`."""
        return self._at(torch.zeros_like(self.sigmas))[1]

    def sensitivities(self) -> Tensor:
        r"""
        How strongly the log-prob of each step depends on the velocity, \\(g = |d\,mean / d\,v|\, / std\\): `(w,)`.

        The gradient of one transition's log-prob grows with it. For `flow` it is
        \\(\sqrt{-\Delta} / s + s \sqrt{-\Delta} (1 - \sigma) / (2 \sigma)\\), which grows 55-fold over 25 steps at
        shift 3 and eta 0.7: late steps get much larger gradients than early ones.
        """
        return self.velocity_coefficients().abs() / self.stds()

    def _at(self, model_output: Tensor) -> tuple[Tensor, Tensor]:
        return sde_transition(
            self.sde_type,
            model_output,
            torch.zeros_like(model_output),
            sigma=self.sigmas,
            sigma_next=self.next_sigmas,
            eta=self.eta,
            sigma_max=self.sigma_max,
        )


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """
    Log-density of `N(mean, std^2)` at `sample`, in nats, averaged (not summed) over all elements but the batch's.

    The mean keeps the number comparable between resolutions. The clip range of the objective refers to this mean.

    Args:
        sample, mean (`torch.Tensor` of shape `(batch, ...)`): Where the density is evaluated, and its center.
        std (`torch.Tensor`): Standard deviation > 0, a 0-d tensor or one that broadcasts such as `(batch, 1, 1)`.

    Returns:
        `torch.Tensor` of shape `(batch,)`.
    """
    sample, mean, std = _upcast(sample, mean, std)
    log_density = -((sample - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """
    Exact `KL(N(mean, std^2) || N(mean_ref, std^2)) = |mean - mean_ref|^2 / (2 std^2)`, in nats per element.

    Averaged (not summed) over all elements but the batch's, as [`gaussian_log_prob`] is, so that the two live on one
    scale. Both policies share the std: it depends on the schedule alone.

    Args:
        mean, mean_ref (`torch.Tensor` of shape `(batch, ...)`): Means of the policy and of the reference.
        std (`torch.Tensor`): Standard deviation > 0, a 0-d tensor or one that broadcasts such as `(batch, 1, 1)`.

    Returns:
        `torch.Tensor` of shape `(batch,)`.
    """
    mean, mean_ref, std = _upcast(mean, mean_ref, std)
    return ((mean - mean_ref) ** 2 / (2 * std**2)).flatten(1).mean(1)


def velocity_kl(mean: Tensor, mean_ref: Tensor, coefficient: Tensor) -> Tensor:
    """
    The mean squared difference of two velocities, `|v - v_ref|^2`, from the means that they lead to.

    The KL divergence of a transition is this times `g^2 / 2` ([`Transitions.sensitivities`]), so it weighs late steps
    thousands of times more than early ones. Flow-GRPO (https://arxiv.org/abs/2505.05470) penalizes the velocity.

    Args:
        mean, mean_ref (`torch.Tensor` of shape `(batch, ...)`): Means of the policy and of the reference.
        coefficient (`torch.Tensor` that broadcasts against `mean`): See [`Transitions.velocity_coefficients`].

    Returns:
        `torch.Tensor` of shape `(batch,)`.
    """
    mean, mean_ref, coefficient = _upcast(mean, mean_ref, coefficient)
    return ((mean - mean_ref) / coefficient).square().flatten(1).mean(1)


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors in the widest of their dtypes, and at least in float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)
