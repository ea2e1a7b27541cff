"""Shared by the experiments on stage 2: variants from the same teacher and the same stage 1, seed by seed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.runner import print_table, write_csv

RESULTS = Path(__file__).parent / "results"
MEASURES = ("fd", "kid", "precision", "recall", "accuracy")


def compare(what: str, variants: dict[str, list[str]], first: str, arguments: list[str]) -> None:
    """Train stage 2 once per seed and variant and write ``results/digits_<what>.csv``.

    Args:
        what: is compared; names the column, the file and the folder ``runs/<what>``.
        variants: by name, the recipe and the flags of ``hdistill run``.
        first: name of the variant that the runs of digits-seeds are.
        arguments: of the command line.
    """
    name = f"digits-{what.replace('_', '-')}"
    parser = argparse.ArgumentParser(prog=f"python -m experiments {name}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="where digits-seeds put its runs")
    parser.add_argument("--out", type=Path, default=Path("runs") / what)
    options = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    for seed in options.seeds:
        source = options.runs / str(seed)
        if not (source / "evaluation.json").exists():
            parser.error(f"no finished run in {source}; run first: python -m experiments digits-seeds")
        rows.append({what: first, "seed": seed, **scores(source)})
        for variant in variants:
            folder = options.out / f"{variant}-{seed}"
            if not (folder / "evaluation.json").exists():
                command = run_arguments(variants[variant], seed, source, folder)
                subprocess.run([sys.executable, "-m", "hd_trainer", *command], check=True)
            rows.append({what: variant, "seed": seed, **scores(folder)})
    rows.sort(key=lambda row: (str(row[what]), row["seed"]))
    print_table(rows)
    print(f"\nWrote {write_csv(f'digits_{what}', rows, RESULTS)}")


def run_arguments(variant: list[str], seed: int, source: Path, folder: Path) -> list[str]:
    """hdistill's arguments: stage 2 alone, from the teacher and the stage 1 of the run in ``source``."""
    recipe, *flags = variant
    weights = ["--teacher-weights", str(source / "teacher"), "--student-weights", str(source / "trajectory")]
    # Of the teacher one cheap row: its own are those of digits-seeds.
    return [
        "run",
        recipe,
        "--seed",
        str(seed),
        "--out",
        str(folder),
        *weights,
        "--evaluation.teacher-steps",
        "1",
        *flags,
    ]


def scores(folder: Path) -> dict[str, float]:
    """The measures of a run's one-step generator."""
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    row = next(row for row in found if row["name"] == "distribution")
    return {measure: round(row[measure], 4) for measure in MEASURES}
