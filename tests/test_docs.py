"""
Every Python block and every command of the README and of docs/, as written.

The blocks of a page run one after the other in one namespace, as a reader would run them. What a laptop does not have
is replaced, and nothing else:

| In the page | Here |
| --- | --- |
| `black-forest-labs/FLUX.1-dev`, `-Kontext-dev` on the Hub | the bundled tiny FLUX, so named in a Hub cache |
| `hpsv2` and `pickscore` | small random weights in the layout of the published files, in that cache |
| `you/flux-mixgrpo` on the Hub, the folder `output` | an untrained LoRA of the tiny FLUX, in folders of these names |
| `"cuda"` | `"cpu"` |
| image sizes, prompt lengths, denoising steps, `max_steps` | 64x64 pixels, 12 tokens, 8 steps, one iteration |
| `push_to_hub` | saves what it would push |
| files of the reader: `prompts.txt`, `cat.png`, `recipe.yaml` | made here, the recipe from docs/recipes.md |

Commands are parsed by the parsers of the scripts they name, and not run.
"""

import argparse
import configparser
import functools
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import FluxKontextPipeline, FluxPipeline
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from transformers import HfArgumentParser
from trl import TrlParser

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, toy
from diffusers_mixgrpo.commands import COMMANDS


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
# Weights for the reward models, which their own tests make
sys.path.append(str(ROOT / "tests" / "rewards"))

# Settings of a real run, of which the first iteration is enough here
SMALL = {"height": 64, "width": 64, "num_inference_steps": 8, "max_sequence_length": 12}
SMALL |= {"max_steps": 4, "use_cpu": True, "report_to": "none"}
# Programs that are not ours, of which nothing is checked
FOREIGN = {"cd", "export", "git", "vllm"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def pages_with(*languages: str) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in PAGES if blocks(page, *languages)]


# ---- What stands in for the Hub, a GPU and a day of training ----


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory) -> Path:
    """A cache of the Hub, as `huggingface_hub` lays it out, with small models under the names of the large ones."""
    from test_hpsv2 import original_weights
    from toy_clip import save_clip

    cache = tmp_path_factory.mktemp("hub")

    def repository(name: str) -> Path:
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("1" * 40)
        snapshot = folder / "snapshots" / ("1" * 40)
        snapshot.mkdir(parents=True)
        return snapshot

    flux = repository("black-forest-labs/FLUX.1-dev")
    flux.rmdir()
    flux.symlink_to(toy.path())
    kontext = FluxKontextPipeline(**toy.load().components)
    kontext.save_pretrained(repository("black-forest-labs/FLUX.1-Kontext-dev"))
    hpsv2 = repository("xswu/HPSv2")
    for version in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"state_dict": original_weights()}, hpsv2 / version)
    save_clip(repository("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"))
    save_clip(repository("yuvalkirstain/PickScore_v1"))
    return cache


def save_lora(folder: Path) -> None:
    pipe = toy.load()
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))


@pytest.fixture
def laptop(hub_cache, tmp_path, monkeypatch) -> Path:
    """A folder to work in, where the stand-ins of this file are in place."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.chdir(tmp_path)

    configure = MixGRPOConfig.__init__
    monkeypatch.setattr(MixGRPOConfig, "__init__", lambda self, **given: configure(self, **(given | SMALL)))

    sample = FluxPipeline.__call__

    @functools.wraps(sample)
    def sample_small(self, *args, **given):
        given |= {"height": 64, "width": 64, "max_sequence_length": 12}
        return sample(self, *args, **({"num_inference_steps": 8} | given))

    monkeypatch.setattr(FluxPipeline, "__call__", sample_small)

    def push_to_hub(trainer):
        trainer.save_model()
        trainer.create_model_card()

    monkeypatch.setattr(MixGRPOTrainer, "push_to_hub", push_to_hub)

    Image.new("RGB", (64, 64), "gray").save("cat.png")
    Path("prompts.txt").write_text("a cat\na dog\n")
    Path("recipe.yaml").write_text(blocks(ROOT / "docs" / "recipes.md", "yaml")[0])
    save_lora(Path("you/flux-mixgrpo"))  # diffusers does not search an offline cache for the file
    save_lora(Path("output/ema"))
    toy.load().transformer.save_pretrained("output/ema/transformer")
    return tmp_path


@pytest.mark.parametrize("name", pages_with("python", "py"))
def test_the_python_blocks_of_a_page_run(name, laptop):
    page = ROOT / name
    found = blocks(page, "python", "py")
    marked = [line for line in page.read_text(encoding="utf-8").splitlines() if re.match(r"\s*(```|~~~) *py", line)]
    assert len(found) == len(marked)  # none is skipped, such as an indented one

    namespace: dict = {"__name__": "__main__"}
    for i, source in enumerate(found):
        code = compile(source.replace('"cuda"', '"cpu"'), f"{name}, block {i + 1}", "exec")
        exec(code, namespace)


# ---- Commands ----


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page, in words: of its blocks, and those of our scripts that stand in the text."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(
        r"`((?:python examples/|diffusers-mixgrpo )[^`]* --[^`]+)`", FENCE.sub("", text).replace("\n", " ")
    )
    for line in lines:
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word == "&&":
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


class Parsed(Exception):
    """Instead of what a script does after it has parsed its flags."""


def parse(script: str, flags: list[str], monkeypatch) -> None:
    """
    Run a script, or a command of `diffusers-mixgrpo`, until its flags are parsed by its own parser.

    The commands are called as modules, since `diffusers-mixgrpo` itself also has a parser.
    """

    def stop_after(function):
        @functools.wraps(function)
        def parse(*args, **kwargs):
            function(*args, **kwargs)
            raise Parsed

        return parse

    monkeypatch.setattr(sys, "argv", [script, *flags])
    for parser, method in (
        (argparse.ArgumentParser, "parse_args"),
        (HfArgumentParser, "parse_args_into_dataclasses"),
        (TrlParser, "parse_args_and_config"),
    ):
        monkeypatch.setattr(parser, method, stop_after(getattr(parser, method)))
    with pytest.raises(Parsed):
        if script in COMMANDS:
            importlib.import_module(f"diffusers_mixgrpo.commands.{script.replace('-', '_')}").main()
        else:
            monkeypatch.syspath_prepend(str((ROOT / script).parent))
            runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("name", pages_with("bash"))
def test_the_commands_of_a_page_parse(name, laptop, monkeypatch):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    seen = 0
    for words in commands(ROOT / name):
        seen += 1
        program, *flags = words
        if program == "make":
            assert [flag for flag in flags if "=" not in flag and flag not in targets] == []
        elif program == "pip":
            named = re.findall(r"\[([\w,]+)\]", " ".join(flags))
            assert set(",".join(named).split(",")) - {""} <= extras, words
        elif program == "accelerate":
            launch = launch_command_parser().parse_args(flags[1:])
            assert flags[0] == "launch"
            assert launch.config_file is None or (ROOT / launch.config_file).is_file(), words
            script = [launch.training_script, *launch.training_script_args]
            if launch.module:
                assert script.pop(0) == "diffusers_mixgrpo"
            with monkeypatch.context() as patch:
                parse(script[0], script[1:], patch)
        elif program in ("python", "diffusers-mixgrpo"):
            with monkeypatch.context() as patch:
                parse(flags[0], flags[1:], patch)
        else:
            assert program in FOREIGN or program.startswith(".venv/bin/"), words
    assert seen
