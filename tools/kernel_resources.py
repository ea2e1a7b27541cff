"""Compile hd-awd's kernels for real GPUs, without one, and hold what they use against the committed table.

    hatch run aot               # check: fails on a spill, on too much shared memory, or on a drifted table
    hatch run aot --write       # write the tables anew (benchmarks/results/attention_pool_kernels.csv, _bytes.csv)

Shapes and kernels are not listed twice: the package's own launch code runs on the CPU with recorders in the kernels'
places, and what it would have launched is compiled for each target.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import kernel_tables
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hd_awd.pooling.kernels import launch, one_pass, two_pass

KERNELS = {
    name: getattr(module, name)
    for module in (one_pass, two_pass)
    for name in vars(module)
    if name.startswith("attention_pool_") and name.endswith("_kernel")
}
# (N, C) of the microbenchmark: SiT-B/2, SiT-XL/2 at 256 and 512 pixels, SANA; beside them a short and the longest row.
USED = [(256, 768), (256, 1152), (1024, 1152), (1024, 2240)]
SHAPES = [(256, 72), *USED, (1024, 4096)]
BATCHES = (1, 16)
COLUMNS = [*kernel_tables.KEY, "registers", "spilled_bytes", "shared_bytes", "exchanged", "triton"]


class Recorder:
    """Stands in a kernel's place and notes its arguments."""

    def __init__(self, name: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch_kernel(*arguments: Any, **keywords: Any) -> None:
            self.calls.append((self.name, dict(zip(KERNELS[self.name].arg_names, arguments, strict=False)) | keywords))

        return launch_kernel


@contextlib.contextmanager
def recording(lanes: int, processors: int) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What the launch code would launch on a device with so many threads in a warp and so many processors."""
    calls: list[tuple[str, dict[str, Any]]] = []
    with contextlib.ExitStack() as stack:
        for name, kernel in KERNELS.items():
            module = one_pass if getattr(one_pass, name, None) is kernel else two_pass
            stack.enter_context(mock.patch.object(module, name, Recorder(name, calls)))
        stack.enter_context(mock.patch.object(launch, "_device_facts", return_value=(lanes, processors)))
        yield calls


def launches(lanes: int, processors: int) -> list[tuple[str, dict[str, Any]]]:
    """Every launch over the grid of shapes, forward and backward; every option at two shapes."""
    with recording(lanes, processors) as calls:
        for dtype in (torch.bfloat16, torch.float32):
            for (num_tokens, width), batch in itertools.product(SHAPES, BATCHES):
                for num_queries in (1, 4, 16):
                    run((batch, num_tokens, width, num_queries), dtype)
        for (num_tokens, width), batch in itertools.product(USED, BATCHES):
            for num_queries in (2, 3):
                run((batch, num_tokens, width, num_queries), torch.bfloat16)
                run((batch, num_tokens, width, num_queries), torch.float32)
            run((batch, num_tokens, width, 4), torch.float16)
        for num_tokens, width in ((256, 1152), (1024, 2240)):
            for num_queries, dtype in itertools.product((1, 4), (torch.bfloat16, torch.float32)):
                run((16, num_tokens, width, num_queries), dtype, extras=True)
                run((16, num_tokens, width, num_queries), dtype, want_tokens=False)
    return calls


def run(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, *, extras: bool = False, want_tokens: bool = True
) -> None:
    """Forward and backward for B, N, C, M, with a bias, a mask and the weights or without; nothing is computed."""
    batch, num_tokens, width, num_queries = sizes
    tokens, queries = torch.zeros(batch, num_tokens, width, dtype=dtype), torch.zeros(num_queries, width)
    bias = grad_weights = torch.zeros(batch, num_queries, num_tokens) if extras else None
    mask = torch.ones(batch, num_tokens, dtype=torch.bool) if extras else None
    lse, dz = torch.zeros(batch, num_queries), torch.zeros(batch, num_queries, width)
    launch.pool_forward(tokens, queries, bias, mask, 1e-6, extras)
    launch.pool_backward(dz, grad_weights, tokens, queries, bias, mask, lse, lse, 1e-6, want_tokens, extras)


def compile_kernel(job: tuple[str, str, dict[str, Any], dict[str, str], dict[str, Any]]) -> dict[str, object]:
    """One row of the table."""
    target, name, constants, signature, facts = job
    kernel = KERNELS[name]
    names = kernel.arg_names
    divisible = {(names.index(one),): [["tt.divisibility", 16]] for one in facts["divisible"]}
    source = ASTSource(
        fn=kernel,
        signature={one: signature.get(one, "constexpr") for one in names},
        constexprs={(names.index(one),): value for one, value in constants.items()},
        attrs=divisible,
    )
    compiled = triton.compile(
        source, target=gpu_target(target), options={"num_warps": facts["warps"], **launch.OPTIONS}
    )
    row = {
        "kernel": name + facts["suffix"],
        "target": target,
        "dtype": facts["dtype"],
        "C": constants["WIDTH"],
        "M": constants["NUM_QUERIES"],
        "block_n": constants.get("BLOCK_N", ""),
        "row_head": constants.get("ROW_HEAD", constants.get("BLOCK_C")),
        "row_tail": constants.get("ROW_TAIL", 0),
        "warps": facts["warps"],
    }
    found = {**resources(compiled), "exchanged": exchanged(compiled.asm["ttgir"]), "triton": triton.__version__}
    return row | found


def gpu_target(name: str) -> GPUTarget:
    """sm_90 -> GPUTarget("cuda", 90, 32); gfx942 -> GPUTarget("hip", "gfx942", 64)."""
    lanes = kernel_tables.TARGETS[name][0]
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), lanes)
    return GPUTarget("hip", name, lanes)


def specialise(name: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """(constants, types, facts) as Triton's just-in-time compiler would take them from a call."""
    constants, signature, divisible = {}, {}, []
    for one in KERNELS[name].arg_names:
        value = arguments.get(one)
        if isinstance(value, Tensor):
            kinds = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1"}
            signature[one] = "*" + kinds[value.dtype]
            divisible.append(one)
        elif value is None or one.isupper() or value == 1:
            constants[one] = value
        elif isinstance(value, float):
            signature[one] = "fp32"
        else:
            signature[one] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(one)
    tokens = arguments.get("tokens")
    suffix = " + bias, mask, weights" if arguments.get("mask") is not None else ""
    if "grad_tokens" in arguments and arguments["grad_tokens"] is None:
        suffix += " - tokens' gradient"
    facts = {
        "divisible": divisible,
        "warps": arguments.get("num_warps", 4),
        "dtype": "float32" if tokens is None else str(tokens.dtype).removeprefix("torch."),
        "suffix": suffix,
    }
    return constants, signature, facts


def resources(compiled: Any) -> dict[str, object]:
    """Registers and spilled bytes of a thread, shared memory of a program, as the assembler reports them."""
    if "amdgcn" in compiled.asm:
        found = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", compiled.asm["amdgcn"]).group(1))
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        }
        # Scalar registers spill into lanes of vector registers, which are counted, and not into memory.
        spilled = max(4 * found["vgpr_spill_count"], found["private_segment_fixed_size"])
        return {"registers": found["vgpr_count"], "spilled_bytes": spilled, "shared_bytes": compiled.metadata.shared}
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spilled = found["STACK"] + found["LOCAL"]
    return {"registers": found["REG"], "spilled_bytes": spilled, "shared_bytes": compiled.metadata.shared}


