"""The tables of published weights are those of hd_zoo.sources, and a change of either is noticed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_tool() -> Any:
    spec = importlib.util.spec_from_file_location("update_models", ROOT / "tools" / "update_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_data_say() -> None:
    tool = load_tool()
    assert tool.BEGIN in (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert tool.main(["--check"]) == 0, "run python tools/update_models.py"


def test_a_page_that_drifted_is_named_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tool.BEGIN}\n| a table of before |\n{tool.END}\nafter\n")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "PAGES", {page: tool.short_table})
    assert tool.main(["--check"]) == 1
    assert "page.md is not what hd_zoo.sources says" in capsys.readouterr().err
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
    text = page.read_text()
    assert "a table of before" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert 'load_published(path, "dmf_xl_2", image_size=64, qk_norm="rms")' in text
