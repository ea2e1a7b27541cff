"""What pooling tokens by attention costs: folded, or with keys and values of every token; beside a copy of the tokens.

    hatch run bench attention-pool
    hatch run bench attention-pool --dtype bfloat16 --out attention_pool_bfloat16

Every case goes from tokens (B, N, C) to M pooled value vectors per sample, with layer norm and trainable parameters;
before anything is timed, outputs and gradients of all but "mean" and "copy" are shown to agree, in float64 and in the
dtype that is timed. "naive", "mha" and "sdpa" project every token to keys and values of width C; names that end in d64
have the package's default head width. "forward" is without a graph, "forward+backward" has the gradients of tokens and
parameters. "copy" copies the tokens into a buffer that exists already, in both passes; "op" is attention_pool alone,
without projections.

gb_per_s counts what no way can do without: tokens read (forward), read twice and a gradient written (forward+backward),
read and written (copy). peak_mb is what forward+backward allocates beyond its inputs and parameters, gradients_mb of it
are the gradients of tokens and parameters. workspace_mb is measured with frozen parameters, where the gradient of the
tokens is all that comes back: the peak beyond that gradient; memory_ratio compares it.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import runner
from benchmarks.pooling_heads import Way, check, make_ways
from benchmarks.pooling_plot import draw
from hd_awd import attention_pool, why_not_triton

SHAPES = {  # (B, N, C)
    "sit-xl-2-256": (16, 256, 1152),
    "sit-xl-2-512": (4, 1024, 1152),
    "sana-1024": (2, 1024, 2240),
    "small-batch": (1, 256, 1152),
    "sit-b-2": (16, 256, 768),
}
QUICK = {"quick": (2, 64, 72)}
PER_TOKEN = ("naive", "mha", "sdpa")
PASSES = ("forward", "forward+backward")
NEEDED = {"forward": 1, "forward+backward": 3}  # how often the tokens' bytes must move
# What is meant to be reached on a CPU in float32 at the first shape with four queries.
TARGETS = (
    ("forward+backward", "torch", "speedup", ">=", 15.0),
    ("forward+backward", "torch", "memory_ratio", "<=", 0.25),
    ("forward", "op", "ratio_to_copy", "<=", 6.0),
)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention-pool", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--queries", type=int, default=4, help="M (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15, help="counted runs of each case (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="name of the CSV and the plot in results, or a path (default: attention_pool)")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, few rounds; written only with --out")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    runner.keep_freed_memory()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shapes = QUICK if options.quick else {name: SHAPES[name] for name in options.shapes}
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    out = options.out or (None if options.quick else "attention_pool")
    facts: dict[str, object] = {"device": device.type, "dtype": options.dtype, "queries": options.queries}
    if out and (difference := other_run(out, list(shapes), {**facts, **runner.machine()})):
        parser.error(f"{out}.csv is of {difference}; choose another name with --out, or delete it")
    facts |= surroundings(device)
    rows: list[dict[str, object]] = []
    for name, shape in shapes.items():
        ways = verified(name, shape, options.queries, dtype, device)
        tokens = torch.randn(shape, device=device).to(dtype)
        shape_facts = {"shape": name, **dict(zip(("batch", "tokens", "width"), shape, strict=True)), **facts}
        rows += [{**shape_facts, **row} for row in measure(ways, tokens, options.queries, rounds)]
    runner.print_table([{key: row[key] for key in row if key not in facts} for row in rows])
    print("\n" + "\n".join(verdicts(rows)))
    if out:
        path = runner.write_csv(out, rows)
        draw([{**row, **runner.machine()} for row in rows], path.with_suffix(".png"))
        print(f"\nWrote {path} and {path.with_suffix('.png').name}")


def verified(
    name: str, shape: tuple[int, int, int], num_queries: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Way]:
    """The ways to time, after two samples of the shape have gone through all of them; prints the errors."""
    reason = why_not_triton(
        torch.empty(shape, device=device, dtype=dtype), torch.empty(num_queries, shape[2], device=device, dtype=dtype)
    )
    fused = reason is None and device.type == "cuda"
    make = functools.partial(make_ways, shape[2], num_queries, device=device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(min(shape[0], 2), *shape[1:], generator=generator, dtype=torch.float64).to(device)
    exact = make(dtype=torch.float64)
    rows = check(exact, exact, tokens)
    ways = make(dtype=dtype, triton=fused)
    rows += check(ways, make(dtype=torch.float64, rounded=dtype), tokens.to(dtype).double())
    print(f"{name} {shape}, M = {num_queries}: relative errors of output and gradients")
    runner.print_table(rows)
    print("" if fused else f"triton is left out: {reason or 'it would run in the interpreter'}\n")
    return ways


def measure(ways: dict[str, Way], tokens: Tensor, num_queries: int, rounds: int) -> list[dict[str, object]]:
    """Rows of one shape: time of both passes, memory of the second."""
    tokens.requires_grad_()
    buffer, vectors = (
        torch.empty_like(tokens),
        tokens.new_empty(num_queries, tokens.shape[2]).normal_(std=0.03).detach(),
    )
    starts = {way.head_width: tokens.new_zeros(len(tokens), num_queries, way.head_width) for way in ways.values()}
    for start in starts.values():
        start.normal_()
    rows: list[dict[str, object]] = []
    for direction in PASSES:
        cases: dict[str, Callable[[], object]] = {}
        for name, way in ways.items():
            if direction == "forward":
                cases[name] = lambda way=way: way.forward(tokens)
            else:
                cases[name] = lambda way=way: way.step(tokens, starts[way.head_width])
            if name == "sdpa" and direction == "forward":  # after a heavy one, like the copy
                for backend in ("torch", "triton")[: 1 + ("triton" in ways)]:
                    op = "op" if backend == "torch" else "op_triton"
                    cases[op] = functools.partial(attention_pool, tokens.detach(), vectors, backend=backend)
            if name == "naive_d64":  # a heavy one, as make_ways wants it
                cases["copy"] = lambda: buffer.detach().copy_(tokens.detach())
        found = timed(cases, rounds, tokens.device)
        best = min(PER_TOKEN, key=lambda name: statistics.median(found[name]))
        memory = {} if direction == "forward" else allocated(ways, tokens, starts)
        for row in runner.summarise(found, "copy"):
            name = str(row["case"])
            speedups = [one / other for one, other in zip(found[best], found[name], strict=True)]
            row |= {"speedup": round(statistics.median(speedups), 3), "speedup_over": best}
            needed = tokens.nbytes * (2 if name == "copy" else NEEDED[direction])
            row["gb_per_s"] = round(needed / statistics.median(found[name]) / 1e9, 3)
            rows.append(
                {"pass": direction, "head_width": ways[name].head_width if name in ways else ""}
                | row
                | memory.get(name, {})
            )
    return rows


def allocated(ways: dict[str, Way], tokens: Tensor, starts: dict[int, Tensor]) -> dict[str, dict[str, float]]:
    """Per way the columns on memory."""
    columns, workspace = {}, {}
    for name, way in ways.items():
        start = starts[way.head_width]
        gradients = sum(one.nbytes for one in [tokens, *way.parameters.values()])
        peak = peak_bytes(lambda way=way, start=start: way.step(tokens, start), tokens.device)
        frozen = peak_bytes(lambda way=way, start=start: way.frozen_step(tokens, start), tokens.device)
        workspace[name] = frozen - tokens.nbytes
        columns[name] = {"peak_mb": peak, "gradients_mb": gradients, "workspace_mb": workspace[name]}
    least = min(workspace[name] for name in PER_TOKEN)
    return {
        name: {key: round(value / 1e6, 2) for key, value in found.items()}
        | {"memory_ratio": round(workspace[name] / least, 4)}
        for name, found in columns.items()
    }


def timed(cases: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per round: of one run on a CPU, of Triton's median over many runs on a GPU."""
    if device.type != "cuda":
        return runner.interleave(cases, rounds)
    from triton.testing import do_bench

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(1e-3 * do_bench(case, return_mode="median"))
    return seconds


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that ``run`` holds at one time, beyond what was there before it.

    On a CPU from the profiler's record of every allocation of a tensor; what a library takes past PyTorch's
    allocator is not in it.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would tell when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    # By the changes, not by the allocator's totals, which threads may note in another order than the changes'.
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def surroundings(device: torch.device) -> dict[str, object]:
    """Facts that the runner does not add: Triton's version, or how busy the processor was before the run."""
    if device.type == "cuda":
        import triton

        return {"triton": triton.__version__}
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else ""
    if load and load > 0.5:
        print(f"load average {load}: on a busy processor, what makes many small steps looks too slow\n")
    return {"load_before": load}


