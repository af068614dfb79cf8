"""What an import brings along, and that names which are imported on first use are as good as others."""

import ast
import inspect
import pickle
import subprocess
import sys

import pytest

import diffusers_mixgrpo


LIBRARIES = {"torch", "diffusers", "transformers", "accelerate", "peft", "trl", "datasets", "matplotlib", "scipy"}
TRAINING = {"transformers", "accelerate", "peft", "trl", "datasets", "matplotlib"}


@pytest.mark.parametrize(
    ("code", "unused"),
    [
        ("import diffusers_mixgrpo; dir(diffusers_mixgrpo); diffusers_mixgrpo.hybrid_inference", LIBRARIES),
        ("from diffusers_mixgrpo import toy; toy.prompts('test'); toy.toy_reward", LIBRARIES - {"scipy"}),
        ("from diffusers_mixgrpo import MixedODESDEScheduler", TRAINING),
        ("from diffusers_mixgrpo import WindowSchedule, sample_trajectories, compute_advantages", TRAINING),
        ("from diffusers_mixgrpo.commands import serve_rewards, COMMANDS", LIBRARIES),
        ("import runpy; sys.argv = ['x', 'train']; from diffusers_mixgrpo import __main__", LIBRARIES),
    ],
)
def test_what_is_not_imported(code, unused):
    code = f"import sys; {code}; print(*sorted({unused!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_type_checkers_see_the_same_names():
    tree = ast.parse(inspect.getsource(diffusers_mixgrpo))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == diffusers_mixgrpo._MODULES
    assert {*seen, "hybrid_inference"} == set(diffusers_mixgrpo.__all__)


def test_names_are_those_of_their_modules():
    names = {}
    exec("from diffusers_mixgrpo import *", names)
    for name in diffusers_mixgrpo.__all__:
        assert names[name] is getattr(diffusers_mixgrpo, name)
        assert pickle.loads(pickle.dumps(names[name])) is names[name]
        assert name in dir(diffusers_mixgrpo)
    assert callable(diffusers_mixgrpo.hybrid_inference)  # not the module of this name
    with pytest.raises(AttributeError, match="no attribute 'MixGRPO'"):
        _ = diffusers_mixgrpo.MixGRPO
