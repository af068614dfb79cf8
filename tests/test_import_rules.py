"""Who may import whom: the order in which the package can be read."""

import ast
from pathlib import Path

import pytest

import diffusers_mixgrpo


PACKAGE = Path(diffusers_mixgrpo.__file__).parent
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}

# Module -> the package's modules that it may import. A folder's name stands for all of its modules.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "window_schedule": set(),
    "hybrid_inference": set(),
    "advantages": set(),
    "prompt_sampler": set(),
    "prompt_embeds": {"prompt_sampler"},
    "iteration_callback": set(),
    "iteration_draws": set(),
    "progress_callback": set(),
    "presets": set(),
    "sample_grid": set(),
    "accelerated_ode": set(),
    "model_card": set(),
    "trained_weights": set(),
    "policies": {"policies"},
    "rewards": {"rewards"},
    "toy": {"toy"},
    "scheduling_mixed_ode_sde": {"kernels"},
    "rollout": {"kernels", "scheduling_mixed_ode_sde"},
    "reward_calls": {"advantages"},
    "mixgrpo_config": {"advantages", "presets", "window_schedule"},
    "quantization": set(),
    "prepare_pipeline": {"mixgrpo_config", "policies", "quantization", "scheduling_mixed_ode_sde"},
    "peak_memory": set(),
    "replay_batch_size": set(),
    "preflight_report": set(),
    "preflight": {
        "advantages",
        "iteration_draws",
        "peak_memory",
        "preflight_report",
        "prepare_pipeline",
        "prompt_sampler",
        "replay_batch_size",
        "rollout",
        "scheduling_mixed_ode_sde",
    },
}
MAY_IMPORT_TRL = {"mixgrpo_trainer", "mixgrpo_config"}


def imports(module: str) -> set[str]:
    """Names of the modules that `module` imports, those of this package as `.name`, wherever in the file."""
    found = set()
    parts = module.split("/")
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add(node.module or "")
            else:
                base = parts[: len(parts) - node.level]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found |= {"." + ".".join([*base, *name.split(".")]) for name in names}
    prefix = PACKAGE.name
    return {"." + name.removeprefix(prefix).lstrip(".") if name.split(".")[0] == prefix else name for name in found}


def test_the_rules_find_imports():
    assert ".kernels" in imports("rollout")
    assert ".policies.flux" in imports("policies/__init__")
    assert "torch" in imports("policies/flux")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_who_imports_whom(module):
    own = module.split("/")[0]
    if own not in ALLOWED:
        assert own in ("__init__", "mixgrpo_trainer"), f"say in ALLOWED what {own} may import"
        return
    used = {name[1:].split(".")[0] for name in imports(module) if name.startswith(".")}
    assert used <= ALLOWED[own], f"{module} imports {sorted(used - ALLOWED[own])}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_who_imports_trl(module):
    if module not in MAY_IMPORT_TRL:
        assert not any(name.split(".")[0] == "trl" for name in imports(module))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_policies_know_flux(module):
    # The config and the trainer may name a FluxPipeline, since they are given one; none looks inside.
    if module.split("/")[0] in ("policies", "toy", "hybrid_inference"):
        return
    # `cache_prompt_embeds` is the option, of whatever family.
    text = MODULES[module].read_text().replace("cache_prompt_embeds", "").replace(".prompt_embeds import", "")
    assert "FluxTransformer2DModel" not in text or module == "model_card"
    for detail in ("prompt_embeds", "guidance_embeds", "vae_scale_factor", "pooled"):
        assert detail not in text


def test_public_names():
    for name in diffusers_mixgrpo.__all__:
        assert getattr(diffusers_mixgrpo, name).__doc__ is not None
    assert sorted(diffusers_mixgrpo.__all__) == diffusers_mixgrpo.__all__
    assert (PACKAGE / "py.typed").exists()
