"""Write the tables of README.md and docs/results.md from committed results, or check that they still agree.

python tools/update_readme.py             # the tables, from experiments/results and benchmarks/results
python tools/update_readme.py --picture runs/seeds/0    # docs/digits.png too, from a run's folder
python tools/update_readme.py --check     # exit 1 if a page's table is not the one of the results
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md")
SEEDS = ROOT / "experiments/results/digits_seeds.json"
DISCRIMINATORS = ROOT / "experiments/results/digits_discriminator.csv"
NOISE_LEVELS = ROOT / "experiments/results/digits_noise_levels.csv"
WEIGHTING = ROOT / "experiments/results/weighting.csv"
STEPS = ROOT / "benchmarks/results/meanflow_step.csv"
PICTURE = ROOT / "docs/digits.png"
NAMES = {
    "trajectory": "**stage 1**, trajectory",
    "distribution": "**stage 2**, distribution",
    "held-out data": "held-out real data",
    "training halves": "half of the training data, against the other",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    parser.add_argument("--picture", type=Path, help="a finished run's folder, for docs/digits.png")
    options = parser.parse_args()
    tables = {
        "digits": digits_table(),
        "discriminator": discriminator_table(),
        "noise levels": noise_levels_table(),
        "weighting": weighting_table(),
        "step": step_table(),
    }
    old = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    new = {name: with_tables(text, tables) for name, text in old.items()}
    missing = [name for name in tables if not any(marker(name) in text for text in old.values())]
    if missing:
        parser.error(f"no page of {', '.join(PAGES)} has a place for the table {', '.join(missing)}")
    if options.check:
        stale = [name for name in PAGES if new[name] != old[name]]
        for name in stale:
            print(f"{name}'s tables are not those of the results; run tools/update_readme.py", file=sys.stderr)
        return int(bool(stale))
    for name, text in new.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    if options.picture:
        draw(options.picture)
    return 0


def marker(name: str) -> str:
    """The comment that a table stands below."""
    return f"<!-- {name} table: written by tools/update_readme.py -->"


def with_tables(text: str, tables: dict[str, list[str]]) -> str:
    """The page with what stands between each table's two comments replaced."""
    for name, lines in tables.items():
        end = f"<!-- end of {name} table -->"
        if marker(name) in text:
            before, rest = text.split(marker(name))
            text = "\n".join([before + marker(name), *lines, end]) + rest.split(end)[1]
    return text


