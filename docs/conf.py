"""Configuration of the documentation. `make docs` builds it; warnings are errors."""

import sys
from pathlib import Path

import diffusers_mixgrpo


sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "diffusers-mixgrpo"
copyright = "the diffusers-mixgrpo authors, Apache-2.0"
release = version = diffusers_mixgrpo.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "huggingface_docstrings",
    "mathml",
]
exclude_patterns = ["_build"]
nitpicky = True

# Links in GitHub's form, such as `training.md#batch-arithmetic`, and its math
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block"]
myst_heading_anchors = 4

# Arguments are described in the docstrings, with their types.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"

html_theme = "furo"
html_title = "diffusers-mixgrpo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
# Code blocks of a terminal are copied without its prompt.
copybutton_prompt_text = "$ "
