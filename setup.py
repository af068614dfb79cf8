"""Metadata is in setup.cfg. This file makes the README's links absolute, as PyPI needs them."""

import configparser
import re
from pathlib import Path

from setuptools import setup


FOLDER = Path(__file__).parent


def long_description() -> str:
    """The README, with links and images of this repository by their addresses."""
    settings = configparser.ConfigParser()
    settings.read(FOLDER / "setup.cfg", encoding="utf-8")
    repository = settings["metadata"]["url"]
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#)", rf"\1{repository}/raw/main/", readme)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?![a-z]+:|#)", rf"\1{repository}/blob/main/", readme)


setup(long_description=long_description(), long_description_content_type="text/markdown")
