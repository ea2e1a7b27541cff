"""How Sphinx builds this folder into a site: ``hatch run docs:build``. Every warning is an error."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from docutils.nodes import Element
from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from docstrings import to_restructured_text  # noqa: E402

PACKAGES = ("hd_meanflow", "hd_dmd", "hd_awd", "hd_zoo", "hd_trainer")

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

# Pages of the site whose text is another file of the repository, where GitHub looks for it.
ELSEWHERE = {
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "security": "SECURITY.md",
    "examples": "examples/README.md",
}
# Where links to files that are no pages of the site lead instead.
PAGE_OF = {file: f"{page}.md" for page, file in ELSEWHERE.items()}
PAGE_OF |= {
    f"packages/hd-{name}/README.md": f"api/hd_{name}.md" for name in ("meanflow", "dmd", "awd", "zoo", "trainer")
}
PAGE_OF |= {"README.md": "index.md", "LICENSE": "../LICENSE"}

LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)\s]+)\)")


def read_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Sphinx's hook: replace a docstring's lines in place."""
    lines[:] = to_restructured_text("\n".join(lines)).splitlines()


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Sphinx's hook: replace a page's text in place; its links, right on GitHub, become right on the site."""
    path = ROOT / ELSEWHERE[name] if name in ELSEWHERE else HERE / f"{name}.md"
    text = path.read_text(encoding="utf-8")
    folder = (HERE / f"{name}.md").parent
    source[0] = LINK.sub(lambda link: f"]({on_the_site(link[1], path.parent, folder)})", text)


def on_the_site(link: str, source: Path, folder: Path) -> str:
    """A link from a file in folder ``source``, as a page in folder ``folder`` of docs/ needs it.

    Sphinx offers a file that is no page as a download.
    """
    target, hash_sign, anchor = link.partition("#")
    found = Path(os.path.normpath(source / target))
    if not found.is_relative_to(ROOT):
        return link
    inside = found.relative_to(ROOT).as_posix()
    found = HERE / PAGE_OF[inside] if inside in PAGE_OF else found
    return Path(os.path.relpath(found, folder)).as_posix() + hash_sign + anchor


def show_as_text(app: Sphinx, environment: object, node: Element, shown: Element) -> Element | None:
    """Sphinx's hook: a name in a docstring that is not public is shown as text; None, a warning, if there is none."""
    name = str(node.get("reftarget", "")).rpartition(".")[2]
    modules = [module for key, module in sys.modules.items() if key.partition(".")[0] in PACKAGES]
    return shown if any(hasattr(module, name) for module in modules) else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("source-read", read_page)
    app.connect("missing-reference", show_as_text)
