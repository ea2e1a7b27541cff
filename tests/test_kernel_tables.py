"""The committed tables of the kernels hold what they must, and the check of them fails where it should."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("kernel_tables")


def test_bytes_are_as_committed(tables: ModuleType) -> None:
    """After a change of a plan: python tools/kernel_tables.py --write."""
    assert tables.drift(tables.BYTES, tables.bytes_table()) == []


def test_bytes_of_one_pass(tables: ModuleType) -> None:
    """Up to 1,152 channels and 4 queries; all of them where the device is full."""
    rows = [row for row in tables.read(tables.BYTES) if int(row["C"]) <= 1152 and int(row["M"]) <= 4]
    assert {row["target"] for row in rows} == set(tables.TARGETS)
    assert {row["passes"] for row in rows} == {"1"}
    assert {float(row["tokens_read"]) for row in rows} == {1}
    full = [row for row in rows if int(row["B"]) > int(row["processors"])]
    assert full
    for row in full:
        assert float(row["read"]) <= (1.05 if row["direction"] == "forward" else 1.1), row
        assert float(row["written"]) <= 1.05, row


def test_bytes_of_two_passes(tables: ModuleType) -> None:
    rows = [row for row in tables.read(tables.BYTES) if row["passes"] == "2"]
    assert rows
    assert all(2 < float(row["tokens_read"]) <= 2.1 for row in rows)


def test_every_shape_of_the_microbenchmark_is_compiled_without_spills(tables: ModuleType) -> None:
    rows = tables.read(tables.RESOURCES)
    assert tables.failures(rows) == []
    found = {(row["target"], row["dtype"], int(row["C"]), int(row["M"])) for row in rows}
    for target in tables.TARGETS:
        for _, _, width in tables.SHAPES:
            for num_queries in (1, 2, 3, 4):
                assert {(target, dtype, width, num_queries) for dtype in ("float32", "bfloat16")} <= found
            assert (target, "float16", width, 4) in found


def test_a_spill_and_too_much_shared_memory_are_failures(tables: ModuleType) -> None:
    row = next(row for row in tables.read(tables.RESOURCES) if row["target"] == "sm_120")
    limit = 99 * 1024
    assert tables.failures([{**row, "shared_bytes": str(limit)}]) == []
    (spill,) = tables.failures([{**row, "spilled_bytes": "8"}])
    assert spill.startswith("spills 8 bytes: ")
    (large,) = tables.failures([{**row, "shared_bytes": str(limit + 1)}])
    assert large.startswith(f"shared memory {limit + 1} of {limit} bytes: ")
    assert len(tables.failures([{**row, "spilled_bytes": "4", "shared_bytes": str(2 * limit)}, row])) == 2


def test_a_table_that_drifts_is_told(tables: ModuleType, tmp_path: Path) -> None:
    committed = [row for row in tables.read(tables.RESOURCES) if row["target"] in ("sm_80", "sm_90")][:400:20]
    path = tmp_path / "table.csv"
    tables.write(path, committed)
    assert list(tmp_path.iterdir()) == [path]
    assert tables.drift(path, committed) == []
    changed = {**committed[0], "registers": "256"}
    assert sorted(line.split()[0] for line in tables.drift(path, [changed, *committed[1:]])) == ["not", "only"]
    assert [line.split()[0] for line in tables.drift(path, committed[1:])] == ["only"]
    assert tables.drift(path, committed[1:], complete=False) == []
    assert [line.split()[0] for line in tables.drift(path, [changed], complete=False)] == ["not"]
    assert [line.split()[0] for line in tables.drift(path, [changed, *committed])] == ["not"]
    other_version = [{**row, "triton": "0.0"} for row in committed]
    assert len(tables.drift(path, other_version)) == 1
    assert "this is 0.0" in tables.drift(path, other_version)[0]
    # One target alone is held against its own rows.
    one = [row for row in committed if row["target"] == committed[0]["target"]]
    assert tables.drift(path, one) == []