def exchanged(ttgir: str) -> int:
    """The largest tensor, in elements, that the kernel's loop moves between threads by a change of layout."""
    largest, depth = 0, 0
    for line in ttgir.splitlines():
        if "scf.for" in line:
            depth += 1
        elif "scf.yield" in line and depth:
            depth -= 1
        elif depth and (match := re.search(r"convert_layout .* : tensor<((?:\d+x)+)", line)):
            elements = 1
            for size in match.group(1).split("x")[:-1]:
                elements *= int(size)
            largest = max(largest, elements)
    return largest


def compile_all(targets: list[str], processes: int) -> list[kernel_tables.Row]:
    """The table of what every launch's kernel uses, sorted."""
    jobs: dict[str, Any] = {}
    for target in targets:
        lanes, processors, _ = kernel_tables.TARGETS[target]
        for name, arguments in launches(lanes, processors):
            job = (target, name, *specialise(name, arguments))
            jobs.setdefault(repr(job), job)
    print(f"{len(jobs)} kernels for {', '.join(targets)}", flush=True)
    rows: dict[tuple[str, ...], kernel_tables.Row] = {}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, found in enumerate(pool.imap(compile_kernel, jobs.values()), 1):
            row = {name: str(found[name]) for name in COLUMNS}
            key = tuple(row[name] for name in kernel_tables.KEY)
            rows[key] = worst(row, rows.get(key, row))
            if done % 50 == 0:
                print(f"  {done} of {len(jobs)}", flush=True)
    return [rows[key] for key in sorted(rows)]


def worst(one: kernel_tables.Row, other: kernel_tables.Row) -> kernel_tables.Row:
    """The larger figures of two variants that share a row: they differ in the divisibility of a stride alone."""
    figures = COLUMNS[len(kernel_tables.KEY) : -1]
    return one | {name: str(max(int(one[name]), int(other[name]))) for name in figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables anew instead of checking them")
    parser.add_argument("--targets", nargs="+", choices=list(kernel_tables.TARGETS), help="for a check (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    options = parser.parse_args()
    if options.write and options.targets:
        parser.error("--write is for all targets: the table would lose the others")
    table = compile_all(options.targets or list(kernel_tables.TARGETS), options.jobs)
    tables = [(kernel_tables.RESOURCES, table), (kernel_tables.BYTES, kernel_tables.bytes_table())]
    problems = kernel_tables.failures(table)
    for path, rows in tables:
        if options.write:
            kernel_tables.write(path, rows)
        else:
            problems += kernel_tables.drift(path, rows)
    drifted = "" if options.write else "; both tables are as committed"
    print("\n".join(problems) or f"no spills, shared memory within limits, {len(table)} rows{drifted}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
