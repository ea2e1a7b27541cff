"""The compilation for real GPUs: what it launches, what it reads off, what it keeps, and that it fails on a spill."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Looked for and not imported: whoever imports Triton first decides whether its interpreter is on.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="runs where Triton is installed: hatch run aot"
)
ROOT = Path(__file__).resolve().parent.parent
FORWARD, MERGE = "attention_pool_fwd_kernel", "attention_pool_merge_kernel"
TARGETS = ("sm_90", "gfx942")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/kernel_launches.py"""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("kernel_launches")


@pytest.fixture
def tool(launches: ModuleType) -> ModuleType:
    """tools/kernel_resources.py"""
    return importlib.import_module("kernel_resources")


def jobs_of(launches: ModuleType, kernel: str, target: str, sizes: tuple[int, int, int, int]) -> list:
    """The compilations of one kernel for bfloat16 tokens of sizes B, N, C, M."""
    import torch

    with launches.recording(target) as calls:
        launches.run(sizes, torch.bfloat16)
    return launches.jobs(target, [call for call in calls if call[0] == kernel])


def test_a_kernel_that_spills_is_seen(
    tool: ModuleType, launches: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's own tile does not spill, one of 32 tokens in so few threads does."""

    def compiled() -> list[dict[str, str]]:
        wanted = [job for target in TARGETS for job in jobs_of(launches, FORWARD, target, (16, 256, 1152, 4))]
        return tool.compile_all(wanted, 2, tmp_path)

    rows = compiled()
    assert [(row["kernel"], row["target"], row["C"], row["M"]) for row in rows] == [
        (FORWARD, target, "1152", "4") for target in sorted(TARGETS)
    ]
    assert all(int(row["registers"]) > 32 for row in rows)
    assert tool.kernel_tables.failures(rows) == []

    make_plan = launches.launch.make_plan
    monkeypatch.setattr(
        launches.launch,
        "make_plan",
        lambda *a, **k: dataclasses.replace(make_plan(*a, **k), block_n=32, warps=4, stages=1),
    )
    rows = compiled()
    assert all(int(row["spilled_bytes"]) > 0 for row in rows)
    for row in rows:
        spill = f"spills {row['spilled_bytes']} bytes: {FORWARD} {row['target']} bfloat16 1152 4"
        assert any(line.startswith(spill) for line in tool.kernel_tables.failures(rows))


def test_what_has_not_changed_is_not_compiled_again(
    tool: ModuleType,
    launches: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    jobs = jobs_of(launches, MERGE, "sm_90", (1, 256, 1152, 4))
    assert len(jobs) == 1
    first = tool.compile_all(jobs, 1, tmp_path)
    assert "0 from" in capsys.readouterr().out

    assert tool.compile_all(jobs, 1, tmp_path) == first
    assert "0 to compile" in capsys.readouterr().out

    # An interrupted run leaves a partial file, which is none of the results.
    (tmp_path / "interrupted.partial").write_text("{")
    sources = {name: tool.source_of(name) for name in (MERGE, FORWARD)}
    changed = sources | {MERGE: sources[MERGE].replace("top = float", "top =  float")}
    assert changed != sources
    monkeypatch.setattr(tool, "source_of", changed.__getitem__)
    assert tool.compile_all(jobs, 1, tmp_path) == first
    assert "1 to compile" in capsys.readouterr().out


def test_a_key_follows_from_all_that_a_result_depends_on(
    tool: ModuleType, launches: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = jobs_of(launches, FORWARD, "sm_90", (16, 256, 1152, 4))
    keys = {tool.cache_key(job)}
    assert tool.cache_key(dataclasses.replace(job)) in keys
    for change in (
        {"target": "sm_80"},
        {"warps": 2 * job.warps},
        {"divisible": job.divisible[1:]},
        {"constants": job.constants | {"BLOCK_N": 1}},
        {"signature": job.signature | {"tokens": "*fp16"}},
    ):
        keys.add(tool.cache_key(dataclasses.replace(job, **change)))
    monkeypatch.setattr(tool.triton, "__version__", "0.0")
    keys.add(tool.cache_key(job))
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/elsewhere")
    keys.add(tool.cache_key(job))
    monkeypatch.setattr(tool, "source_of", lambda kernel: "another kernel")
    keys.add(tool.cache_key(job))
    assert len(keys) == 9


def test_the_source_of_a_kernel_holds_all_that_it_calls(tool: ModuleType) -> None:
    """Its own text and that of the parts, but not of other kernels: those are compiled anew by themselves."""
    source = tool.source_of(FORWARD)
    for name in (FORWARD, "load_rows", "store_rows", "load_scores", "store_scores", "allowed", "subtract", "channels"):
        assert f"def {name}(" in source
    assert MERGE not in source


def test_the_launches_are_those_of_the_package(launches: ModuleType) -> None:
    calls = launches.launches("sm_90")
    assert {name for name, _ in calls} == set(launches.KERNELS) == {
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


def test_the_default_has_every_kernel_and_number_of_queries_at_its_tightest(
    tool: ModuleType, launches: ModuleType
) -> None:
    committed = tool.kernel_tables.read(tool.kernel_tables.RESOURCES)
    every = launches.jobs("sm_90", launches.launches("sm_90"))
    chosen = tool.tightest(every, committed)
    assert len(chosen) < len(every) / 4

    def kernels(jobs: list) -> set[tuple[str, str]]:
        return {(job.row["kernel"], job.row["M"]) for job in jobs}

    assert kernels(chosen) == kernels(every)
    registers = {tuple(row[name] for name in tool.kernel_tables.KEY): int(row["registers"]) for row in committed}
    for kernel, number in kernels(every):
        of_both = [
            {
                registers[tuple(job.row.values())]
                for job in jobs
                if (job.row["kernel"], job.row["M"]) == (kernel, number)
            }
            for jobs in (chosen, every)
        ]
        assert of_both[0] == {max(of_both[1])}
    # A row that the table does not have yet is compiled.
    new = dataclasses.replace(every[0], warps=64)
    assert new in tool.tightest([*every, new], committed)


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


@pytest.mark.parametrize("arguments", [[], ["--all"]])
@pytest.mark.parametrize("spilled", [0, 8])
def test_the_command_fails_on_a_spill(
    tool: ModuleType,
    arguments: list[str],
    spilled: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the committed rows in the compilation's place."""
    table = {tuple(row[name] for name in tool.kernel_tables.KEY): row for row in
             tool.kernel_tables.read(tool.kernel_tables.RESOURCES)}  # fmt: skip

    def compile_all(jobs: list, processes: int, cache: Path) -> list[dict[str, str]]:
        rows = [table[key] for key in sorted({tuple(job.row.values()) for job in jobs})]
        return [{**rows[0], "spilled_bytes": str(spilled)}, *rows[1:]]

    monkeypatch.setattr(tool, "compile_all", compile_all)
    monkeypatch.setattr(sys, "argv", ["kernel_resources.py", *arguments])
    assert tool.main() == (1 if spilled else 0)
    text = capsys.readouterr().out
    assert ("spills 8 bytes" in text) == bool(spilled)
    assert ("not in attention_pool_kernels.csv" in text) == bool(spilled)
