"""The documentation's site: ``make docs``."""

import stf_diffusers

project = "stf_diffusers"
author = "the authors of stf_diffusers"
copyright = "the authors of stf_diffusers, Apache-2.0"
version = release = stf_diffusers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
# $...$ is a formula, as on GitHub. Only a page that has one fetches MathJax; all others open without a network.
myst_enable_extensions = ["dollarmath"]
myst_dmath_allow_digits = False

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_use_ivar = True
# What a docstring returns is a sentence, whose part before a colon is no type.
napoleon_use_rtype = False
# Docstrings write code in double backticks and names in single ones, which are no references.
default_role = "code"

# Names in signatures must exist here, or be others' (whose pages are not fetched to be linked).
nitpicky = True
nitpick_ignore_regex = [
    (
        "py:class",
        r"(torch|numpy|diffusers|accelerate|datasets|huggingface_hub|matplotlib|PIL|argparse|os|pathlib|random|collections\.abc)\..+",
    ),
    ("py:class", "Tensor|Figure"),
    ("py:exc", r"huggingface_hub\..+"),
]

html_theme = "furo"
html_title = f"stf_diffusers {release}"
html_show_sphinx = False
