"""Write the README's figures from committed results, or check that they still agree.

python tools/update_readme.py             # the table, from benchmarks/results/digits_seeds.json
python tools/update_readme.py --picture runs/seeds/0    # docs/digits.png too, from a run's folder
python tools/update_readme.py --check     # exit 1 if the README's table is not the one of the results
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README, RESULTS, PICTURE = ROOT / "README.md", ROOT / "benchmarks/results/digits_seeds.json", ROOT / "docs/digits.png"
BEGIN, END = "<!-- digits table: written by tools/update_readme.py -->", "<!-- end of digits table -->"
NAMES = {
    "trajectory": "**stage 1**, trajectory",
    "distribution": "**stage 2**, distribution",
    "held-out data": "held-out real data",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    parser.add_argument("--picture", type=Path, help="a finished run's folder, for docs/digits.png")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    wanted = f"{before}{BEGIN}\n{table(json.loads(RESULTS.read_text(encoding='utf-8')))}\n{END}{rest.split(END)[1]}"
    if options.check:
        if wanted != text:
            print(
                "README.md's table is not the one of the committed results; run tools/update_readme.py", file=sys.stderr
            )
        return int(wanted != text)
    README.write_text(wanted, encoding="utf-8")
    if options.picture:
        draw(options.picture)
    return 0


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table: means over the seeds, the range of the distance in brackets."""
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
            *(f"{mean[measure]:.3f}" for measure in ("kid", "precision", "recall", "accuracy")),
            str(row["calls"] or ""),
            speed,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
