"""The main job on three seeds: every number of the README's table, with its range.

    hatch run experiment digits-seeds

Runs ``hdistill run digits --seed S`` one after the other into runs/seeds/S (finished ones are kept), then writes
results/digits_seeds.json and says for each of the project's targets whether it was reached.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.runner import machine

RESULTS = Path(__file__).parent / "results"

MEASURES = ("fd", "kid", "precision", "recall", "accuracy", "nearest", "images_per_second")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments digits-seeds", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options = parser.parse_args(arguments)
    runs = []
    for seed in options.seeds:
        folder = options.out / str(seed)
        arguments = command(seed, folder)
        if not (folder / "report.html").exists():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "hd_trainer", *arguments], check=True)
            (folder / "wall_seconds.json").write_text(json.dumps(round(time.perf_counter() - began, 1)))
        runs.append(
            {
                "command": f"hdistill {' '.join(arguments)}",
                "wall_seconds": json.loads((folder / "wall_seconds.json").read_text()),
                **json.loads((folder / "evaluation.json").read_text()),
            }
        )
    result = {"machine": machine(), "targets": targets(runs), "summary": summary(runs), "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "digits_seeds.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["targets"], indent=2))
    print(f"Wrote {path}")


def command(seed: int, folder: Path) -> list[str]:
    """hdistill's arguments."""
    return ["run", "digits", "--seed", str(seed), "--out", str(folder)]


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per row of the table: mean, least and greatest value of every measure over the runs."""
    rows = []
    for index, row in enumerate(runs[0]["rows"]):
        entry = {"name": row["name"], "steps": row["steps"], "calls": row["calls"]}
        for measure in MEASURES:
            values = [run["rows"][index][measure] for run in runs]
            if None not in values:
                entry[measure] = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        rows.append(entry)
    return rows


def targets(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the main job has to reach, per seed, and whether it does."""

    def values(name: str, steps: int, measure: str) -> list[float]:
        return [_row(run, name, steps)[measure] for run in runs]

    first, second = values("trajectory", 1, "fd"), values("distribution", 1, "fd")
    teacher = values("teacher", 250, "fd")
    quality = [a / b for a, b in zip(second, teacher, strict=True)]
    recall = [a / b for a, b in zip(values("distribution", 1, "recall"), values("teacher", 250, "recall"), strict=True)]
    speed = [
        a / b
        for a, b in zip(
            values("distribution", 1, "images_per_second"),
            values("teacher", 250, "images_per_second"),
            strict=True,
        )
    ]
    wall = [run["wall_seconds"] for run in runs]
    return {
        "FD(stage 2) < FD(stage 1), ranges apart": _verdict([*first, *second], max(second) < min(first)),
        "FD(stage 2) / FD(teacher, 250 steps) <= 1.25": _verdict(quality, max(quality) <= 1.25),
        "recall(stage 2) / recall(teacher, 250 steps) >= 0.9": _verdict(recall, min(recall) >= 0.9),
        "images per second, stage 2 / teacher at 250 steps >= 60": _verdict(speed, min(speed) >= 60),
        "wall seconds < 360": _verdict(wall, max(wall) < 360),
    }


def _verdict(values: list[float], reached: bool) -> dict[str, Any]:
    return {"values": [round(value, 3) for value in values], "reached": reached}


def _row(run: dict[str, Any], name: str, steps: int) -> dict[str, Any]:
    return next(row for row in run["rows"] if row["name"] == name and row["steps"] == steps)
