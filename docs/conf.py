"""The documentation's site: `make docs`. Pages are the Markdown files that GitHub shows, under the same names.

The source folder is the repository itself, so that a link between README, docs/ and cluster/ means the same here and there.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO), str(REPO / "docs")]  # the docstrings of this checkout

import brainsynth  # noqa: E402  (the path comes first)

project = "brainsynth"
author = "the brainsynth authors"
copyright = "2026, the brainsynth authors; Apache-2.0"
version = release = brainsynth.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**.md", "cluster/README.md", "recipes/README.md", "brainsynth/bundled/*/README.md",
    "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md",
]  # fmt: skip
exclude_patterns = [".*", "**/.*", "**/__pycache__", "docs/_build", "runs", "demo-output", "demo-train-output"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated_reference"]

myst_heading_anchors = 3
myst_links_external_new_tab = False
default_role = "code"  # docstrings write `code` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"brainsynth {release}"
templates_path = ["_templates"]
html_additional_pages = {"index": "first_page.html"}
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5a7a", "color-brand-content": "#0b5a7a"},
    "dark_css_variables": {"color-brand-primary": "#6cc3e6", "color-brand-content": "#6cc3e6"},
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
