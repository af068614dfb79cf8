"""The order in which the package can be read: who may import whom, who may name a pipeline family, what has a type."""

import ast
import re
from pathlib import Path

import pytest

import diffusers_mixgrpo
from diffusers_mixgrpo.policies import FAMILIES, policy_class


PACKAGE = Path(diffusers_mixgrpo.__file__).parent
TESTS = Path(__file__).parent
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}

# Folder, or file at the top -> the package's folders and files that it may import
ALLOWED = {
    "core": {"core", "scheduling_mixed_ode_sde"},
    "argument_rules": set(),
    "scheduling_mixed_ode_sde": {"core", "argument_rules"},
    "presets": set(),
    "config_rules": {"argument_rules", "core", "scheduling_mixed_ode_sde"},
    "mixgrpo_config": {"argument_rules", "config_rules", "core", "presets", "scheduling_mixed_ode_sde"},
    "policies": {"policies", "core", "mixgrpo_config"},
    "rewards": {"rewards", "core"},
    "training": {"training", "core", "policies", "rewards", "mixgrpo_config", "scheduling_mixed_ode_sde"},
    "reports": {"reports", "training", "policies", "mixgrpo_config"},
    "hybrid_inference": set(),
    "toy": {"toy"},
}
AT_THE_TOP = {"__init__", "__main__", "mixgrpo_trainer", "commands"}  # may import everything

# Parameters that name one of the package's nouns must have its type
NOUNS = ("policy", "conditioning", "trajectory", "plan", "settings", "rollout", "engine", "trainer", "transitions")


def imports(module: str) -> set[str]:
    """The package's modules that `module` imports, wherever in the file, as paths such as `core/rollout`."""
    found = set()
    folder = module.split("/")[:-1]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = folder[: len(folder) - (node.level - 1)]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {"/".join([*base, *name.split(".")]) for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            found.add("/".join(node.module.split(".")[1:]))
        elif isinstance(node, ast.Import):
            own = [alias.name.split(".") for alias in node.names if alias.name.split(".")[0] == PACKAGE.name]
            found |= {"/".join(parts[1:]) for parts in own}
    return found


def functions(module: str) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(n, ast.FunctionDef)]


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def code_without_docstrings(path: Path) -> str:
    """The code of a file, which `ast.unparse` writes without comments."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            texts = [n for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
            node.body = [n for n in body if n not in texts] or [ast.Pass()]
    return ast.unparse(tree)


def test_the_rules_find_imports():
    assert {"core/transitions", "scheduling_mixed_ode_sde"} <= imports("core/rollout")
    assert "core/policy" in imports("policies/flux")
    assert "rewards/runner" in imports("training/engine")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_who_imports_whom(module):
    room = module.split("/")[0]
    if room in AT_THE_TOP:
        return
    assert room in ALLOWED, f"say in ALLOWED what {room} may import"
    used = {name.split("/")[0] for name in imports(module)}
    assert used <= ALLOWED[room], f"{module} imports {sorted(used - ALLOWED[room])}"


# The commands call the public API, as a user's script does.
@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.split("/")[0] != "commands"))
def test_no_function_outside_the_trainers_file_takes_a_trainer(module):
    takes = [f.name for f in functions(module) if any("trainer" in p.arg for p in parameters(f))]
    assert takes == []
    assert not re.search(r"\btrl\b", code_without_docstrings(MODULES[module]))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nouns_have_types(module):
    untyped = [
        f"{function.name}({parameter.arg})"
        for function in functions(module)
        for parameter in parameters(function)
        if parameter.arg in NOUNS and (parameter.annotation is None or "Any" in ast.unparse(parameter.annotation))
        if not (parameter.arg == "settings" and "dict" in ast.unparse(parameter.annotation))
    ]
    assert untyped == []


# ---- Families ----


def names_of_families() -> set[str]:
    """Names of the families, of their classes, and of the layers that their LoRAs adapt."""
    names = set()
    for pipeline in FAMILIES:
        policy = policy_class(pipeline)
        names |= {policy.family, pipeline, policy.__name__, *policy.lora_target_modules}
    return names


# The toy bundles a pipeline of one family; its files are data.
OUTSIDE_POLICIES = sorted(name for name in MODULES if name.split("/")[0] != "policies")
CORE_TESTS = sorted(path.relative_to(TESTS).as_posix() for path in (TESTS / "core").rglob("*.py"))


@pytest.mark.parametrize("module", OUTSIDE_POLICIES)
def test_only_the_policies_name_a_family(module):
    code = code_without_docstrings(MODULES[module]).lower()
    for name in names_of_families():
        assert name.lower() not in code
    text = MODULES[module].read_text()
    for name in FAMILIES:  # nor do comments and docstrings name classes
        assert name not in text
    for detail in ("guidance_embeds", "pooled_prompt", "pooled_projections", "txt_ids", "img_ids"):
        assert detail not in text


def test_a_family_is_imported_by_its_name_in_the_table_alone():
    """So that one that is not used is never imported; test_lazy_imports looks at a whole run."""
    families = {f"policies/{module}" for module, _ in FAMILIES.values()}
    assert {module: imports(module) & families for module in MODULES if module not in families} == {
        module: set() for module in MODULES if module not in families
    }


@pytest.mark.parametrize("file", CORE_TESTS)
def test_tests_of_the_core_name_no_family(file):
    text = (TESTS / file).read_text().lower()
    for name in names_of_families():
        assert name.lower() not in text


def test_the_names_are_real():
    assert {"flux", "FluxPipeline", "FluxPolicy", "attn.to_q"} <= names_of_families()


# ---- Public names ----


def test_public_names():
    for name in diffusers_mixgrpo.__all__:
        assert getattr(diffusers_mixgrpo, name).__doc__ is not None
    assert sorted(diffusers_mixgrpo.__all__) == diffusers_mixgrpo.__all__
    assert (PACKAGE / "py.typed").exists()
