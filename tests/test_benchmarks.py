"""The benchmarks run: their small forms, in an interpreter of their own, and the checks that come before a time."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CASES = {"naive", "mha", "sdpa", "naive_d64", "sdpa_d64", "mean", "autograd", "torch", "torch_d64", "copy"}


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks ARGUMENTS` on one thread and without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.pooling_heads")


def test_attention_pool_writes_what_it_measured(tmp_path: Path) -> None:
    out = str(tmp_path / "quick")
    done = run_benchmark("attention-pool", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    with open(f"{out}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(row["pass"], row["case"]): row for row in rows}
    assert len(found) == len(rows)
    passes = {(direction, case) for direction in ("forward", "forward+backward") for case in CASES}
    assert set(found) == passes | {("forward", "op")}
    for (direction, case), row in found.items():
        assert (row["dtype"], row["device"], row["queries"], row["threads"]) == ("float32", "cpu", "4", "1")
        assert 0 < float(row["lower_quartile_ms"]) <= float(row["median_ms"]) <= float(row["upper_quartile_ms"])
        assert float(row["ratio_to_copy"]) > 0
        assert float(row["speedup"]) > 0
        assert float(row["gb_per_s"]) > 0
        measured = direction == "forward+backward" and case != "copy"
        assert bool(row["peak_mb"]) == bool(row["memory_ratio"]) == measured
        if measured:
            # The gradients are handed back, so they are there at the end.
            assert float(row["peak_mb"]) >= float(row["gradients_mb"]) > 0
            assert float(row["workspace_mb"]) > 0
    assert float(found["forward", "copy"]["ratio_to_copy"]) == 1
    least = min(float(found["forward+backward", case]["memory_ratio"]) for case in ("naive", "mha", "sdpa"))
    assert least == 1
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")

    again = run_benchmark("attention-pool", "--quick", "--dtype", "bfloat16", "--out", out)
    assert again.returncode == 2
    assert "another dtype" in again.stderr


def test_attention_pool_times_nothing_that_is_wrong(heads: ModuleType) -> None:
    ways = heads.make_ways(24, 3, dtype=torch.float64, device=torch.device("cpu"))
    tokens = torch.randn(2, 10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert {row["case"] for row in heads.check(ways, ways, tokens)} == CASES - {"naive", "naive_d64", "mean", "copy"}

    run = ways["torch"].run
    wrong_output = dataclasses.replace(ways["torch"], run=lambda tokens: run(tokens) * (1 + 1e-8))
    with pytest.raises(SystemExit, match=r"torch is not naive: .* in the output"):
        heads.check({**ways, "torch": wrong_output}, ways, tokens)
    wrong_gradient = dataclasses.replace(
        ways["torch"], run=lambda tokens: run(tokens) + 0.01 * (tokens - tokens.detach()).mean()
    )
    with pytest.raises(SystemExit, match=r"torch is not naive: .* in the gradient of tokens"):
        heads.check({**ways, "torch": wrong_gradient}, ways, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_pool_checks_the_dtype_that_it_times(heads: ModuleType, dtype: torch.dtype) -> None:
    """Against float64 with the same rounded weights and tokens; every way, the plain one too."""
    device = torch.device("cpu")
    ways = heads.make_ways(24, 3, dtype=dtype, device=device)
    exact = heads.make_ways(24, 3, dtype=torch.float64, rounded=dtype, device=device)
    tokens = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(0)).to(dtype).double()
    assert {row["case"] for row in heads.check(ways, exact, tokens)} == CASES - {"mean", "copy"}
    run, error = ways["torch"].run, 2 * heads.TOLERANCES[dtype]
    wrong = dataclasses.replace(ways["torch"], run=lambda tokens: run(tokens) * (1 + error))
    with pytest.raises(SystemExit, match=r"torch is not naive: .* in the output"):
        heads.check({"torch": wrong}, exact, tokens)


def test_a_frozen_step_gives_the_tokens_gradient_and_leaves_parameters_trainable(heads: ModuleType) -> None:
    ways = heads.make_ways(24, 3, dtype=torch.float64, device=torch.device("cpu"))
    tokens = torch.randn(2, 10, 24, dtype=torch.float64, requires_grad=True)
    for way in ways.values():
        start = torch.randn(2, 3, way.head_width, dtype=torch.float64)
        output, gradient = way.frozen_step(tokens, start)
        trained = way.step(tokens, start)
        torch.testing.assert_close(output, trained[0])
        torch.testing.assert_close(gradient, trained[1])
