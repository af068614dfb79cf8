"""The scheduler against independent formulas and diffusers' own schedulers, and in a stock FluxPipeline."""

import functools
import inspect
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_mixgrpo.scheduling_mixed_ode_sde import LEAST_ETA, LEAST_STD, MixedODESDEScheduler


SDE_TYPES = ["flow", "dance", "cps", "dpm"]
SOLVERS = ["euler", "dpmsolver++", "unipc"]


def flux_sigmas(steps: int) -> np.ndarray:
    return np.linspace(1.0, 1 / steps, steps)


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth, nonlinear stand-in for a network."""
    return torch.sin(x * 1.3 + t / 1000) - 0.3 * x


def run(scheduler, x, model=velocity, **kwargs):
    """All steps of a schedule that is set; the samples, and the outputs where the scheduler has them."""
    samples, outputs = [x], []
    for t in scheduler.timesteps:
        outputs.append(scheduler.step(model(samples[-1], t), t, samples[-1], **kwargs))
        samples.append(outputs[-1].prev_sample)
    return samples, outputs


def noise(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- The uncompressed schedule ----


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "shift_terminal": 0.1},
        {"shift": 2.0, "use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    ],
)
@pytest.mark.parametrize("given_sigmas", [True, False])
def test_schedule_and_steps_are_the_parents_bit_for_bit(config, given_sigmas):
    for steps in (2, 9, 25) if "shift_terminal" in config else (1, 2, 9, 25):
        arguments = {"sigmas": flux_sigmas(steps)} if given_sigmas else {"num_inference_steps": steps}
        ours = MixedODESDEScheduler(window_size=0, **config)
        parent = FlowMatchEulerDiscreteScheduler(**config)
        for dtype in (torch.float32, torch.bfloat16):
            for scheduler in (ours, parent):
                scheduler.set_timesteps(**arguments, mu=0.7 if "use_dynamic_shifting" in config else None)
            assert torch.equal(ours.sigmas, parent.sigmas) and torch.equal(ours.timesteps, parent.timesteps)
            assert len(ours.window) == 0
            x = noise(2, 3, 4).to(dtype)
            for a, b in zip(run(ours, x)[0], run(parent, x)[0], strict=True):
                assert torch.equal(a, b) and a.dtype == dtype


def test_explicit_timesteps_are_the_parents():
    for scheduler in (MixedODESDEScheduler(window_size=1), parent := FlowMatchEulerDiscreteScheduler()):
        scheduler.set_timesteps(timesteps=[900.0, 400.0, 100.0])
    assert torch.equal(scheduler.timesteps, parent.timesteps) and torch.equal(scheduler.sigmas, parent.sigmas)


# ---- Compression ----


def ceil(ratio: str, steps: int) -> int:
    return math.ceil(Fraction(ratio) * steps)


@pytest.mark.parametrize("ratio", ["0.01", "0.2", "0.4", "0.7", "1.0"])
@pytest.mark.parametrize("mode", ["static", "dynamic", "only_steps"])
def test_every_legal_compression(ratio, mode):
    for total in [*range(2, 10), 25]:
        for start in range(total):
            for size in range(total - start) if total < 10 else (0, 2, 4):
                if start + size > total - 1:
                    continue
                for prefix_ratio in {"1.0", ratio}:
                    check_compression(total, start, size, ratio, prefix_ratio, mode)


def check_compression(total, start, size, suffix_ratio, prefix_ratio, mode):
    config = {"use_dynamic_shifting": True} if mode == "dynamic" else {"shift": 3.0}
    arguments = {"num_inference_steps": total} if mode == "only_steps" else {"sigmas": flux_sigmas(total)}
    arguments["mu"] = 0.8 if mode == "dynamic" else None
    scheduler, parent = schedulers_of(**config)
    scheduler.register_to_config(
        window_start=start, window_size=size, suffix_ratio=float(suffix_ratio), prefix_ratio=float(prefix_ratio)
    )
    scheduler.set_timesteps(**arguments)
    parent.set_timesteps(**arguments)

    # 1. The right number of steps
    stop = start + size
    prefix, suffix = ceil(prefix_ratio, start), max(1, ceil(suffix_ratio, total - stop))
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == prefix + size + suffix
    assert scheduler.window == range(prefix, prefix + size)
    # 2. From noise to data, strictly decreasing, and consistent with the timesteps
    sigmas = scheduler.sigmas
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert torch.equal(scheduler.timesteps, sigmas[:-1] * 1000)
    # 3. Up to the window's end, or in the window, the uncompressed schedule bit for bit
    assert torch.equal(sigmas[prefix : prefix + size + 1], parent.sigmas[start : stop + 1])
    if prefix_ratio == "1.0":
        assert torch.equal(sigmas[: stop + 1], parent.sigmas[: stop + 1])
    if suffix_ratio == "1.0":
        assert torch.equal(sigmas[prefix:], parent.sigmas[start:])
    # 4. Evenly spaced before shifting
    if mode != "only_steps":
        if mode == "static":
            times = sigmas / (3 - 2 * sigmas)
        else:
            times = sigmas / (sigmas + math.exp(0.8) * (1 - sigmas))
        for part in (times[: prefix + 1], times[prefix + size :]):
            assert (part.diff(n=2).abs() < 1e-5).all()


@functools.cache
def schedulers_of(**config):
    """A scheduler and its parent, to be configured anew: constructing them is slow."""
    return MixedODESDEScheduler(**config), FlowMatchEulerDiscreteScheduler(**config)


def test_flash_step_counts():
    """Flash along a sweep, and Flash*, of 25 steps with a window of 4."""
    scheduler = MixedODESDEScheduler(shift=3.0, window_size=4, suffix_ratio=0.4)
    steps = []
    for start in range(21):
        scheduler.set_window(start, 4)
        scheduler.set_timesteps(sigmas=flux_sigmas(25))
        steps.append(len(scheduler.timesteps))
    assert steps[0] == 4 + 9 and steps[-1] == 25
    rounded = MixedODESDEScheduler(window_size=0, suffix_ratio=0.28)
    rounded.set_timesteps(25)
    assert len(rounded.timesteps) == 7  # although 0.28 * 25 is 7.000000000000001
    star = MixedODESDEScheduler(shift=3.0, window_size=4, suffix_ratio=0.2)
    star.set_timesteps(sigmas=flux_sigmas(25))
    assert len(star.timesteps) == 4 + 5


@given(st.integers(3, 40), st.data(), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.floats(0.0, 2.0))
@settings(max_examples=60, deadline=None)
def test_compression_of_a_stretched_schedule(total, data, suffix_ratio, prefix_ratio, mu):
    start = data.draw(st.integers(0, total - 2))
    size = data.draw(st.integers(1, total - 1 - start))
    options = {"use_dynamic_shifting": True, "shift_terminal": 0.02}
    scheduler = MixedODESDEScheduler(
        window_start=start, window_size=size, suffix_ratio=suffix_ratio, prefix_ratio=prefix_ratio, **options
    )
    parent = FlowMatchEulerDiscreteScheduler(**options)
    for each in (scheduler, parent):
        each.set_timesteps(sigmas=flux_sigmas(total), mu=mu)
    window = scheduler.window
    assert torch.equal(scheduler.sigmas[window.start : window.stop + 1], parent.sigmas[start : start + size + 1])
    assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0 and (scheduler.sigmas.diff() < 0).all()
    assert scheduler.sigmas[-2] >= 0.02 - 1e-6


# ---- Stochastic steps ----


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("shape", [(1, 16, 8), (3, 16, 8), (2, 4, 4, 6), (2, 4, 2, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replay_is_bit_identical(sde_type, shape, dtype):
    for config in ({"shift": 3.0}, {"use_dynamic_shifting": True}):
        scheduler = MixedODESDEScheduler(sde_type=sde_type, window_size="all", **config)
        scheduler.generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(sigmas=flux_sigmas(10), mu=0.9 if "use_dynamic_shifting" in config else None)
        samples, outputs = run(scheduler, noise(*shape).to(dtype))
        for i, output in enumerate(outputs[:-1]):
            assert output.prev_sample.dtype == dtype and output.prev_sample_mean.dtype == torch.float32
            assert output.log_prob.dtype == torch.float32 and output.log_prob.shape == shape[:1]
            v = velocity(samples[i], scheduler.timesteps[i])
            assert torch.equal(scheduler.log_prob(v, samples[i], samples[i + 1], i), output.log_prob)
            for index in (torch.tensor(i), torch.full(shape[:1], i)):
                log_prob = scheduler.log_prob(v, samples[i], samples[i + 1], index)
                torch.testing.assert_close(log_prob, output.log_prob, rtol=1e-5, atol=1e-5)
            # The log-prob is the density at the stored sample.
            normal = torch.distributions.Normal(output.prev_sample_mean.double(), output.std_dev.double())
            expected = normal.log_prob(samples[i + 1].double()).flatten(1).mean(1)
            torch.testing.assert_close(output.log_prob.double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(scheduler.window_log_probs, torch.stack([o.log_prob for o in outputs[:-1]], dim=1))
        assert outputs[-1].log_prob is None and outputs[-1].std_dev == 0


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("steps", [2, 5, 25])
@pytest.mark.parametrize("mu", [None, 0.5, 1.15])
def test_transition_in_closed_form(sde_type, steps, mu):
    scheduler = MixedODESDEScheduler(shift=3.0, use_dynamic_shifting=mu is not None, sde_type=sde_type, window_size=0)
    scheduler.set_timesteps(sigmas=flux_sigmas(steps), mu=mu)
    sigmas = scheduler.sigmas.tolist()  # as rounded to float32
    v, x = noise(2, 3, 4, 4, dtype=torch.float64)
    for i in range(steps - 1):
        mean, std_dev = scheduler.transition(v, x, i)
        sigma, following = sigmas[i], sigmas[i + 1]
        data, rest = x - sigma * v, x + (1 - sigma) * v
        if sde_type == "cps":
            expected = (1 - following) * data + following * math.cos(0.35 * math.pi) * rest
            std = following * math.sin(0.35 * math.pi)
        elif sde_type == "dpm":
            e = (1 - sigma) * following / (sigma * (1 - following))  # e^{-h}
            expected = following / sigma * e * x + (1 - following) * (1 - e * e) * data
            std = following * math.sqrt(1 - e * e)
        else:
            s = 0.7 if sde_type == "dance" else 0.7 * math.sqrt(sigma / (1 - (sigmas[1] if i == 0 else sigma)))
            expected = x + (v + s * s / (2 * sigma) * rest) * (following - sigma)
            std = s * math.sqrt(sigma - following)
        assert (mean - expected).abs().max() < 1e-10 and abs(std_dev.item() - std) < 1e-10
        assert mean.isfinite().all() and std_dev > 0


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_replay_of_many_steps_in_one_batch(sde_type):
    scheduler = MixedODESDEScheduler(shift=3.0, sde_type=sde_type, window_start=2, window_size=5)
    scheduler.generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(10)
    samples, outputs = run(scheduler, noise(1, 16, 8))
    steps = torch.arange(2, 7)
    v = torch.cat([velocity(samples[i], scheduler.timesteps[i]) for i in steps])
    log_probs = scheduler.log_prob(
        v, torch.cat([samples[i] for i in steps]), torch.cat([samples[i + 1] for i in steps]), steps
    )
    torch.testing.assert_close(log_probs, scheduler.window_log_probs[0], rtol=1e-5, atol=1e-5)
    assert scheduler.step_index == 10  # a replay touches no state


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_transitions_outlive_the_schedule(sde_type):
    scheduler = MixedODESDEScheduler(shift=3.0, sde_type=sde_type, window_start=4, window_size=3, prefix_ratio=0.5)
    with pytest.raises(ValueError, match="The schedule is not set. Call `set_timesteps` first"):
        scheduler.transitions()
    scheduler.set_timesteps(10)
    transitions = scheduler.transitions()
    assert len(transitions) == 3 and scheduler.window == range(2, 5)
    v, x = noise(2, 3, 4, 4)
    expected = scheduler.transition(v, x, torch.tensor([2, 3, 4]))
    scheduler.set_window(0, 2)
    scheduler.set_timesteps(6)
    for actual, value in zip(transitions.mean_and_std(v, x, torch.arange(3)), expected, strict=True):
        assert torch.equal(actual, value)
    assert torch.equal(transitions.timesteps, 1000 * transitions.sigmas)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_gradient_of_log_prob(sde_type):
    scheduler = MixedODESDEScheduler(shift=3.0, sde_type=sde_type)
    scheduler.set_timesteps(8)
    v = noise(3, 2, 2, seed=1, dtype=torch.float64).requires_grad_()
    x, y = noise(2, 3, 2, 2, dtype=torch.float64)
    steps = torch.tensor([0, 3, 6])
    assert torch.autograd.gradcheck(lambda v: scheduler.log_prob(v, x, y, steps), v)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("solver", ["euler", "dpmsolver++"])
def test_a_step_never_waits_for_the_device(sde_type, solver):
    """Tensors of the meta device have no values: code that reads one raises."""
    scheduler = MixedODESDEScheduler(sde_type=sde_type, window_start=1, window_size=2, ode_solver=solver)
    scheduler.set_timesteps(5, device="meta")
    scheduler.set_begin_index(0)
    x = torch.empty(2, 3, 4, device="meta")
    for i, t in enumerate(scheduler.timesteps):
        output = scheduler.step(x, t, x, variance_noise=x)
        assert output.prev_sample.shape == x.shape
        if i < 4:
            assert scheduler.log_prob(x, x, x, torch.full((2,), i, device="meta")).shape == (2,)


def test_samples_have_the_mean_and_std_of_the_transition():
    scheduler = MixedODESDEScheduler(shift=3.0, window_start=3, window_size=1)
    x, v = noise(2, 1, 4, 4).expand(2, 20_000, 4, 4)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(3)
    output = scheduler.step(v, scheduler.timesteps[3], x, generator=torch.Generator().manual_seed(0))
    error = 5 * output.std_dev / math.sqrt(20_000)
    assert ((output.prev_sample.mean(0) - output.prev_sample_mean[0]).abs() < error).all()
    assert ((output.prev_sample.std(0) - output.std_dev).abs() < error).all()


def test_where_the_noise_comes_from():
    def first_step(generator=None, own=None, variance_noise=None):
        scheduler = MixedODESDEScheduler(window_size=1)
        scheduler.generator = own
        scheduler.set_timesteps(4)
        return scheduler.step(x, scheduler.timesteps[0], x, generator, variance_noise).prev_sample

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    x = noise(2, 4, 4)
    passed = first_step(generator=seeded(1))
    assert torch.equal(passed, first_step(own=seeded(1)))
    assert torch.equal(passed, first_step(generator=seeded(1), own=seeded(2)))
    given = torch.randn(2, 4, 4, generator=seeded(1))
    assert torch.equal(passed, first_step(generator=seeded(2), variance_noise=given))
    each = first_step(own=[seeded(5), seeded(6)])
    assert torch.equal(
        each[1:], first_step(variance_noise=torch.randn(2, 1, 4, 4, generator=seeded(6))[0].expand(2, 4, 4))[1:]
    )
    assert not torch.equal(passed, first_step(own=seeded(2)))


def test_output_as_tuple_and_predictions():
    scheduler = MixedODESDEScheduler(shift=3.0, window_start=1, window_size=1)
    scheduler.set_timesteps(4)
    data, x = noise(2, 2, 4, 4)
    for i, t in enumerate(scheduler.timesteps):
        # the velocity of a straight line to `data`, from wherever the sample is
        v = (x - data) / scheduler.sigmas[i]
        prev_sample, log_prob, mean, std_dev, pred_original_sample = scheduler.step(
            v, t, x, generator=torch.Generator().manual_seed(0), return_dict=False
        )
        assert (log_prob is not None) == (i == 1) == scheduler.is_sde_step(i) == bool(std_dev > 0)
        assert torch.equal(mean, prev_sample) != (i == 1)
        torch.testing.assert_close(pred_original_sample, data, rtol=1e-5, atol=1e-5)
        x = prev_sample
    torch.testing.assert_close(x, data)


# ---- Solvers ----


OPTIONS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("steps", [3, 8, 20])
def test_dpmsolver_parity(order, solver_type, steps):
    ours = MixedODESDEScheduler(
        shift=3.0, window_size=0, ode_solver="dpmsolver++", solver_order=order, solver_type=solver_type
    )
    ours.set_timesteps(sigmas=flux_sigmas(steps))
    theirs = DPMSolverMultistepScheduler(solver_order=order, solver_type=solver_type, **OPTIONS)
    theirs.set_timesteps(steps)
    theirs.sigmas = ours.sigmas
    x = noise(2, 8, 4)
    expected = x
    for t, t_theirs in zip(ours.timesteps, theirs.timesteps, strict=True):
        expected = theirs.step(velocity(expected, t), t_theirs, expected).prev_sample
    samples, _ = run(ours, x)
    assert samples[-1].isfinite().all()
    torch.testing.assert_close(samples[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [3, 8, 20])
def test_unipc_parity(order, steps):
    ours = MixedODESDEScheduler(shift=3.0, window_size=0, ode_solver="unipc", solver_order=order)
    ours.set_timesteps(sigmas=flux_sigmas(steps))
    theirs = UniPCMultistepScheduler(solver_order=order, **OPTIONS)
    theirs.set_timesteps(sigmas=ours.sigmas[:-1].numpy())
    x = noise(2, 8, 4)
    expected = x
    for t, t_theirs in zip(ours.timesteps, theirs.timesteps, strict=True):
        expected = theirs.step(velocity(expected, t), t_theirs, expected).prev_sample
    samples, _ = run(ours, x)
    assert samples[-1].isfinite().all()
    torch.testing.assert_close(samples[-1], expected, rtol=1e-5, atol=1e-5)


def recorded_run(**config):
    """A run with a window in the middle, and the float64 quantities to recompute each of its steps."""
    scheduler = MixedODESDEScheduler(shift=3.0, window_start=3, window_size=3, **config)
    scheduler.set_timesteps(sigmas=flux_sigmas(12))
    samples, outputs = run(scheduler, noise(2, 4, 4), generator=torch.Generator().manual_seed(0))
    sigmas = scheduler.sigmas.double()
    x0 = [
        samples[i].double() - sigmas[i] * velocity(samples[i], t).double() for i, t in enumerate(scheduler.timesteps)
    ]
    log_snr = torch.log((1 - sigmas) / sigmas)
    return scheduler, [s.double() for s in samples], sigmas, x0, log_snr


@pytest.mark.parametrize("suffix_ratio", [1.0, 0.6])
def test_second_order_history_crosses_the_window(suffix_ratio):
    """DPM-Solver++(2M) by its formula, from the recorded predictions including the window's."""
    scheduler, samples, sigmas, x0, log_snr = recorded_run(ode_solver="dpmsolver++", suffix_ratio=suffix_ratio)
    last = len(scheduler.timesteps) - 1
    for i in range(last + 1):
        if i in scheduler.window:
            continue
        h = log_snr[i + 1] - log_snr[i]
        if i in (0, 1, last):  # no history, none of finite weight (sigma was 1), and the solver's lower last order
            d = x0[i]
        else:
            r = (log_snr[i] - log_snr[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0[i] - 1 / (2 * r) * x0[i - 1]
        expected = sigmas[i + 1] / sigmas[i] * samples[i] - (1 - sigmas[i + 1]) * torch.expm1(-h) * d
        torch.testing.assert_close(samples[i + 1], expected, rtol=1e-5, atol=1e-5)


def test_third_order_history_crosses_the_window():
    """DPM-Solver++(3M) right after the window: derivatives in log-SNR from three predictions, two the window's."""
    scheduler, samples, sigmas, x0, log_snr = recorded_run(ode_solver="dpmsolver++", solver_order=3)
    i = scheduler.window.stop
    h, r0, r1 = log_snr[i + 1] - log_snr[i], log_snr[i] - log_snr[i - 1], log_snr[i - 1] - log_snr[i - 2]
    slope0, slope1 = (x0[i] - x0[i - 1]) / r0, (x0[i - 1] - x0[i - 2]) / r1
    second = 2 * (slope0 - slope1) / (r0 + r1)
    first = slope0 + second / 2 * r0
    e = torch.exp(-h)
    # Integrals of e^{-(h - s)} s^k over the step. (DPM-Solver gives the curvature half the weight that Taylor would.)
    i0, i1 = 1 - e, h - 1 + e
    i2 = h**2 - 2 * i1
    alpha = 1 - sigmas[i + 1]
    expected = sigmas[i + 1] / sigmas[i] * samples[i] + alpha * (i0 * x0[i] + i1 * first + i2 / 4 * second)
    torch.testing.assert_close(samples[i + 1], expected, rtol=1e-4, atol=1e-4)


def test_unipc_history_crosses_the_window():
    """After the window UniPC predicts from the window's predictions, and does not correct a sample that is noisy."""
    scheduler, samples, sigmas, x0, log_snr = recorded_run(ode_solver="unipc")
    i = scheduler.window.stop
    h = log_snr[i + 1] - log_snr[i]
    r = (log_snr[i - 1] - log_snr[i]) / h
    d = x0[i] + 0.5 * (x0[i - 1] - x0[i]) / r
    expected = sigmas[i + 1] / sigmas[i] * samples[i] - (1 - sigmas[i + 1]) * torch.expm1(-h) * d
    torch.testing.assert_close(samples[i + 1], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_combinations_are_finite(sde_type, solver, order, dtype):
    for start, size in ((0, 3), (2, 4), (5, 1), (0, "all"), (0, 0)):
        scheduler = MixedODESDEScheduler(
            shift=3.0,
            sde_type=sde_type,
            window_start=start,
            window_size=size,
            ode_solver=solver,
            solver_order=order,
            suffix_ratio=0.6,
            prefix_ratio=0.6,
        )
        scheduler.set_timesteps(sigmas=flux_sigmas(9))
        samples, outputs = run(scheduler, noise(2, 4, 4).to(dtype), generator=torch.Generator().manual_seed(0))
        assert all(sample.isfinite().all() and sample.dtype == dtype for sample in samples)
        if size:
            assert scheduler.window_log_probs.isfinite().all()
            assert scheduler.window_log_probs.shape == (2, len(scheduler.window))
        else:
            assert scheduler.window_log_probs is None


def test_a_higher_order_solver_is_more_accurate():
    """Gaussian data of std 0.5: the exact flow scales the noise by 0.5."""

    def exact_velocity(x, t):
        sigma = t / 1000
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        return x * (sigma - (1 - sigma) * 0.25) / variance

    def error(**config):
        scheduler = MixedODESDEScheduler(shift=3.0, window_size=0, **config)
        scheduler.set_timesteps(sigmas=flux_sigmas(25))
        x = noise(1, 8, 8)
        return (run(scheduler, x, exact_velocity)[0][-1] - 0.5 * x).abs().max().item(), len(scheduler.timesteps)

    # The last step is of first order for every solver, and it is longer with fewer steps.
    for ratio, gain in ((1.0, 10), (0.4, 1.3)):
        euler, steps = error(suffix_ratio=ratio)
        for solver in ("dpmsolver++", "unipc"):
            second_order, same_steps = error(suffix_ratio=ratio, ode_solver=solver)
            assert steps == same_steps == ceil(str(ratio), 25)
            assert second_order < euler / gain


def test_repeat_history():
    """A prefix that was run once and then repeated continues like one that was run for each image."""
    for solver in SOLVERS:
        finals = []
        for repeat_at in (0, 4):
            scheduler = MixedODESDEScheduler(
                shift=3.0, window_start=6, window_size=2, ode_solver=solver, solver_order=3
            )
            scheduler.set_timesteps(sigmas=flux_sigmas(12))
            generator = torch.Generator().manual_seed(0)
            x = noise(2, 4, 4)
            for i, t in enumerate(scheduler.timesteps):
                if i == repeat_at:
                    x = x.repeat_interleave(3, dim=0)
                    scheduler.repeat_history(3)
                x = scheduler.step(velocity(x, t), t, x, generator=generator).prev_sample
            finals.append(x)
        torch.testing.assert_close(finals[0], finals[1])


# ---- Configurations and pipelines ----


CONFIG = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.6,
    "sde_type": "cps",
    "eta": 0.5,
    "window_start": 2,
    "window_size": "all",
    "ode_solver": "dpmsolver++",
    "solver_order": 3,
    "solver_type": "heun",
    "suffix_ratio": 0.4,
    "prefix_ratio": 0.8,
}


def test_parent_arguments_are_all_spelled_out():
    ours = inspect.signature(MixedODESDEScheduler.__init__).parameters
    for name, parameter in inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters.items():
        assert ours[name].default == parameter.default, name


def public(scheduler) -> dict:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def test_config_round_trips(tmp_path):
    scheduler = MixedODESDEScheduler(**CONFIG)
    assert public(MixedODESDEScheduler.from_config(scheduler.config)) == public(scheduler)
    scheduler.save_pretrained(tmp_path)
    assert public(MixedODESDEScheduler.from_pretrained(tmp_path)) == public(scheduler)
    # To the parent and back
    parent = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert type(parent) is FlowMatchEulerDiscreteScheduler
    assert parent.config.shift == 3.0 and parent.config.use_dynamic_shifting and parent.config.base_shift == 0.6
    assert public(MixedODESDEScheduler.from_config(parent.config)) == public(scheduler)
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).config.base_shift == 0.6
    # From the parent, with our own arguments
    ours = MixedODESDEScheduler.from_config(
        FlowMatchEulerDiscreteScheduler(shift=3.0).config, sde_type="dance", eta=0.3, window_size=2
    )
    assert (ours.config.shift, ours.config.sde_type, ours.config.eta, ours.config.window_size) == (
        3.0,
        "dance",
        0.3,
        2,
    )


def test_a_moved_window_survives_from_config():
    scheduler = MixedODESDEScheduler(shift=3.0)
    scheduler.set_window(5, 2)
    again = MixedODESDEScheduler.from_config(scheduler.config)
    assert (again.config.window_start, again.config.window_size) == (5, 2)


def generate(pipe, **kwargs):
    arguments = {"height": 32, "width": 32, "num_inference_steps": 6, "max_sequence_length": 12, "output_type": "np"}
    return pipe(["a", "b"], generator=torch.Generator().manual_seed(2), **(arguments | kwargs)).images


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_dynamic_shifting": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_pipeline_without_a_window_is_bit_for_bit_the_same(tiny_pipe, config, dtype):
    pipe = tiny_pipe.to(dtype)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    expected = generate(pipe, output_type="latent")
    pipe.scheduler = MixedODESDEScheduler.from_config(pipe.scheduler.config, window_size=0)
    assert torch.equal(generate(pipe, output_type="latent"), expected)
    assert pipe.scheduler.window_log_probs is None


def test_stock_pipeline_keeps_the_record_of_its_window(tiny_pipe):
    pipe = tiny_pipe
    pipe.scheduler = MixedODESDEScheduler(shift=3.0, window_start=1, window_size=3)
    pipe.scheduler.generator = torch.Generator().manual_seed(0)
    first = generate(pipe)
    log_probs = pipe.scheduler.window_log_probs
    assert log_probs.shape == (2, 3) and log_probs.isfinite().all() and not log_probs.requires_grad
    other = generate(pipe)  # other noise in the window
    assert not np.array_equal(first, other) and pipe.scheduler.window_log_probs.shape == (2, 3)
    pipe.scheduler.generator.manual_seed(0)
    assert np.array_equal(first, generate(pipe))
    assert torch.equal(pipe.scheduler.window_log_probs, log_probs)


def test_progress_bar_of_a_compressed_schedule(tiny_pipe, capsys):
    pipe = tiny_pipe
    pipe.scheduler = MixedODESDEScheduler(shift=3.0, window_size=2, suffix_ratio=0.4, ode_solver="dpmsolver++")
    pipe.set_progress_bar_config(disable=False)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    generate(pipe, num_inference_steps=12)
    assert len(calls) == pipe.num_timesteps == 6
    assert "6/6" in capsys.readouterr().err


def test_saved_pipeline_loads_with_its_scheduler(tiny_pipe, tmp_path):
    pipe = tiny_pipe
    pipe.scheduler = MixedODESDEScheduler(shift=3.0, window_start=1, window_size="all", sde_type="dpm")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_mixgrpo.scheduling_mixed_ode_sde", "MixedODESDEScheduler"]
    loaded = FluxPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is MixedODESDEScheduler and public(loaded.scheduler) == public(pipe.scheduler)
    for each in (pipe, loaded):
        each.scheduler.generator = torch.Generator().manual_seed(0)
    # Loaded weights may lie elsewhere in memory, where matrix products round differently.
    assert np.abs(generate(loaded) - generate(pipe)).max() <= 1 / 255
    # And with the stock scheduler instead of ours
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    loaded = FluxPipeline.from_pretrained(tmp_path, scheduler=stock)
    assert type(loaded.scheduler) is FlowMatchEulerDiscreteScheduler


# ---- Noise levels the other way round ----


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps", "dpm"])
def test_inverted_noise_levels_are_the_same_flow(sde_type):
    """Mochi's levels rise from 0 to 1, and it predicts (image - noise): the same samples and log-probs."""
    levels = [1.0, 0.8, 0.6, 0.4, 0.2]
    usual = MixedODESDEScheduler(shift=3.0, sde_type=sde_type, window_start=1, window_size=2)
    inverted = MixedODESDEScheduler.from_config(usual.config, invert_sigmas=True)
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)
    for scheduler in (usual, inverted, stock):
        scheduler.set_timesteps(sigmas=levels)
    assert torch.equal(inverted.sigmas, stock.sigmas) and torch.equal(inverted.timesteps, stock.timesteps)
    sample = other = noise(2, 4, 8)
    for step in range(5):
        velocity = noise(2, 4, 8, seed=step + 1)
        generators = (torch.Generator().manual_seed(step), torch.Generator().manual_seed(step))
        one = usual.step(velocity, usual.timesteps[step], sample, generator=generators[0])
        two = inverted.step(-velocity, inverted.timesteps[step], other, generator=generators[1])
        if two.log_prob is not None:
            assert torch.equal(inverted.log_prob(-velocity, other, two.prev_sample, step), two.log_prob)
        sample, other = one.prev_sample, two.prev_sample
        torch.testing.assert_close(two.pred_original_sample, one.pred_original_sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other, sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverted.window_log_probs, usual.window_log_probs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`invert_sigmas` must be False for a replay"):
        inverted.transitions()


# ---- Moving windows, bad input ----


def test_moving_the_window_between_runs():
    scheduler = MixedODESDEScheduler(shift=3.0, window_size=2, suffix_ratio=0.5)
    scheduler.set_timesteps(sigmas=flux_sigmas(10))
    assert scheduler.window == range(0, 2) and len(scheduler.timesteps) == 6
    scheduler.set_begin_index(0)
    scheduler.set_window(3, 4)  # between set_timesteps and the first step: the schedule follows
    assert scheduler.window == range(3, 7) and len(scheduler.timesteps) == 9 and scheduler.begin_index == 0
    run(scheduler, noise(1, 2, 2))
    scheduler.set_window(8, 1)  # after a run: for the next one
    assert scheduler.window == range(3, 7) and scheduler.window_log_probs.shape == (1, 4)
    scheduler.set_timesteps(sigmas=flux_sigmas(10))
    assert scheduler.window == range(8, 9) and scheduler.window_log_probs is None


def test_moving_the_window_during_a_run():
    scheduler = MixedODESDEScheduler(window_size=2)
    scheduler.set_timesteps(4)
    x = noise(1, 2, 2)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"`set_window\(1, 2\)` came after step 1 of 4"):
        scheduler.set_window(1, 2)
    assert scheduler.window == range(0, 2)
    scheduler.set_timesteps(4)
    scheduler.set_window(1, 2)
    assert scheduler.window == range(1, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sde_type": "ode"}, "`sde_type` must be one of 'flow', 'dance', 'cps', 'dpm', got 'ode'"),
        ({"ode_solver": "heun"}, "`ode_solver` must be one of 'euler', .*got 'heun'"),
        ({"solver_type": "rk4"}, "`solver_type` must be one of .*got 'rk4'"),
        ({"solver_order": 0}, "`solver_order` must be an integer in \\[1, 3\\], got 0"),
        ({"solver_order": 4}, "`solver_order` must be an integer in \\[1, 3\\], got 4"),
        ({"eta": 0.0}, r"`eta` must be a number in \[0.01, 3\], got 0.0"),
        ({"eta": -0.7}, r"`eta` must be a number in \[0.01, 3\], got -0.7"),
        ({"eta": math.inf}, r"`eta` must be a number in \[0.01, 3\], got inf"),
        ({"eta": math.nan}, r"`eta` must be a number in \[0.01, 3\], got nan"),
        ({"eta": 1.1, "sde_type": "cps"}, r"`eta` must be in \[0.01, 1\] for `sde_type='cps'`, got 1.1"),
        ({"suffix_ratio": 0.0}, r"`suffix_ratio` must be a number in \(0, 1\], got 0.0"),
        ({"prefix_ratio": 1.5}, r"`prefix_ratio` must be a number in \(0, 1\], got 1.5"),
        ({"window_start": -1}, "`window_start` must be an integer of 0 or more, got -1"),
        ({"window_size": -2}, "`window_size` must be an integer of 0 or more, or 'all', got -2"),
        ({"window_size": 1.5}, "`window_size` must be an integer of 0 or more, or 'all', got 1.5"),
        ({"window_start": "all"}, "`window_start` must be an integer of 0 or more, got 'all'"),
        ({"invert_sigmas": 1}, "`invert_sigmas` must be True or False, got 1"),
        (
            {"invert_sigmas": True, "ode_solver": "unipc"},
            "`invert_sigmas` must be False with a multistep .*, got True",
        ),
        (
            {"invert_sigmas": True, "suffix_ratio": 0.5},
            "`invert_sigmas` must be False .*, got True",
        ),
        ({"stochastic_sampling": True}, "`stochastic_sampling` must be False, since .* got True"),
        ({"eta": ""}, "`eta` must be a number .*, got ''"),
        ({"eta": 1e9}, "`eta` must be a number .*, got 1000000000.0"),
        ({"eta": 1e-30}, "`eta` must be a number .*, got 1e-30"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps` must be an integer .*, got 0"),
        ({"shift": math.inf}, "`shift` must be a number .*, got inf"),
        ({"shift": "3"}, "`shift` must be a number .*, got '3'"),
        ({"base_shift": math.nan}, "`base_shift` must be a number .*, got nan"),
        ({"max_shift": math.inf}, "`max_shift` must be a number .*, got inf"),
        ({"base_image_seq_len": math.nan}, "`base_image_seq_len` must be an integer .*, got nan"),
        ({"max_image_seq_len": 256}, "`max_image_seq_len` must be more than base_image_seq_len=256, .*, got 256"),
        ({"shift_terminal": 1.0}, "`shift_terminal` must be a number .*, got 1.0"),
        ({"use_dynamic_shifting": "no"}, "`use_dynamic_shifting` must be True or False, got 'no'"),
        ({"use_beta_sigmas": {}}, "`use_beta_sigmas` must be True or False, got {}"),
        ({"use_beta_sigmas": True, "use_karras_sigmas": True}, "`use_beta_sigmas` must be False with use_karras"),
        ({"time_shift_type": "quadratic"}, "`time_shift_type` must be one of .*, got 'quadratic'"),
        ({"use_karras_sigmas": True, "suffix_ratio": 0.5}, "`use_karras_sigmas` must be False with .*, got True"),
        ({"use_beta_sigmas": True, "prefix_ratio": 0.5}, "`use_beta_sigmas` must be False with .*, got True"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        MixedODESDEScheduler(**config)


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15},
        {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
        | {"base_image_seq_len": 1024, "max_image_seq_len": 4096},
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
        | {"base_image_seq_len": 256, "max_image_seq_len": 8192},
        {"shift": 7.0, "invert_sigmas": False, "stochastic_sampling": False, "time_shift_type": "linear"},
        {"shift": 16, "base_shift": None, "max_shift": None, "shift_terminal": None},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
    ],
)
def test_stock_configs_load(config):
    stock = FlowMatchEulerDiscreteScheduler(**config)
    scheduler = MixedODESDEScheduler.from_config(stock.config)
    for one in (stock, scheduler):
        one.set_timesteps(25, mu=1.15)
    assert torch.equal(scheduler.sigmas, stock.sigmas)
    assert {name: scheduler.config[name] for name in config} == config


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps", "dpm"])
def test_the_least_eta_keeps_the_noise_of_every_step_above_rounding(sde_type):
    for shift in (0.1, 1, 3, 100):
        for steps in (2, 5, 25, 100, 1000):
            scheduler = MixedODESDEScheduler(sde_type=sde_type, eta=LEAST_ETA, shift=shift, window_size="all")
            scheduler.set_timesteps(steps)  # or it raises
            x = torch.zeros(steps - 1, 1)
            assert (scheduler.transition(x, x, torch.arange(steps - 1))[1] >= LEAST_STD).all()


def test_a_first_noise_level_that_a_shift_rounds_to_less_than_1():
    scheduler = MixedODESDEScheduler(shift=0.1, window_size=2)
    scheduler.set_timesteps(8)
    assert 1 - 2**-18 < scheduler.sigmas[0] < 1
    x = noise(1, 2, 2)
    # By the second noise level: `eta * sqrt(sigma * step / (1 - sigma_max))`, and step is `1 - sigma_max`
    assert scheduler.transition(x, x, 0)[1] == pytest.approx(0.7, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "steps", "arguments"),
    [
        ({"num_train_timesteps": 2, "window_size": 0, "ode_solver": "unipc"}, None, {"sigmas": [0.5, 0.5]}),
        ({"shift_terminal": 0.1, "window_size": 0}, 1, {}),
        ({"window_size": 1}, None, {"sigmas": [0.5, 0.5]}),
        ({"window_size": 1}, None, {"sigmas": [math.nan, 0.5]}),
        ({"window_size": 1, "use_dynamic_shifting": True}, 4, {"mu": 50.0}),
    ],
)
def test_a_schedule_without_steps_is_refused(config, steps, arguments):
    scheduler = MixedODESDEScheduler(**config)
    with pytest.raises(ValueError, match="`sigmas` must be finite, and fall .* got .*shift="):
        scheduler.set_timesteps(steps, **arguments)
    with pytest.raises(ValueError, match="Call `set_timesteps` first"):
        scheduler.step(noise(1, 2), torch.tensor(1000.0), noise(1, 2))


def test_a_tiny_ratio_leaves_one_step():
    scheduler = MixedODESDEScheduler(window_start=2, window_size=2, prefix_ratio=1e-12, suffix_ratio=1e-12)
    scheduler.set_timesteps(8)
    assert len(scheduler.timesteps) == 1 + 2 + 1


@pytest.mark.parametrize(
    ("start", "size", "steps", "message"),
    [
        (0, 4, 4, r"`window_size` must be in \[0, 3\] for 4 steps and `window_start=0`, got 4"),
        (2, 2, 4, r"`window_size` must be in \[0, 1\] for 4 steps and `window_start=2`, got 2"),
        (4, 0, 4, r"`window_start` must be in \[0, 3\] for 4 steps, got 4"),
        (7, "all", 4, r"`window_start` must be in \[0, 3\] for 4 steps, got 7"),
        (0, 0, 0, "`num_inference_steps` must be an integer >= 1, got 0"),
        (0, 0, None, "`num_inference_steps` must be an integer >= 1, got None"),
    ],
)
def test_impossible_windows(start, size, steps, message):
    scheduler = MixedODESDEScheduler(window_start=start, window_size=size)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(steps)


def test_a_refused_window_changes_nothing():
    scheduler = MixedODESDEScheduler(window_size=2)
    scheduler.set_timesteps(4)
    for bad in ((0, 4), (-1, 2), (0, 1.5)):
        with pytest.raises(ValueError, match="`window_"):
            scheduler.set_window(*bad)
    assert scheduler.window == range(0, 2) and scheduler.config.window_size == 2


def test_bad_steps():
    x = noise(1, 2, 2)
    scheduler = MixedODESDEScheduler(window_size=1)
    with pytest.raises(ValueError, match="Call `set_timesteps` first"):
        scheduler.step(x, torch.tensor(1000.0), x)
    with pytest.raises(ValueError, match="Call `set_timesteps` first"):
        scheduler.log_prob(x, x, x, 0)
    scheduler.set_timesteps(3)
    for timestep in (0, torch.tensor(1000), torch.tensor(1, dtype=torch.int32), np.int64(1)):
        with pytest.raises(ValueError, match="`timestep` must be one of `scheduler.timesteps`, a float, got"):
            scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match=r"`variance_noise` must have the sample's shape \(1, 2, 2\), got \(2,\)"):
        scheduler.step(x, scheduler.timesteps[0], x, variance_noise=x[0, 0])
    for index in (2, -1, torch.tensor([2]), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match=r"`step_index` must be in \[0, 1\], all steps but the last, got"):
            scheduler.log_prob(x, x, x, index)
    with pytest.raises(ValueError, match="`step_index` must be an int or a LongTensor"):
        scheduler.log_prob(x, x, x, torch.tensor([0.0]))
    run(scheduler, x)
    with pytest.raises(ValueError, match="All 3 steps are taken: call `set_timesteps`"):
        scheduler.step(x, scheduler.timesteps[0], x)
