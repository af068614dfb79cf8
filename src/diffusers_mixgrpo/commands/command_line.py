"""Arguments of a command, from flags and YAML files. Unknown names are errors that give the nearest known one."""

import os
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from trl import TrlParser

from .. import argument_rules as must_be


TOY_CONFIGURATION = Path(__file__).parent / "configs" / "toy.yaml"
# Ending of a file -> what reads it as a dataset
DATASET_READERS = {".json": Dataset.from_json, ".jsonl": Dataset.from_json, ".csv": Dataset.from_csv}


def flag(help: str, default: Any = None) -> Any:
    """The field of a dataclass that is a flag with this help."""
    return field(default=default, metadata={"help": help})


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def parse(argv: list[str], *dataclasses: Any) -> tuple[Any, ...]:
    """
    Dataclasses from flags, and from the YAML file that is passed with `--config`.

    Args:
        argv (`list[str]`): The flags, as `--name value` or `--name=value`.
        dataclasses (`type`): The dataclasses whose fields are the flags.

    Raises:
        `ValueError`: For a name that is no field, in the flags or in the file, or a value that cannot work.
    """
    argv = [part for argument in argv for part in (argument.split("=", 1) if argument[:2] == "--" else [argument])]
    names = [argument[2:].replace("-", "_") for argument in argv if argument[:2] == "--"]
    if "--config" in argv:
        file = "".join(argv[argv.index("--config") + 1 :][:1])
        must_be.check("config", file, must_be.FILE, "Pass a YAML file.")
        settings = read_yaml(file)
        must_be.check("config", settings, must_be.MAPPING, f"Write `name: value` on the lines of {file}.")
        names += settings
    known = {field.name for dataclass in dataclasses for field in fields(dataclass)} | {"config", "env", "help"}
    must_be.check_names([name for name in names if name.removeprefix("no_") not in known], known, "an argument")
    # An abbreviation could be of a longer name than was meant.
    return TrlParser(dataclasses, allow_abbrev=False).parse_args_and_config(argv)
