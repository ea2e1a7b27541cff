"""The compilation for real GPUs: what it launches, what it reads off, and that it fails on a kernel that spills."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="runs where Triton is installed: hatch run aot")
ROOT = Path(__file__).resolve().parent.parent
FORWARD = "attention_pool_fwd_kernel"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("kernel_resources")


def compiled(tool: ModuleType, target: str, name: str, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    import torch

    lanes, processors, _ = tool.kernel_tables.TARGETS[target]
    with tool.recording(lanes, processors) as calls:
        tool.run(sizes, torch.bfloat16)
    (arguments,) = (arguments for one, arguments in calls if one == name)
    row: dict[str, Any] = tool.compile_kernel((target, name, *tool.specialise(name, arguments)))
    return row


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_that_spills_is_seen(tool: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's own tile does not spill, one of 32 tokens in so few threads does."""
    sizes = (16, 256, 1152, 4)
    row = compiled(tool, target, FORWARD, sizes)
    assert (row["kernel"], row["target"], row["C"], row["M"], row["spilled_bytes"]) == (FORWARD, target, 1152, 4, 0)
    assert row["registers"] > 32
    assert tool.kernel_tables.failures([{name: str(value) for name, value in row.items()}]) == []

    make_plan = tool.launch.make_plan
    monkeypatch.setattr(
        tool.launch, "make_plan", lambda *a, **k: dataclasses.replace(make_plan(*a, **k), block_n=32, warps=4, stages=1)
    )
    row = compiled(tool, target, FORWARD, sizes)
    assert row["spilled_bytes"] > 0
    problems = tool.kernel_tables.failures([{name: str(value) for name, value in row.items()}])
    assert any(
        line.startswith(f"spills {row['spilled_bytes']} bytes: {FORWARD} {target} bfloat16 1152 4") for line in problems
    )


def test_the_launches_are_those_of_the_package(tool: ModuleType) -> None:
    calls = tool.launches(32, 132)
    assert {name for name, _ in calls} == {
        "attention_pool_fwd_kernel", "attention_pool_merge_kernel", "attention_pool_bwd_kernel",
        "attention_pool_project_kernel", "attention_pool_weighted_sum_kernel", "attention_pool_two_pass_bwd_kernel",
    }  # fmt: skip
    backward = [arguments for name, arguments in calls if name == "attention_pool_bwd_kernel"]
    assert {arguments["grad_tokens"] is None for arguments in backward} == {True, False}
    assert {arguments["mask"] is None for arguments in backward} == {True, False}
    assert {arguments["NUM_QUERIES"] for arguments in backward} >= {1, 2, 3, 4}
    assert {str(arguments["tokens"].dtype) for arguments in backward} == {
        "torch.float32", "torch.bfloat16", "torch.float16"
    }  # fmt: skip


def test_rows_are_shared_by_the_worst(tool: ModuleType) -> None:
    row = dict.fromkeys(tool.COLUMNS, "1")
    other = {**row, "registers": "9", "spilled_bytes": "0"}
    assert tool.worst(row, other) == tool.worst(other, row) == {**row, "registers": "9"}


def test_what_a_loop_moves_between_threads(tool: ModuleType) -> None:
    line = "ttg.convert_layout %1 : tensor<4x8x{}xf32, #a> -> tensor<4x8x{}xf32, #b>".format
    text = "\n".join([line(64, 64), "scf.for %i", line(2, 2), line(16, 16), "scf.yield", line(32, 32)])
    assert tool.exchanged(text) == 4 * 8 * 16


def test_a_partial_table_is_not_written(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernel_resources.py", "--write", "--targets", "sm_90"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "--write is for all targets" in capsys.readouterr().err


@pytest.mark.parametrize("spilled", [0, 8])
def test_the_command_fails_on_a_spill(
    tool: ModuleType, spilled: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the committed table in the compilation's place."""
    table = tool.kernel_tables.read(tool.kernel_tables.RESOURCES)
    table[0]["spilled_bytes"] = str(spilled)
    monkeypatch.setattr(tool, "compile_all", lambda targets, processes: table)
    monkeypatch.setattr(sys, "argv", ["kernel_resources.py"])
    assert tool.main() == (1 if spilled else 0)
    text = capsys.readouterr().out
    assert ("spills 8 bytes" in text) == bool(spilled)
    assert ("not in attention_pool_kernels.csv" in text) == bool(spilled)
