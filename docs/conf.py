"""The documentation's site: ``make docs``."""

import stf_diffusers

project = "stf_diffusers"
author = "the authors of stf_diffusers"
copyright = "the authors of stf_diffusers, Apache-2.0"
version = release = stf_diffusers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_use_ivar = True
# Docstrings write code in double backticks and names in single ones, which are no references.
default_role = "code"

html_theme = "furo"
html_title = f"stf_diffusers {release}"
# Nothing is fetched from elsewhere when a page is opened.
html_show_sphinx = False
