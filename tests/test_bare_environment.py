"""The environments in which packages are tried alone: torch is there, nothing undeclared is, and a leak is seen."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bare_environment")


def add_distribution(site: Path, name: str, *requires: str) -> None:
    """What pip leaves of an installed distribution, without the files of the distribution."""
    folder = site / f"{name}-1.0.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {one}" for one in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def can_import(python: str, module: str) -> bool:
    """Whether the environment's Python finds a module."""
    script = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
    return subprocess.run([python, "-I", "-c", script], check=False).returncode == 0


def test_the_closure_follows_extras_and_markers(tool: ModuleType) -> None:
    requires = {
        "demo": ["Torch>=2", "scipy; extra == 'test'", "tomli; python_version < '3'", "weights[torch]"],
        "weights": ["numpy; extra == 'torch'", "flax; extra == 'jax'"],
        "torch": ["sympy"],
    }
    assert tool.closure(["demo"], requires) == {"demo", "torch", "sympy", "weights", "numpy"}
    assert tool.closure(["demo[test]"], requires) - tool.closure(["demo"], requires) == {"scipy"}


def test_torch_is_there_and_what_is_undeclared_is_not(tool: ModuleType, tmp_path: Path) -> None:
    tool.link_torch(tmp_path / "torch")
    bare = tool.BareEnvironment(tmp_path / "venv", tmp_path / "torch", tmp_path / "none.txt")
    add_distribution(bare.site, "demo", "torch>=2")
    bare.check_isolation("demo")
    assert can_import(bare.python, "torch")
    for module in ("numpy", "pytest", "einops", "hd_zoo"):
        assert can_import(sys.executable, module), "or the next line would say nothing"
        assert not can_import(bare.python, module)


def test_a_leak_is_seen(tool: ModuleType, tmp_path: Path) -> None:
    tool.link_torch(tmp_path / "torch")
    bare = tool.BareEnvironment(tmp_path / "venv", tmp_path / "torch", tmp_path / "none.txt")
    add_distribution(bare.site, "demo", "torch")
    (tmp_path / "elsewhere").mkdir()
    (bare.site / "leak.pth").write_text(f"{tmp_path / 'elsewhere'}\n")
    with pytest.raises(tool.CheckFailed, match=r"modules also come from .*elsewhere"):
        bare.check_isolation("demo")
    (bare.site / "leak.pth").unlink()
    add_distribution(bare.site, "numpy")
    with pytest.raises(tool.CheckFailed, match="not declared: numpy"):
        bare.check_isolation("demo")
