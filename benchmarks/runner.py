"""Shared by benchmarks and experiments: running by name, interleaved timing, a CSV that says where it was measured."""

from __future__ import annotations

import csv
import ctypes
import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def run_by_name(folder: Path, helpers: set[str], arguments: list[str]) -> int:
    """``python -m FOLDER NAME [options]``: run one of the folder's modules; without a name, list them. 2 if unknown."""
    names = sorted(path.stem.replace("_", "-") for path in folder.glob("*.py") if path.stem not in helpers)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m {folder.name} NAME [--help]\n")
        for name in names:
            module = importlib.import_module(f"{folder.name}.{name.replace('-', '_')}")
            print(f"  {name:18s} {(module.__doc__ or '').strip().splitlines()[0]}")
        return 0
    if arguments[0] not in names:
        print(f"{folder.name}: unknown name {arguments[0]!r}; known: {', '.join(names)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"{folder.name}.{arguments[0].replace('-', '_')}")
    module.main(arguments[1:])
    return 0


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation, as allocators made for training do.

    By itself it decides so, or for pages fresh from the system, by the order in which memory happened to be freed; in
    some processes a step whose gradients are large then takes half as long again.
    """
    if platform.libc_ver()[0] == "glibc":
        library, m_trim_threshold, m_mmap_threshold = ctypes.CDLL(None), -1, -3
        library.mallopt(m_trim_threshold, 2**31 - 1)
        library.mallopt(m_mmap_threshold, 32 * 1024**2)  # the most that it takes


def interleave(cases: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every case, one run of each per round, so that a drift of the machine's speed meets all alike."""
    for _ in range(warmup):
        for case in cases.values():
            case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summarise(seconds: dict[str, list[float]], base: str) -> list[dict[str, object]]:
    """Per case: median milliseconds, quartiles, and the median of the round-by-round ratios to ``base``."""
    rows = []
    for name, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4)
        ratios = [one / other for one, other in zip(values, seconds[base], strict=True)]
        rows.append(
            {
                "case": name,
                "median_ms": round(1e3 * statistics.median(values), 3),
                "lower_quartile_ms": round(1e3 * quartiles[0], 3),
                "upper_quartile_ms": round(1e3 * quartiles[2], 3),
                f"ratio_to_{base}": round(statistics.median(ratios), 3),
                "rounds": len(values),
            }
        )
    return rows


def machine() -> dict[str, object]:
    """What a figure depends on: processor, threads, versions; the accelerator if there is one."""
    facts: dict[str, object] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def write_csv(name: str, rows: list[dict[str, object]], results: Path = RESULTS) -> Path:
    """Write ``<results>/<name>.csv``: every row with the machine's facts and the command behind it."""
    results.mkdir(exist_ok=True)
    path = results / f"{name}.csv"
    facts = {**machine(), "command": f"python -m {results.parent.name} {' '.join(sys.argv[1:])}".strip()}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    return path


def print_table(rows: list[dict[str, object]]) -> None:
    """Rows as aligned text."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} x{len(models)}" if models else platform.machine()
