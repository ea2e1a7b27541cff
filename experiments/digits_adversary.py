"""What the discriminator adds in stage 2: none, GAP and AWD from the same teacher and the same stage 1.

    hatch run experiment digits-adversary

Needs the runs of digits-seeds (AWD's rows are theirs). Trains stage 2 once more per seed and variant, with all other
settings alike, into runs/adversary/<variant>-<seed>, and writes results/digits_adversary.csv.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.runner import print_table, write_csv

RESULTS = Path(__file__).parent / "results"
VARIANTS = {
    "none": ["--distribution.discriminator.gan-weight", "0"],
    "gap": ["--distribution.discriminator.pooling", "mean"],
}
MEASURES = ("fd", "kid", "precision", "recall", "accuracy")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments digits-adversary", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="where digits-seeds put its runs")
    parser.add_argument("--out", type=Path, default=Path("runs/adversary"))
    options = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    for seed in options.seeds:
        source = options.runs / str(seed)
        if not (source / "evaluation.json").exists():
            parser.error(f"no finished run in {source}; run first: python -m experiments digits-seeds")
        rows.append({"adversary": "awd", "seed": seed, **scores(source)})
        for variant in VARIANTS:
            folder = options.out / f"{variant}-{seed}"
            if not (folder / "evaluation.json").exists():
                subprocess.run(
                    [sys.executable, "-m", "hd_trainer", *command(variant, seed, source, folder)], check=True
                )
            rows.append({"adversary": variant, "seed": seed, **scores(folder)})
    rows.sort(key=lambda row: (str(row["adversary"]), row["seed"]))
    print_table(rows)
    print(f"\nWrote {write_csv('digits_adversary', rows, RESULTS)}")


def command(variant: str, seed: int, source: Path, folder: Path) -> list[str]:
    """hdistill's arguments: stage 2 alone, from the teacher and the stage 1 of the run in ``source``."""
    weights = ["--teacher-weights", str(source / "teacher"), "--student-weights", str(source / "trajectory")]
    return ["run", "digits", "--seed", str(seed), "--out", str(folder), *weights, *VARIANTS[variant]]


def scores(folder: Path) -> dict[str, float]:
    """The measures of a run's one-step generator."""
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    row = next(row for row in found if row["name"] == "distribution")
    return {measure: round(row[measure], 4) for measure in MEASURES}
