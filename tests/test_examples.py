"""The examples run, and what they print is what they promise."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOK = EXAMPLES / "one_step_in_two_dimensions.ipynb"


def load_example(name: str) -> ModuleType:
    """The module of `examples/NAME.py`, imported from its file."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    """A notebook's code cells in their order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_meanflow_alone_reaches_the_teacher_in_one_step() -> None:
    distances = load_example("meanflow_alone").main()
    assert distances["student, 1 step"] < 0.2 * distances["teacher, 1 step"]
    assert distances["teacher, 100 steps"] < 0.1


def test_dmd_alone_reaches_every_mode_without_data() -> None:
    close, shares = load_example("dmd_alone").main()
    assert close > 0.75
    assert min(shares) > 0.2


def test_awd_alone_finds_what_the_mean_does_not() -> None:
    found = load_example("awd_alone").main()
    assert found["attention"] > found["mean"] + 0.1
    assert found["gradient"] > 0.1  # chance: 0.016


def test_zoo_alone_samples_guides_and_converts() -> None:
    found = load_example("zoo_alone").main()
    assert found["heun"] < 0.2 * found["euler"]
    assert found["spread 3"] < found["spread 1"]
    assert found["student"] == 0
    assert found["foreign"] < 1e-4


def test_the_notebook_runs_and_ends_with_its_picture() -> None:
    names: dict[str, Any] = {}
    for cell in code_cells(NOTEBOOK):
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    distances = names["distances"]
    assert distances["stage 1, 1 step"] < 0.2 * distances["teacher, 1 step"]
    assert distances["stage 2, 1 step"] < distances["stage 1, 1 step"]


def test_the_notebook_is_committed_with_its_outputs() -> None:
    cells = code_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    picture = base64.b64decode(cells[-1]["outputs"][-1]["data"]["image/png"])
    assert picture.startswith(b"\x89PNG")
    assert NOTEBOOK.stat().st_size < 200_000


def test_own_data_trains_a_teacher() -> None:
    load_example("own_data").main()


def test_own_recipe_goes_the_whole_way_on_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDISTILL_CACHE", str(tmp_path))
    rows = load_example("own_recipe").main()
    assert [row["name"] for row in rows] == ["held-out data", "teacher", "teacher", "trajectory", "distribution"]
    assert all(row["fd"] > 0 for row in rows)  # in the features of a classifier of bars, trained on the way
    assert rows[0]["accuracy"] > 0.9


def test_own_teacher_is_a_network_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # it writes into ./runs
    rows = load_example("own_teacher").main()
    assert rows[-1]["name"] == "distribution"
