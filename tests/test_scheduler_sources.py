"""Schedulers that the mixed one is made from: those of flow matching, converted, and all others, refused."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from diffusers_mixgrpo.core.scheduler_configs import flow_matching_config
from diffusers_mixgrpo.scheduling_mixed_ode_sde import MixedODESDEScheduler


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
MULTISTEP = [
    UniPCMultistepScheduler,
    DPMSolverMultistepScheduler,
    DEISMultistepScheduler,
    DPMSolverSinglestepScheduler,
    SASolverScheduler,
]
# Of flow matching, or not told from it: that of flow maps has the arguments of Heun's
TAKEN = {"FlowMatchEuler", "FlowMatchHeun", "FlowMatchLCM", "FlowMapEuler", "LTXEulerAncestralRF", "MiniMaxH3"}


def closed_form(cls: type[SchedulerMixin], shift: float, steps: int) -> np.ndarray:
    """The noise levels of a multistep scheduler in float64: UniPC's from 1 on, those of the others from 1 - 1/1000."""
    i = np.arange(steps)
    times = 1 - 0.999 * i / steps if cls is UniPCMultistepScheduler else 0.999 * (1 - i / steps)
    return shift * times / (1 + (shift - 1) * times)


def json_config(scheduler: SchedulerMixin) -> dict:
    """The configuration as a file has it: with its class, and without the list of defaults."""
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    return config | {"_class_name": type(scheduler).__name__, "_diffusers_version": "0.42.1"}


@pytest.mark.parametrize("cls", MULTISTEP)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("read", [lambda scheduler: scheduler.config, json_config], ids=["config", "file"])
@pytest.mark.parametrize("steps", [4, 25, 50])
def test_the_schedule_is_that_of_the_stock_scheduler(cls, shift, read, steps):
    stock = cls(**FLOW, flow_shift=shift)
    ours = MixedODESDEScheduler.from_config(read(stock), window_size=0)
    assert ours.config.shift == shift
    ours = MixedODESDEScheduler.from_config(ours.config, window_size=0)  # as the trainer does in each iteration
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    expected = closed_form(cls, shift, steps)
    float32 = 2.0**-22  # a rounding in each of times, product and quotient
    np.testing.assert_allclose(ours.sigmas[:-1].double().numpy(), expected, rtol=float32)
    # UniPC takes a millionth off from 1.
    np.testing.assert_allclose(stock.sigmas[:steps].double().numpy(), expected, rtol=float32, atol=1.01e-6)
    assert ours.sigmas[-1] == 0
    assert torch.equal(ours.timesteps, stock.timesteps[:steps].float())


def test_a_dynamic_shift_and_its_end():
    options = FLOW | {"use_dynamic_shifting": True, "shift_terminal": 0.1}
    stock = UniPCMultistepScheduler(**options)
    ours = MixedODESDEScheduler.from_config(stock.config, window_size=0)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8, mu=1.15)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=2.0**-22, atol=1.01e-6)
    assert torch.equal(ours.timesteps, stock.timesteps.float())
    with pytest.raises(ValueError, match="`mu` must be"):
        ours.set_timesteps(8)


def test_a_shift_of_ones_own():
    stock = UniPCMultistepScheduler(**FLOW, flow_shift=5.0)
    ours = MixedODESDEScheduler.from_config(stock.config, shift=3.0, window_size=0)
    ours = MixedODESDEScheduler.from_config(ours.config)
    ours.set_timesteps(10)
    np.testing.assert_allclose(ours.sigmas[:-1].numpy(), closed_form(UniPCMultistepScheduler, 3.0, 10), rtol=2.0**-22)


def test_compression_of_a_converted_schedule():
    """Steps that are kept have the stock's numbers; new ones lie on the same curve, with timesteps cut off."""
    ours = MixedODESDEScheduler.from_config(
        UniPCMultistepScheduler(**FLOW, flow_shift=5.0).config, window_start=2, window_size=2, suffix_ratio=0.5
    )
    ours.set_timesteps(9)
    whole = closed_form(UniPCMultistepScheduler, 5.0, 9)
    np.testing.assert_allclose(ours.sigmas[:4].numpy(), whole[:4], rtol=2.0**-22)
    assert len(ours.timesteps) == 4 + 3  # ceil(0.5 * 5)
    times = np.append(1 - 0.999 * np.arange(9) / 9, 0)
    new = np.interp(4 + np.arange(3) * 5 / 3, np.arange(10), times)
    np.testing.assert_allclose(ours.sigmas[4:7].numpy(), 5 * new / (1 + 4 * new), rtol=2.0**-22)
    expected = np.trunc(np.minimum(np.append(whole[:4], 5 * new / (1 + 4 * new)), 1 - 1e-6) * 1000)
    assert ours.timesteps.tolist() == expected.tolist()


@pytest.mark.parametrize("solver", ["unipc", "dpmsolver++"])
def test_the_solver_takes_the_stock_steps(solver):
    """Without a window, the steps of the stock multistep scheduler."""
    cls = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
    stock = cls(**FLOW, flow_shift=5.0)
    ours = MixedODESDEScheduler.from_config(stock.config, window_size=0, ode_solver=solver)
    samples = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8)
        sample = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            sample = scheduler.step(torch.sin(1.3 * sample + t / 1000), t, sample, return_dict=False)[0]
        samples.append(sample)
    # DPM's last step is of first order with less than 15 steps, which ours has too: equal up to float32.
    torch.testing.assert_close(*samples, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "stock",
    [
        DDIMScheduler(),
        DDIMScheduler(prediction_type="v_prediction"),
        UniPCMultistepScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction"),
        DPMSolverMultistepScheduler(use_flow_sigmas=True),
        UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True),
        DPMSolverMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("read", [lambda scheduler: scheduler.config, json_config], ids=["config", "file"])
def test_what_is_no_flow_matching_is_refused(stock, read):
    with pytest.raises(ValueError, match="`scheduler` must be one of flow matching, got .* with .*prediction_type="):
        MixedODESDEScheduler.from_config(read(stock))


def all_schedulers() -> list[type[SchedulerMixin]]:
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    return [cls for cls in classes if inspect.isclass(cls) and issubclass(cls, SchedulerMixin)]


def test_every_scheduler_of_diffusers_is_taken_or_refused():
    taken = set()
    for cls in all_schedulers():
        try:
            scheduler = cls()
        except (TypeError, ValueError, ImportError):  # one that needs arguments, or another package
            continue
        try:
            flow_matching_config(scheduler.config)
        except ValueError:
            continue
        taken.add(cls.__name__.removesuffix("Scheduler").removesuffix("Discrete"))
    assert "FlowMatchEuler" in taken and taken <= TAKEN


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="`use_karras_sigmas` must be False with use_flow_sigmas='unipc', got True"):
        MixedODESDEScheduler(use_flow_sigmas="unipc", use_karras_sigmas=True)
    with pytest.raises(ValueError, match="`use_flow_sigmas` must be False, or one of 'unipc', 'dpmsolver', got True"):
        MixedODESDEScheduler(use_flow_sigmas=True)
