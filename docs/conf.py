"""The settings of the documentation site; `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from hopdeq_lwpf import __version__  # noqa: E402

project = "hopdeq_lwpf"
author = "the hopdeq_lwpf developers"
copyright = f"2026, {author}"
release = version = __version__
language = "en"
smartquotes = False  # "auto" is what one types

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # the package has hyphens in its name
    "myst_nb",
    "plain_docstrings",
    "public_names",
]
exclude_patterns = ["_build", "_ext"]
suppress_warnings: list[str] = []  # none: the build runs with -W

# Pages: Markdown, with headings as targets of links, $...$ and labelled equations.
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "attrs_block"]
myst_heading_anchors = 4
math_number_all = False
math_eqref_format = "({number})"
numfig = False

# Tutorials are executed; a cell that raises stops the build. What has not changed comes from the cache.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True  # one box for what a cell prints
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # would be loaded from the network, and nothing needs it

# Docstrings: plain prose, made readable by _ext/plain_docstrings.py.
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch's own docstrings are not part of this site
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autosummary_generate = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"hopdeq_lwpf {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
