"""Compile hd-awd's kernels for real GPUs, without one, and hold what they use against the committed table.

    hatch run aot               # every kernel for every target and number of queries once, at its tightest shape
    hatch run aot --all         # every kernel of the table
    hatch run aot --write       # all of them, and write the tables anew (benchmarks/results/attention_pool_*.csv)

Fails on a spill, on too much shared memory, or where the committed table says something else. The tightest shape is
the one with the most registers in the committed table. Results are kept in .hatch/kernels (or --cache), by a hash of
all that they follow from: the kernels' source, the arguments, the target, the version of Triton. What has not changed
is not compiled again; the folder may be deleted at any time.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import kernel_tables
import triton
from kernel_launches import KERNELS, Job, jobs, launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hd_awd.pooling.kernels import launch, parts

FIGURES = ["registers", "spilled_bytes", "shared_bytes", "exchanged"]
COLUMNS = [*kernel_tables.KEY, *FIGURES, "triton"]
CACHE = Path(__file__).resolve().parent.parent / ".hatch" / "kernels"


def compile_kernel(job: Job) -> kernel_tables.Row:
    """One row of the table."""
    kernel = KERNELS[job.kernel]
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: job.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in job.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in job.divisible},
    )
    options = {"num_warps": job.warps, **launch.OPTIONS}
    compiled = triton.compile(source, target=gpu_target(job.target), options=options)
    found = {**resources(compiled), "exchanged": exchanged(compiled.asm["ttgir"]), "triton": triton.__version__}
    return job.row | {name: str(value) for name, value in found.items()}


def gpu_target(name: str) -> GPUTarget:
    """sm_90 -> GPUTarget("cuda", 90, 32); gfx942 -> GPUTarget("hip", "gfx942", 64)."""
    lanes = kernel_tables.TARGETS[name][0]
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), lanes)
    return GPUTarget("hip", name, lanes)


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


@functools.cache
def source_of(kernel: str) -> str:
    """What a row follows from: the kernel, the parts that kernels share, and the functions that read it off."""
    reading = (compile_kernel, gpu_target, resources, exchanged)
    return "\n".join(inspect.getsource(one) for one in (KERNELS[kernel].fn, parts, *reading))


def cache_key(job: Job) -> str:
    """A hash of all that the job's row follows from."""
    assemblers = {name: value for name, value in os.environ.items() if name.startswith("TRITON_PTXAS")}
    facts = (job, source_of(job.kernel), launch.OPTIONS, triton.__version__, assemblers)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def compile_all(wanted: list[Job], processes: int, cache: Path) -> list[kernel_tables.Row]:
    """The table of what the jobs' kernels use, sorted; from the cache what is there, into it what is not."""
    cache.mkdir(parents=True, exist_ok=True)
    paths = {cache / f"{cache_key(job)}.json": job for job in wanted}
    missing = {path: job for path, job in paths.items() if not path.exists()}
    print(f"{len(paths)} kernels: {len(paths) - len(missing)} from {cache}, {len(missing)} to compile", flush=True)
    # The workers compile, also where this process has Triton's interpreter on.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if missing:
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            multiprocessing.get_context("spawn").Pool(min(processes, len(missing))) as pool,
        ):
            for done, (path, row) in enumerate(
                zip(missing, pool.imap(compile_kernel, missing.values()), strict=True), 1
            ):
                keep(path, row)
                if done % 50 == 0:
                    print(f"  {done} of {len(missing)}", flush=True)
    rows: dict[tuple[str, ...], kernel_tables.Row] = {}
    for path in paths:
        row = json.loads(path.read_text(encoding="utf-8"))
        key = tuple(row[name] for name in kernel_tables.KEY)
        rows[key] = worst(row, rows.get(key, row))
    return [rows[key] for key in sorted(rows)]


def keep(path: Path, row: kernel_tables.Row) -> None:
    """Write a result whole or not at all, so that an interrupted run goes on where it was."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False, encoding="utf-8") as file:
        json.dump({name: row[name] for name in COLUMNS}, file)
    Path(file.name).replace(path)


def worst(one: kernel_tables.Row, other: kernel_tables.Row) -> kernel_tables.Row:
    """The larger figures of two variants that share a row: they differ in the divisibility of a stride alone."""
    return one | {name: str(max(int(one[name]), int(other[name]))) for name in FIGURES}


def tightest(every: list[Job], committed: list[kernel_tables.Row]) -> list[Job]:
    """Of each kernel, variant, target and number of queries the jobs of one row: where registers are fewest to spare.

    By the committed table; a row that is not in it comes first.
    """
    registers = {tuple(row[name] for name in kernel_tables.KEY): int(row["registers"]) for row in committed}
    groups: dict[tuple[str, ...], dict[tuple[str, ...], list[Job]]] = {}
    for job in every:
        row = job.row
        group = groups.setdefault((row["kernel"], row["target"], row["M"]), {})
        group.setdefault(tuple(row.values()), []).append(job)
    return [job for group in groups.values() for job in group[max(group, key=lambda key: registers.get(key, 1 << 16))]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every row of the table instead of the tightest shapes")
    parser.add_argument("--write", action="store_true", help="compile all and write the tables anew")
    parser.add_argument("--targets", nargs="+", choices=list(kernel_tables.TARGETS), help="for a check (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where results are kept (default: %(default)s)")
    options = parser.parse_args()
    if options.write and options.targets:
        parser.error("--write is for all targets: the table would lose the others")
    wanted = [job for target in options.targets or kernel_tables.TARGETS for job in jobs(target, launches(target))]
    whole = options.all or options.write
    if not whole:
        wanted = tightest(wanted, kernel_tables.read(kernel_tables.RESOURCES))
    table = compile_all(wanted, options.jobs, options.cache)
    problems = kernel_tables.failures(table)
    tables = [(kernel_tables.RESOURCES, table, whole), (kernel_tables.BYTES, kernel_tables.bytes_table(), True)]
    for path, rows, complete in tables:
        if options.write:
            kernel_tables.write(path, rows)
        else:
            problems += kernel_tables.drift(path, rows, complete=complete)
    drifted = "" if options.write else "; as in the committed tables"
    print("\n".join(problems) or f"no spills, shared memory within limits, {len(table)} rows{drifted}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