def digits_table() -> list[str]:
    """The main job as a Markdown table: means over the seeds, the range of the distance in brackets."""
    results = json.loads(SEEDS.read_text(encoding="utf-8"))
    lines = [
        "| | steps | FD-digits (range) | KID | precision | recall | class accuracy | calls | images/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["summary"]:
        mean = {name: value["mean"] for name, value in row.items() if isinstance(value, dict)}
        spread = f" ({row['fd']['min']:.2f} - {row['fd']['max']:.2f})" if row["steps"] else ""
        speed = f"{mean['images_per_second']:,.0f}" if "images_per_second" in mean else ""
        cells = [
            NAMES.get(row["name"], row["name"]),
            str(row["steps"] or ""),
            f"{mean['fd']:.2f}{spread}",
            *(f"{mean[name]:.3f}" if name in mean else "" for name in ("kid", "precision", "recall", "accuracy")),
            str(row["calls"] or ""),
            speed,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def discriminator_table() -> list[str]:
    """Stage 2 without a discriminator, with GAP and with AWD."""
    names = {"none": "none", "gap": "GAP: mean over tokens", "awd": "AWD: learned weights"}
    return variants_table(DISCRIMINATORS, "discriminator", names)


def noise_levels_table() -> list[str]:
    """Stage 2 with each law of the noise level."""
    names = {
        "uniform": "U[0.02, 0.98] for both",
        "wide-fake-score": "U[0.02, 0.98], fake score U[0, 1]",
        "dmd2": "DMD2's for both",
    }
    return variants_table(NOISE_LEVELS, "noise_levels", names)


def variants_table(path: Path, column: str, names: dict[str, str]) -> list[str]:
    """One line per variant of stage 2: means over the seeds, and the range of the distance."""
    found: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    for row in _csv(path):
        found[row[column]].append(row)
    lines = [
        f"| {column.replace('_', ' ')} | FD-digits (range) | KID | precision | recall |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, title in names.items():
        values = {key: [float(row[key]) for row in found[name]] for key in ("fd", "kid", "precision", "recall")}
        mean = {key: sum(one) / len(one) for key, one in values.items()}
        spread = f"{mean['fd']:.2f} ({min(values['fd']):.2f} - {max(values['fd']):.2f})"
        lines.append(f"| {title} | {spread} | {mean['kid']:.3f} | {mean['precision']:.3f} | {mean['recall']:.3f} |")
    return lines


def weighting_table() -> list[str]:
    """Stage 1 for each power of the adaptive weight: means and ranges over the seeds."""
    found: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in _csv(WEIGHTING):
        if row["case"].startswith("p ="):
            found.setdefault((row["data"], row["times"], row["case"]), []).append(row)
    lines = [
        "| data | times | p | energy distance x 1000 (range) | bridges | FD-digits (range) | precision | recall |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for (data, times, case), rows in found.items():

        def cell(column: str, digits: int, factor: float = 1.0, spread: bool = False, rows: Any = rows) -> str:
            values = [factor * float(row[column]) for row in rows if row[column]]
            if not values:
                return ""
            mean = f"{sum(values) / len(values):.{digits}f}"
            return f"{mean} ({min(values):.{digits}f} - {max(values):.{digits}f})" if spread else mean

        cells = [
            data,
            times,
            case.removeprefix("p = "),
            cell("energy_distance", 2, 1000, spread=True),
            cell("bridges", 3),
            cell("fd", 2, spread=True),
            cell("precision", 3),
            cell("recall", 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def step_table() -> list[str]:
    """Cost of a MeanFlow step over a flow-matching step, one line per network."""
    cases = {
        "meanflow_jvp": "from scratch, JVP",
        "meanflow_jvp_teacher": "with a teacher, JVP",
        "meanflow_difference": "from scratch, difference",
        "meanflow_difference_teacher": "with a teacher, difference",
    }
    ratios: dict[str, dict[str, str]] = {}
    for row in _csv(STEPS):
        ratios.setdefault(row["network"], {})[row["case"]] = row["ratio_to_flow_matching"]
    lines = [f"| network | {' | '.join(cases.values())} |", "|---|" + "---:|" * len(cases)]
    for network, found in ratios.items():
        cells = (f"{float(found[case]):.2f}" for case in cases)
        lines.append(f"| `{network}` | {' | '.join(cells)} |")
    return lines


def _csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw(run: Path) -> None:
    """Three panels from one noise and class each: the teacher at 50 steps, stage 1 and stage 2 at one."""
    import torch
    from PIL import Image, ImageDraw, ImageFont

    import hd_zoo
    from hd_trainer.images import tile

    networks = {stage: hd_zoo.from_pretrained(run / stage) for stage in ("teacher", "trajectory", "distribution")}
    labels = torch.arange(10).repeat(5)
    # The report's own noise: the picture is a part of it.
    noise = hd_zoo.seeded_noise((1, 8, 8), range(10**9, 10**9 + len(labels)))
    panels = [
        ("teacher, 50 steps", hd_zoo.sample_ode(networks["teacher"], noise, 50, labels=labels)),
        ("stage 1: one step", hd_zoo.sample_jumps(networks["trajectory"], noise, labels=labels)),
        ("stage 2: one step", hd_zoo.sample_jumps(networks["distribution"], noise, labels=labels)),
    ]
    grids = [tile(images, 10, scale=4) for _, images in panels]
    width, height = grids[0].size
    canvas = Image.new("RGB", (3 * width + 40, height + 28), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    for index, ((title, _), grid) in enumerate(zip(panels, grids, strict=True)):
        left = index * (width + 20)
        pen.text((left, 2), title, fill="#1f2933", font=font)
        canvas.paste(grid, (left, 28))
    PICTURE.parent.mkdir(exist_ok=True)
    canvas.save(PICTURE, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
