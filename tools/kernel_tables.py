"""The committed tables of hd-awd's kernels: what they use on real GPUs, and how many bytes they move.

    python tools/kernel_tables.py               # check the bytes; fails when the table has drifted
    python tools/kernel_tables.py --write       # write attention_pool_bytes.csv anew

``kernel_resources.py`` compiles the kernels and fills the other table, attention_pool_kernels.csv. Needs no Triton.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from pathlib import Path

from hd_awd.pooling.kernels.plan import make_plan
from hd_awd.pooling.kernels.traffic import bytes_moved

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
RESOURCES, BYTES = RESULTS / "attention_pool_kernels.csv", RESULTS / "attention_pool_bytes.csv"
# Name: threads of a warp, multiprocessors, shared memory of one program in bytes.
TARGETS = {
    "sm_80": (32, 108, 163 * 1024),
    "sm_90": (32, 132, 227 * 1024),
    "sm_100": (32, 148, 227 * 1024),
    "sm_120": (32, 170, 99 * 1024),
    "gfx942": (64, 304, 64 * 1024),
}
# (B, N, C) of the microbenchmark, and a batch that fills every device.
SHAPES = [(16, 256, 768), (16, 256, 1152), (4, 1024, 1152), (2, 1024, 2240), (1, 256, 1152), (512, 256, 1152)]
NUM_QUERIES = (1, 4, 16)
ITEMSIZES = {"bfloat16": 2, "float32": 4}
# What identifies a kernel that was compiled; the rest of a row is what it uses.
KEY = ["kernel", "target", "dtype", "C", "M", "block_n", "row_head", "row_tail", "warps"]

Row = dict[str, str]


def bytes_table() -> list[Row]:
    """Per target, shape and direction: what the plan reads and writes as multiples of the tokens' bytes.

    ``tokens_read`` counts the tokens alone, ``read`` and ``written`` every load and store, most of them from a cache.
    """
    table = []
    for (target, (lanes, processors, _)), (dtype, size), shape, num_queries, direction in itertools.product(
        TARGETS.items(), ITEMSIZES.items(), SHAPES, NUM_QUERIES, ("forward", "backward")
    ):
        plan = make_plan(direction, *shape, num_queries, size, lanes=lanes, processors=processors)
        moved = bytes_moved(direction, plan, *shape, num_queries, size)
        tokens = shape[0] * shape[1] * shape[2] * size
        row = {"target": target, "processors": processors, "dtype": dtype}
        row |= dict(zip(("B", "N", "C"), shape, strict=True)) | {"M": num_queries, "direction": direction}
        row |= {"passes": plan.passes, "splits": plan.splits}
        row |= {name: round(getattr(moved, name) / tokens, 4) for name in ("read", "written")}
        row["tokens_read"] = round(moved.tokens / tokens, 4)
        table.append({name: str(value) for name, value in row.items()})
    return table


def failures(table: list[Row]) -> list[str]:
    """Rows of the resources that spill or that ask for more shared memory than the target has."""
    found = []
    for row in table:
        name = " ".join(row[column] for column in KEY)
        limit = TARGETS[row["target"]][2]
        if int(row["spilled_bytes"]):
            found.append(f"spills {row['spilled_bytes']} bytes: {name}")
        if int(row["shared_bytes"]) > limit:
            found.append(f"shared memory {row['shared_bytes']} of {limit} bytes: {name}")
    return found


def drift(path: Path, table: list[Row], *, complete: bool = True) -> list[str]:
    """Differences from the committed table; rows of targets that ``table`` leaves out are left out too.

    Unless ``complete`` is False, every committed row of those targets must be there.
    """
    targets = {row["target"] for row in table}
    committed = [row for row in read(path) if row["target"] in targets]
    made, ours = ({row.get("triton") for row in rows} for rows in (committed, table))
    if made != ours:
        theirs, own = (", ".join(map(str, versions)) or "none" for versions in (made, ours))
        return [f"{path.name} was made with Triton {theirs}, this is {own}: use that one, or --write"]
    old, new = ({tuple(row.items()) for row in rows} for rows in (committed, table))
    lines = [f"not in {path.name}: {', '.join(value for _, value in row)}" for row in sorted(new - old)]
    gone = sorted(old - new) if complete else []
    return lines + [f"only in {path.name}: {', '.join(value for _, value in row)}" for row in gone]


def read(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, table: list[Row]) -> None:
    temporary = path.with_suffix(".partial")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    temporary.replace(path)
    print(f"wrote {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the bytes' table anew instead of checking it")
    options = parser.parse_args()
    if options.write:
        write(BYTES, bytes_table())
        return 0
    problems = drift(BYTES, bytes_table())
    print("\n".join(problems) or f"{BYTES.name} is up to date")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
