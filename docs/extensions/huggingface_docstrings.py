"""Docstrings in the manner of Hugging Face (Markdown, `Args:` with types in backticks) for Sphinx's autodoc."""

import importlib
import inspect
import re
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from sphinx.application import Sphinx


PACKAGE = "diffusers_mixgrpo"
SECTIONS = {
    "Args": "Arguments",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
    "Attributes": "Attributes",
}
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)(?=(.?))", re.DOTALL)
_REFERENCE = re.compile(r"\[`(~?)([^`]+)`\]")
_MATH = re.compile(r"\\\\\((.+?)\\\\\)", re.DOTALL)
_LINK = re.compile(r"\[([^\]]+)\]\((https?://[^)]+)\)")


def convert(docstring: str, where: ModuleType | None = None, owner: type | None = None) -> str:
    """
    A docstring as reStructuredText.

    Args:
        docstring (`str`): The docstring, without its indentation.
        where (module, *optional*): Where it is from, in which names that it refers to are looked up.
        owner (`type`, *optional*): The class that it is of, likewise.
    """
    blocks = []
    for is_code, text in _split_code(docstring):
        if is_code:
            blocks.append(text)
            continue
        text = _MATH.sub(lambda match: f":math:@role{match[1].strip()}@role", text)
        text = _REFERENCE.sub(lambda match: _reference(match[1], match[2], where, owner), text)
        text = _LINK.sub(r"@link{\1}{\2}", text)
        text = _CODE.sub(_literal, text)
        text = re.sub(r"@link\{(.+?)\}\{(.+?)\}", lambda match: f"`{match[1].replace('`', '')} <{match[2]}>`__", text)
        blocks.append(_sections(text.replace("@role", "`")))
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def _split_code(docstring: str) -> list[tuple[bool, str]]:
    """The docstring's blocks of code as directives, and the text between them."""
    parts = re.split(r"^( *)```\w+\n(.*?)^ *```$", docstring, flags=re.DOTALL | re.MULTILINE)
    pieces = [(False, parts[0])]
    for indent, code, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        body = "\n".join(f"{indent}    {line}".rstrip() for line in lines)
        pieces += [(True, f"{indent}.. code-block:: python\n\n{body}"), (False, text)]
    return [(is_code, text) for is_code, text in pieces if text.strip()]


def _literal(match: re.Match[str]) -> str:
    following = match[2]
    # In reStructuredText the mark that ends a literal may not touch a word.
    return f"``{match[1]}``" + ("\\ " if following.isalnum() else "")


def _reference(tilde: str, name: str, where: ModuleType | None, owner: type | None) -> str:
    target = find(name, where, owner)
    shown = name.rpartition(".")[2] if tilde else name
    # The backticks of roles must survive the conversion of literals.
    return f":py:obj:@role{shown} <{target}>@role" if target else f"`{shown}`"


def find(name: str, where: ModuleType | None = None, owner: type | None = None) -> str | None:
    """The full name of an object of the package that a docstring refers to, as autodoc documents it."""
    package = importlib.import_module(PACKAGE)
    for start in (owner, where, package, *_modules()):
        found = _walk(start, name.split(".")) if start is not None else None
        full = _full_name(found) if found is not None else None
        if full:
            return full
        # A field has no entry of its own: it is described by its class.
        holder, _, field = name.rpartition(".")
        parent = _walk(start, holder.split(".")) if holder and start is not None else None
        if inspect.isclass(parent) and (hasattr(parent, field) or field in getattr(parent, "__annotations__", {})):
            return _full_name(parent)
    return None


def _modules() -> list[ModuleType]:
    return [module for name, module in sorted(sys.modules.items()) if name.startswith(f"{PACKAGE}.")]


def _walk(start: Any, names: list[str]) -> Any:
    for name in names:
        if isinstance(start, ModuleType) and not hasattr(start, name):
            try:
                importlib.import_module(f"{start.__name__}.{name}")
            except ImportError:
                return None
        start = getattr(start, name, None)
    return start


def _full_name(found: Any) -> str | None:
    if isinstance(found, ModuleType):
        return found.__name__ if found.__name__.startswith(PACKAGE) else None
    found = getattr(found, "fget", found)  # of a property
    module, name = getattr(found, "__module__", ""), getattr(found, "__qualname__", None)
    if not name or not (module or "").startswith(PACKAGE):
        return None
    public = importlib.import_module(PACKAGE)
    is_public = name.split(".")[0] in public.__all__
    return f"{PACKAGE if is_public else module}.{name}"


