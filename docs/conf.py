"""How Sphinx builds this folder into a site: ``hatch run docs:build``. Every warning is an error."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from docstrings import to_restructured_text  # noqa: E402

project = "Hierarchical Distillation"
author = copyright = "The Hierarchical Distillation authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = project
html_copy_source = False

autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

nitpicky = True  # a name that leads nowhere is a warning; these are documented elsewhere
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|contextlib|os|pathlib|typing|numpy|PIL|nn)\b.*"),
    (r"py:.*", r"(optional|Suppress|Any|Protocol)"),
]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

# Pages that live in the root folder, where GitHub looks for them.
FROM_ROOT = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md", "security": "SECURITY.md"}


def read_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Sphinx's hook: replace a docstring's lines in place."""
    lines[:] = to_restructured_text("\n".join(lines)).splitlines()


def read_from_root(app: Sphinx, name: str, source: list[str]) -> None:
    """Sphinx's hook: a page that is a file of the root folder, its links rewritten as seen from here."""
    if name in FROM_ROOT:
        text = (ROOT / FROM_ROOT[name]).read_text(encoding="utf-8")
        source[0] = re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", lambda link: f"]({seen_from_docs(link[1])})", text)


def seen_from_docs(link: str) -> str:
    """A link relative to the root folder, relative to this folder instead."""
    return link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}"


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("source-read", read_from_root)
