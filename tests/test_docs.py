"""The documentation's links lead somewhere, and docstrings reach the site as they were meant."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Links in running text and tables, not in code.
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Every Markdown page that a reader may open."""
    found = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("packages/*/README.md"),
        *ROOT.glob("examples/*.md"),
    ]
    assert len(found) > 10
    return sorted(found)


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to files or folders that do not exist."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [link for link in LINK.findall(text) if not link.startswith(("http://", "https://", "mailto:", "#"))]
    return [link for link in links if not (page.parent / link.partition("#")[0]).exists()]


def docstrings_module() -> ModuleType:
    """`docs/docstrings.py`, imported from its file."""
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[here](page.md#top), [not](missing.md), [away](https://example.org)\n```\n[code](no.md)\n```\n")
    assert broken_links(page) == ["missing.md"]


def test_mathematical_signs_of_a_docstring_are_not_markup() -> None:
    text = docstrings_module().to_restructured_text("w * |x|^2 of u_{k+1} and ``a_`` * :func:`jump`.")
    assert text == "w \\* \\|x\\|^2 of u\\_{k+1} and ``a_`` \\* :func:`jump`.\n"


def test_sections_become_fields_and_equations_stay_as_they_are() -> None:
    docstring = """First line.

    x = a * b

Args:
    t, r: (B,) in
        [0, 1].

Returns:
    Of x's shape: always.

Raises:
    ValueError: if not.
"""
    expected = """First line.

::

    x = a * b

:Parameters:
    * ``t, r``: (B,) in [0, 1].

:Returns: Of x's shape: always.

:Raises:
    * ``ValueError``: if not.
"""
    assert docstrings_module().to_restructured_text(docstring) == expected
