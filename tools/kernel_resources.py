"""Compile hd-awd's kernels for real GPUs, without one, and hold what they use against the committed table.

    hatch run aot               # check: fails on a spill, on too much shared memory, or on a drifted table
    hatch run aot --write       # write the table anew (benchmarks/results/attention_pool_kernels.csv)

Shapes and kernels are not listed twice: the package's own launch code runs on the CPU with recorders in the kernels'
places, and what it would have launched is compiled for each target.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
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

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hd_awd.pooling.kernels import launch, one_pass, two_pass

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "attention_pool_kernels.csv"
KERNELS = {
    name: kernel
    for module, names in ((one_pass, ("forward", "merge", "backward")), (two_pass, ("project", "combine", "spread")))
    for name in names
    for kernel in [getattr(module, name)]
}
# Name: Triton's target, processors, shared memory of one program in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108, 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 132, 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 148, 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 170, 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304, 64 * 1024),
}
# (N, C) of the microbenchmark: SiT-B/2, SiT-XL/2 at 256 and 512 pixels, SANA; and the smallest and the largest rows.
SHAPES = [(256, 72), (256, 768), (256, 1152), (1024, 1152), (1024, 2240), (1024, 4096)]
QUERIES = (1, 4, 16)
BATCHES = (1, 16)
DTYPES = (torch.bfloat16, torch.float32)
COLUMNS = ["kernel", "target", "dtype", "C", "M", "block_n", "head", "tail", "warps", "registers", "spilled_bytes",
           "shared_bytes", "exchanged"]  # fmt: skip
KEY = COLUMNS[:9]


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
    """Every launch over the grid of shapes, forward and backward, with a mask and a bias at one shape."""
    with recording(lanes, processors) as calls:
        for dtype in DTYPES:
            for count, width in SHAPES:
                for amount in QUERIES:
                    for batch in BATCHES:
                        run(torch.zeros(batch, count, width, dtype=dtype), torch.zeros(amount, width))
        extras = torch.zeros(16, 4, 256), torch.ones(16, 256, dtype=torch.bool), torch.zeros(16, 4, 256)
        run(torch.zeros(16, 256, 1152, dtype=torch.bfloat16), torch.zeros(4, 1152), *extras)
    return calls


def run(
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    grad_weights: Tensor | None = None,
) -> None:
    """Forward and backward; nothing is computed."""
    lse = torch.zeros(len(tokens), len(queries))
    dz = torch.zeros(len(tokens), *queries.shape)
    wanted = bias is not None
    launch.pool_forward(tokens, queries, bias, mask, 1e-6, wanted)
    launch.pool_backward(dz, grad_weights, tokens, queries, bias, mask, lse, lse, 1e-6, True, wanted)


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
        source, target=TARGETS[target][0], options={"num_warps": facts["warps"], **launch.OPTIONS}
    )
    row = {
        "kernel": name + facts["suffix"],
        "target": target,
        "dtype": facts["dtype"],
        "C": constants["WIDTH"],
        "M": constants["COUNT"],
        "block_n": constants.get("BLOCK_N", ""),
        "head": constants.get("HEAD", constants.get("BLOCK_C")),
        "tail": constants.get("TAIL", 0),
        "warps": facts["warps"],
    }
    return {**row, **resources(compiled), "exchanged": exchanged(compiled.asm["ttgir"])}


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
    facts = {
        "divisible": divisible,
        "warps": arguments.get("num_warps", 4),
        "dtype": "float32" if tokens is None else str(tokens.dtype).removeprefix("torch."),
        "suffix": " + bias, mask, weights" if arguments.get("mask") is not None else "",
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table anew instead of checking it")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    options = parser.parse_args()
    jobs: dict[str, Any] = {}
    for target in options.targets:
        gpu, processors, _ = TARGETS[target]
        for name, arguments in launches(gpu.warp_size, processors):
            job = (target, name, *specialise(name, arguments))
            jobs.setdefault(repr(job), job)
    print(f"{len(jobs)} kernels for {', '.join(options.targets)}", flush=True)
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for done, row in enumerate(pool.imap(compile_kernel, jobs.values()), 1):
            text = {name: str(row[name]) for name in COLUMNS}
            key = tuple(text[name] for name in KEY)
            # Variants that differ in nothing but the divisibility of a stride share a row: the worst of every figure.
            for name in COLUMNS[len(KEY) :] if key in rows else ():
                text[name] = str(max(int(text[name]), int(rows[key][name])))
            rows[key] = text
            if done % 25 == 0:
                print(f"  {done} of {len(jobs)}", flush=True)
    table = [rows[key] for key in sorted(rows)]
    problems = failures(table)
    if options.write:
        write(table)
    else:
        problems += drift(table, options.targets)
    print("\n".join(problems) or f"no spills, shared memory within limits, {len(table)} rows as in {TABLE.name}")
    return 1 if problems else 0


def failures(table: list[dict[str, str]]) -> list[str]:
    """Rows that spill or that ask for more shared memory than the target has."""
    found = []
    for row in table:
        name = " ".join(row[column] for column in KEY)
        limit = TARGETS[row["target"]][2]
        if int(row["spilled_bytes"]):
            found.append(f"spills {row['spilled_bytes']} bytes: {name}")
        if int(row["shared_bytes"]) > limit:
            found.append(f"shared memory {row['shared_bytes']} of {limit} bytes: {name}")
    return found


def drift(table: list[dict[str, str]], targets: list[str]) -> list[str]:
    """Differences from the committed table."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        committed = [row for row in csv.DictReader(file) if row["target"] in targets]
    versions = {row.pop("triton") for row in committed}
    if versions != {triton.__version__}:
        made = ", ".join(versions)
        return [f"the table was made with Triton {made}, this is {triton.__version__}: use that one, or --write"]
    ours = {tuple(row.values()) for row in table}
    theirs = {tuple(row[name] for name in COLUMNS) for row in committed}
    lines = [f"not in the table: {', '.join(row)}" for row in sorted(ours - theirs)]
    return lines + [f"only in the table: {', '.join(row)}" for row in sorted(theirs - ours)]


def write(table: list[dict[str, str]]) -> None:
    temporary = TABLE.with_suffix(".partial")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "triton"])
        writer.writeheader()
        writer.writerows({**row, "triton": triton.__version__} for row in table)
    temporary.replace(TABLE)
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    sys.exit(main())
