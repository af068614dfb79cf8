"""
The scheduler in every stock pipeline of flow matching of the installed diffusers, in miniature with random weights.

docs/stock_pipelines.md has a row for each of them. These tests read it: a pipeline that is missing, or does not do
what its row says, fails.
"""

import ast
import re
from functools import cache
from pathlib import Path

import audio_families
import diffusers
import flux_family
import hunyuan_family
import image_families
import ltx_family
import pytest
import qwen_family
import sd3_family
import torch
import wan_family
import z_image_family
from diffusers import FlowMatchEulerDiscreteScheduler
from drawing import draw

from diffusers_mixgrpo import MixedODESDEScheduler


PAGE = Path(__file__).parents[2] / "docs" / "stock_pipelines.md"
FAMILIES = (
    flux_family,
    sd3_family,
    qwen_family,
    z_image_family,
    image_families,
    wan_family,
    ltx_family,
    hunyuan_family,
    audio_families,
)
MINIATURES = {name: build for family in FAMILIES for name, build in family.PIPELINES.items()}
FLOW_MATCHING = "FlowMatchEulerDiscreteScheduler"
# Schedulers that are of flow matching in some configurations. A pipeline that names one of others is of diffusion.
PERHAPS = {"UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "LTXEulerAncestralRFScheduler", "SchedulerMixin"}


@cache
def cells() -> list[tuple[str, ...]]:
    """The rows of the page's table: name, kind, whether it works, remark."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|([^|]*)\|$", text, re.MULTILINE)


@cache
def rows() -> dict[str, tuple[str, str]]:
    """Whether each pipeline of the page works, and the remark."""
    assert len({name for name, *_ in cells()}) == len(cells())
    return {name: (works, remark.strip()) for name, _, works, remark in cells()}


@cache
def pipelines_of_diffusers() -> set[str]:
    """Classes of pipelines whose `__init__` takes a scheduler of flow matching, without importing them."""
    folder = Path(diffusers.__file__).parent / "pipelines"
    found = set()
    for path in folder.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        is_named = any(name in source for name in (FLOW_MATCHING, *PERHAPS))
        if not is_named or "deprecated" in path.relative_to(folder).parts:
            continue
        for node in ast.parse(source).body:
            is_pipeline = isinstance(node, ast.ClassDef) and node.name.endswith("Pipeline")
            if is_pipeline and any(map(takes_flow_matching, node.body)):
                found.add(node.name)
    return found


def takes_flow_matching(node: ast.stmt) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.name != "__init__":
        return False
    annotations = [a.annotation for a in node.args.args if a.arg == "scheduler" and a.annotation]
    names = {name for annotation in annotations for name in re.findall(r"\w*Scheduler\w*", ast.unparse(annotation))}
    return FLOW_MATCHING in names or bool(names and names <= PERHAPS)


def test_the_page_has_every_pipeline_and_no_other():
    found = pipelines_of_diffusers()
    assert len(found) > 100 and {"FluxPipeline", "WanPipeline", "SanaPipeline"} <= found
    assert sorted(rows()) == sorted(found)


def test_what_is_said_to_work_is_run():
    run = {name for name, (works, _) in rows().items() if works in ("yes", "without a window")}
    assert sorted(run) == sorted(MINIATURES)
    for name, (works, remark) in rows().items():
        assert works in ("yes", "without a window", "no") and (works == "yes" or remark), name


OF_FLOW_MATCH_EULER = [name for name in MINIATURES if name not in wan_family.OF_UNIPC]
# Of a family's pipelines the one that begins with a text, in the default run. Kandinsky 5 works on a million pixels.
QUICK = {name for name, kind, *_ in cells() if kind.startswith("text to ")} - {"Kandinsky5T2IPipeline"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OF_FLOW_MATCH_EULER]
)
def test_the_scheduler_is_a_replacement(name):
    """Without a window the result is the stock one bit for bit. With one, it has other noise, and log-probs."""
    pipe, arguments = MINIATURES[name]()
    stock = pipe.scheduler
    assert type(stock) is FlowMatchEulerDiscreteScheduler
    expected = draw(pipe, stock, arguments)
    ours = MixedODESDEScheduler.from_config(stock.config, window_size=0)
    results = draw(pipe, ours, arguments)
    assert expected and len(results) == len(expected)
    for result, other in zip(results, expected, strict=True):
        assert other.isfinite().all() and torch.equal(result, other)
    assert ours.window_log_probs is None

    windowed = MixedODESDEScheduler.from_config(stock.config, window_start=1, window_size=2)
    windowed.generator = torch.Generator().manual_seed(3)
    if rows()[name][0] == "without a window":
        with pytest.raises(ValueError, match="Use window_size=0"):
            draw(pipe, windowed, arguments)
        return
    log_probs = []
    if name == "WanAnimatePipeline":  # whose record is gone after the call
        arguments = arguments | {"callback_on_step_end": lambda pipe, *_: log_probs.append(recorded(pipe)) or {}}
    results = draw(pipe, windowed, arguments)
    assert all(result.isfinite().all() for result in results)
    assert not all(map(torch.equal, results, expected))
    log_probs = log_probs[-1] if log_probs else recorded(pipe)
    assert log_probs.shape == (1, 2) and log_probs.isfinite().all()


def recorded(pipe: diffusers.DiffusionPipeline) -> torch.Tensor:
    return pipe.scheduler.window_log_probs


@pytest.mark.parametrize("name", sorted(wan_family.OF_UNIPC))
def test_the_scheduler_is_a_replacement_of_unipc(name):
    """With its solver, up to float32. They step copies of the scheduler, and leave no record."""
    pipe, arguments = MINIATURES[name]()
    stock = pipe.scheduler
    (expected,) = draw(pipe, stock, arguments)
    (result,) = draw(
        pipe, MixedODESDEScheduler.from_config(stock.config, window_size=0, ode_solver="unipc"), arguments
    )
    assert expected.isfinite().all()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert rows()[name][0] == "without a window"
    draw(pipe, MixedODESDEScheduler.from_config(stock.config, window_start=1, window_size=2), arguments)
    assert recorded(pipe) is None


def test_noise_levels_of_edm_are_refused():
    """Those that the pipelines of Cosmos 2 write into the configuration of their scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    with pytest.raises(ValueError, match="`scheduler` must be one of flow matching"):
        MixedODESDEScheduler.from_config(scheduler.config)
