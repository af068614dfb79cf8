"""What an import brings along, and that names which are imported on first use are as good as others."""

import ast
import inspect
import pickle
import re
import subprocess
import sys

import pytest
from helpers import SMALL

import diffusers_mixgrpo
from diffusers_mixgrpo.policies import FAMILIES


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


TRAIN = """
import sys
from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer
from peft import LoraConfig

def reward(prompts, images, **columns):
    return [float(i) for i in range(len(images))]

args = MixGRPOConfig(output_dir=sys.argv[2], **eval(sys.argv[3]))
trainer = MixGRPOTrainer(sys.argv[1], reward, args, [{"prompt": "a cat"}] * 2, peft_config=LoraConfig(r=2))
trainer.train()
print(*sorted(name for name in sys.modules if name.startswith(("diffusers", "transformers.models"))))
"""


@pytest.mark.slow
def test_a_run_imports_its_own_family_alone(pipeline_folder, tmp_path):
    arguments = [pipeline_folder, str(tmp_path), repr(SMALL | {"max_steps": 2})]
    done = subprocess.run([sys.executable, "-c", TRAIN, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split("\n")[-2].split()
    own = f"diffusers_mixgrpo.policies.{FAMILIES['FluxPipeline'][0]}"
    families = {f"diffusers_mixgrpo.policies.{module}" for module, _ in FAMILIES.values()}
    assert families & set(modules) == {own}
    # diffusers itself imports the classes of all transformers, but no other pipeline, and no other text encoder.
    assert set(re.findall(r"diffusers\.pipelines\.(\w+)\.pipeline_", " ".join(modules))) == {"flux"}
    encoders = set(re.findall(r"transformers\.models\.(\w+)\.modeling_", " ".join(modules)))
    assert {"clip", "t5"} <= encoders and not encoders & {"qwen2_5_vl", "qwen3", "mistral3", "pixtral"}


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