def _sections(text: str) -> str:
    """`Args:` and its like as definition lists, and notes and tables as directives."""
    lines = text.splitlines()
    result: list[str] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        title = line.rstrip().removesuffix(":")
        end = position + 1
        if line in ("Example:", "Examples:"):
            result += [f".. rubric:: {title}", ""]
        elif line.endswith(":") and title in SECTIONS:
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
                end += 1
            result += ["", f".. rubric:: {SECTIONS[title]}", "", *_entries(lines[position + 1 : end]), ""]
        elif line.lstrip().startswith("> [!NOTE]"):
            while end < len(lines) and lines[end].lstrip().startswith(">"):
                end += 1
            quoted = [re.sub(r"^ *> ?", "", quoted) for quoted in lines[position + 1 : end]]
            result += ["", ".. note::", "", *(f"    {line}" for line in _lists(quoted)), ""]
        elif line.lstrip().startswith("|"):
            while end < len(lines) and lines[end].lstrip().startswith("|"):
                end += 1
            result += ["", *_table(lines[position:end]), ""]
        else:
            result.append(line)
        position = end
    return "\n".join(_lists(result))


def _entries(lines: list[str]) -> list[str]:
    """The entries of a section: `name (type): text`, whose lines after the first are indented."""
    entries: list[list[str]] = []
    for line in lines:
        if line.startswith("    ") and not line.startswith("     "):
            if entries and len(entries[-1]) == 1 and entries[-1][0].endswith(","):
                entries[-1] = [f"{entries[-1][0]} {line.strip()}"]  # its names go on in this line
            else:
                entries.append([line.strip()])
        elif entries:
            entries[-1].append(line.removeprefix("    "))
    result: list[str] = []
    for entry in entries:
        if entry[0].startswith("> "):
            result += ["", f".. rubric:: {entry[0].removeprefix('> ')}", ""]
            continue
        term, text = _term(entry)
        result += [term, *(f"    {line}" for line in text), ""]
    return result


def _term(entry: list[str]) -> tuple[str, list[str]]:
    """The name and type of an entry, and its text."""
    first, rest = entry[0], inspect.cleandoc("\n".join(["", *entry[1:]])).splitlines()
    colon = _first_colon(first)
    if colon is None:
        return "\n".join([first, *rest]), []
    term, text = first[:colon], first[colon + 1 :].strip()
    names, parenthesis, of_type = term.partition(" (")
    if not names.startswith(("`", ":")):
        names = f"**{names}**"
    return names + parenthesis + of_type, _lists(([text] if text else []) + rest)


def _first_colon(line: str) -> int | None:
    """Where a colon ends the name and type: outside of parentheses and of code."""
    depth = 0
    in_code = False
    for position, character in enumerate(line):
        if character == "`":
            in_code = not in_code
        elif not in_code and character in "()":
            depth += 1 if character == "(" else -1
        elif character == ":" and not in_code and depth == 0 and line[position + 1 : position + 2] in ("", " "):
            return position
    return None


def _lists(lines: list[str]) -> list[str]:
    """reStructuredText wants an empty line before a list."""
    result: list[str] = []
    for line in lines:
        is_item = line.lstrip().startswith("- ")
        before = result[-1] if result else ""
        if is_item and before.strip() and not before.lstrip().startswith("- ") and not before.startswith("  "):
            result.append("")
        result.append(line)
    return result


def _table(lines: list[str]) -> list[str]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    result = [".. list-table::", "    :header-rows: 1", ""]
    for row in rows[:1] + rows[2:]:
        result += [f"    {'* ' if column == 0 else '  '}- {cell}" for column, cell in enumerate(row)]
    return result


def process(app: "Sphinx", what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    where = inspect.getmodule(obj)
    owner = obj if inspect.isclass(obj) else None
    if what in ("method", "property", "attribute"):
        owner = getattr(importlib.import_module(name.rsplit(".", 2)[0]), name.split(".")[-2], None)
    lines[:] = convert("\n".join(lines), where, owner).splitlines()


def short_signature(app: "Sphinx", what: str, name: str, obj: Any, options: Any, signature: str, result: str) -> Any:
    """The arguments of a configuration are described one by one, and are too many for a signature."""
    return ("(**arguments)", None) if name.endswith(".MixGRPOConfig") else None


def missing(app: "Sphinx", env: Any, node: Any, shown: Any) -> Any:
    """
    A name of another library, or one that exists and has no entry on any page, is shown as code.

    A name of this package that does not exist is an error.
    """
    names = node.get("reftarget", "").split(".")
    if node.get("refdomain") != "py" or not names[0]:
        return None
    if names[0] != PACKAGE:
        return shown
    # The module and not what a package has under its name, such as the function `hybrid_inference`
    length = max(i for i in range(1, len(names) + 1) if ".".join(names[:i]) in sys.modules)
    module = sys.modules[".".join(names[:length])]
    return shown if _walk(module, names[length:]) is not None else None


def setup(app: "Sphinx") -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process)
    app.connect("missing-reference", missing)
    app.connect("autodoc-process-signature", short_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