def verdicts(rows: list[dict[str, object]]) -> list[str]:
    """One line per target, where the run measured it."""
    name, shape = next(iter(SHAPES.items()))
    where = {"shape": name, "device": "cpu", "dtype": "float32", "queries": 4}
    found = {
        (row["pass"], row["case"]): row for row in rows if all(row[column] == value for column, value in where.items())
    }
    if not found:
        return [f"no verdict: the targets are for {name} on a CPU in float32 with 4 queries"]
    lines = []
    for direction, case, column, sign, target in TARGETS:
        value = float(str(found[direction, case][column]))
        met = value >= target if sign == ">=" else value <= target
        verdict = "met" if met else "MISSED"
        lines.append(f"{direction} of {case} at {shape}: {column} {value:.3g}, target {sign} {target:g}: {verdict}")
    return lines


def other_run(out: str, shapes: list[str], facts: dict[str, object]) -> str | None:
    """What an earlier result of that name holds that this run would lose, or None."""
    path = runner.RESULTS / f"{out}.csv"
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for key in ("device", "dtype", "queries", "processor", "accelerator"):
        if any((row.get(key) or "") != str(facts.get(key, "")) for row in rows):
            return f"another {key}"
    return "more shapes" if {row.get("shape") for row in rows} - set(shapes) else None
