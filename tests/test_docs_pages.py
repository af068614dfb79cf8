"""
The pages of docs/ hold together: links, navigation, names of the code, and the API reference.

`make docs` builds the site and finds the same errors and more; this takes a second and needs no Sphinx.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

import diffusers_mixgrpo
from diffusers_mixgrpo import MixGRPOConfig


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
TEXTS = {page: page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]}
WITHOUT_CODE = {page: re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S) for page, text in TEXTS.items()}
ENTRY = re.compile(r"^\.\. auto(\w+):: ([\w.]+)\n((?:    :.*\n)*)", re.MULTILINE)

sys.path.append(str(DOCS / "extensions"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and MyST make of the page's titles."""
    titles = re.findall(r"^#+ (.*)$", WITHOUT_CODE[page], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", WITHOUT_CODE[page]):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for image in re.findall(r"!\[([^\]]*)\]\(", WITHOUT_CODE[page]):
        assert image, "an image without a text for those who do not see it"


def test_each_page_is_in_the_navigation_once():
    def entries(index: Path) -> list[Path]:
        trees = re.findall(r"```\{toctree\}\n(.*?)```", TEXTS[index], re.DOTALL)
        names = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
        return [next(index.parent.glob(f"{name}.*")) for name in names]

    listed = [*entries(DOCS / "index.md"), *entries(DOCS / "api" / "index.md")]
    sources = {*PAGES, *DOCS.glob("api/*.rst")} - {DOCS / "index.md"}
    assert sorted(listed) == sorted(sources)


def test_files_that_pages_name_exist():
    folders = [ROOT, ROOT / "src" / "diffusers_mixgrpo", ROOT / "examples", ROOT / "examples" / "studies", DOCS]
    # Files of the released scripts, and files that a run or the reader makes
    foreign = ("finetune_", "inference_", "eval_reward", "pytorch_lora", "recipe.yaml", "training_args", "prompts.")
    foreign += ("gpu_checks.", "evaluation.", "history.", "summary.", "run.", "step_", "model_index.")
    named = 0
    for page, text in WITHOUT_CODE.items():
        if page.name in ("changelog.md", "README.md"):
            continue
        for name in re.findall(r"`((?:[\w-]+/)*[\w*-]+\.(?:py|yaml|md|json|sh))`", text):
            if Path(name).name.startswith(foreign):
                continue
            named += 1
            everywhere = [*folders, ROOT / "examples" / "accelerate_configs", ROOT / "examples" / "configs"]
            everywhere += [folder for folder in (ROOT / "src" / "diffusers_mixgrpo").iterdir() if folder.is_dir()]
            assert any((folder / name).exists() for folder in everywhere), f"{page.name}: {name}"
    assert named > 30


def test_names_behind_files_exist():
    """Such as the functions in "`core/transitions.py`: `predict_noise`", of which paper.md is made."""
    named = 0
    for page, text in WITHOUT_CODE.items():
        for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text):
            tree = ast.parse((ROOT / "src" / "diffusers_mixgrpo" / file).read_text(encoding="utf-8"))
            defined = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    defined.add(node.name)
            for name in re.findall(r"`([\w.]+)`", names):
                if name != "sde_type":
                    named += 1
                    assert set(name.split(".")) <= defined, f"{page.name}: {file} {name}"
    assert named > 8


def test_the_migration_leads_to_fields_that_exist():
    fields = {field.name for field in dataclasses.fields(MixGRPOConfig)}
    rows = re.findall(r"^\| `--.*? \| (.*?) \|", TEXTS[DOCS / "migration.md"], re.MULTILINE)
    commands = ROOT / "src" / "diffusers_mixgrpo" / "commands"
    of_the_script = "".join((commands / name).read_text(encoding="utf-8") for name in ("train.py", "evaluate.py"))
    assert len(rows) > 60
    for cell in rows:
        for name in re.findall(r"`([a-z_]{2,})(?:=[^`]*)?`", cell):
            assert name in fields or name in ("fsdp_config", "model", "solver_type"), name
        for flag in re.findall(r"`--([a-z_]+)", cell):
            assert flag in fields or f"    {flag}: " in of_the_script, flag


# ---- API reference ----


def documented() -> set[str]:
    names = set()
    for page in DOCS.glob("api/*.rst"):
        for kind, name, options in ENTRY.findall(page.read_text(encoding="utf-8") + "\n"):
            if kind != "module":
                names.add(name)
                continue
            members = re.search(r":members: (.+)", options)
            module = importlib.import_module(name)
            if members:
                listed = members[1].split(", ")
            else:
                listed = [n for n, o in vars(module).items() if inspect.getmodule(o) is module and n[0] != "_"]
            without = re.search(r":exclude-members: (.+)", options)
            names |= {f"{name}.{member}" for member in listed if not without or member not in without[1].split(", ")}
    return names


def test_every_public_name_is_documented_and_exists():
    names = documented()
    assert {f"diffusers_mixgrpo.{name}" for name in diffusers_mixgrpo.__all__} <= names
    rewards = importlib.import_module("diffusers_mixgrpo.rewards")
    assert {f"diffusers_mixgrpo.rewards.{place.replace(':', '.')}" for place in rewards.NAMES.values()} <= names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_names_in_docstrings_exist():
    from huggingface_docstrings import find

    foreign = ("transformers", "diffusers", "accelerate", "peft")
    package = ROOT / "src" / "diffusers_mixgrpo"
    seen = 0
    for path in package.glob("**/*.py"):
        dotted = ".".join(["diffusers_mixgrpo", *path.relative_to(package).with_suffix("").parts])
        module = importlib.import_module(dotted.removesuffix(".__init__"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            owners = [value for value in vars(module).values() if inspect.isclass(value)]
            for name in re.findall(r"\[`~?([\w.]+)`\]", ast.get_docstring(node) or ""):
                seen += 1
                is_foreign = name.split(".")[0] in foreign or hasattr(importlib.import_module("diffusers"), name)
                assert is_foreign or any(find(name, module, owner) for owner in [None, *owners]), f"{path}: {name}"
    assert seen > 100


def test_docstrings_become_restructured_text():
    from huggingface_docstrings import convert

    text = convert(
        inspect.cleandoc(
            r"""
            What `f`s do with \\(x^2\\), see [`MixGRPOConfig`] and [paper](https://arxiv.org/abs/2507.21802).

            Args:
                > Arguments of one kind

                a, b (`int`, *optional*):
                    Text: with a colon.
                c (`torch.Tensor` of shape `(B,)`): On one line
                    and the next.

            Returns:
                `float`: The score.

            ```python
            f(1)
            ```
            """
        )
    )
    assert "``f``\\ s do with :math:`x^2`, see :py:obj:`MixGRPOConfig <diffusers_mixgrpo.MixGRPOConfig>`" in text
    assert "`paper <https://arxiv.org/abs/2507.21802>`__" in text
    assert ".. rubric:: Arguments of one kind" in text
    assert "**a, b** (``int``, *optional*)\n    Text: with a colon.\n" in text
    assert "**c** (``torch.Tensor`` of shape ``(B,)``)\n    On one line\n    and the next.\n" in text
    assert "``float``\n    The score.\n" in text
    assert ".. code-block:: python\n\n    f(1)" in text
