"""Which weight of the discriminator neither collapses nor is idle, on four data sets: the search behind the defaults.

    hatch run experiment discriminator-weight

Teacher and stage 1 of each data set are trained once, by the recipe of digits, of fashion, or of `hdistill new` for the
others; then stage 2 for every weight and learning rate of the discriminator, all else alike. Finished runs are kept in
runs/discriminator_weight; what is stopped goes on. Writes results/discriminator_weight.csv. "alarms" are those of
`hdistill run` at the end of stage 2; "choice" marks the weight whose worst distance over the data sets, each divided by
the least of its data set, is the smallest among those without an alarm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.runner import print_table, write_csv
from hd_trainer.files import read_records
from hd_trainer.stages.alarms import find_alarms

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parent / "recipes.py"
DATA = {"digits": "digits", "fashion": "fashion", "emoji": f"{RECIPES}:emoji", "shapes": f"{RECIPES}:shapes"}
#: Where the recipe looks for the drawn shapes, and what draws them.
SHAPES, DRAW = Path("runs/shapes"), Path(__file__).parents[1] / "examples/draw_shapes.py"
WEIGHTS = (0.0, 0.003, 0.01, 0.05)
RATES = (1e-3,)
#: What the digits recipe has had from the beginning, and what collapsed on other data.
OTHERS = ((0.05, 2e-3),)
#: The same one-step measure for all, and a teacher's row that costs nothing.
EVALUATION = ("--evaluation.samples", "1000", "--evaluation.teacher-steps", "1", "--evaluation.timing-repeats", "1")
SCORES = ("fd", "precision", "recall")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments discriminator-weight", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/discriminator_weight"))
    options = parser.parse_args(arguments)
    if "shapes" in options.data and not SHAPES.is_dir():
        subprocess.run([sys.executable, str(DRAW), str(SHAPES)], check=True)
    rows: list[dict[str, object]] = []
    for data in options.data:
        base = options.out / data / "base"
        common = ["--seed", str(options.seed), *EVALUATION]
        for stage in ("teacher", "trajectory"):
            hdistill("train", stage, DATA[data], "--out", str(base), *common)
        for weight, rate in [(weight, rate) for weight in WEIGHTS for rate in RATES] + list(OTHERS):
            folder = options.out / data / f"{weight:g}-{rate:g}"
            if not (folder / "evaluation.json").exists():
                start = ["--teacher", str(base / "teacher"), "--student-weights", str(base / "trajectory")]
                discriminator = "--distribution.discriminator"
                chosen = [f"{discriminator}.gan-weight", f"{weight:g}", f"{discriminator}.optimizer.lr", f"{rate:g}"]
                hdistill("run", DATA[data], "--out", str(folder), *common, *start, *chosen)
            rows.append({"data": data, "gan_weight": weight, "discriminator_lr": rate, **outcome(folder)})
    mark_choice(rows)
    print_table(rows)
    print(f"\nWrote {write_csv('discriminator_weight', rows, RESULTS)}")


def hdistill(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "hd_trainer", *arguments], check=True)


def outcome(folder: Path) -> dict[str, object]:
    """Scores of the one-step generator, and what the end of its training said."""
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    row = next(row for row in found if row["name"] == "distribution")
    last = read_records(folder / "distribution" / "metrics.jsonl")[-1]
    return {
        **{score: round(row[score], 4) for score in SCORES},
        "deviation": round(last["samples_deviation"], 3),
        "roughness": round(last["samples_roughness"], 3),
        "discriminator_accuracy": round(last.get("discriminator_accuracy", float("nan")), 3),
        "alarms": " ".join(find_alarms("distribution", last)),
    }


def mark_choice(rows: list[dict[str, object]]) -> None:
    """Add "choice" to each row: True for one pair of weight and rate."""
    least: dict[object, float] = {}
    for row in rows:
        least[row["data"]] = min(least.get(row["data"], float("inf")), float(str(row["fd"])))
    worst: dict[tuple[object, object], float] = {}
    for row in rows:
        pair = row["gan_weight"], row["discriminator_lr"]
        ratio = float("inf") if row["alarms"] else float(str(row["fd"])) / least[row["data"]]
        worst[pair] = max(worst.get(pair, 0.0), ratio)
    best = min(worst, key=lambda pair: worst[pair])
    for row in rows:
        pair = row["gan_weight"], row["discriminator_lr"]
        row |= {"worst_ratio": round(worst[pair], 3), "choice": pair == best}
