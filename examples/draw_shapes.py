"""Draws 2,000 pictures to try `hdistill` on: shapes of many colours, 32x32, one folder for each of eight shapes.

python examples/draw_shapes.py shapes           # the folder to make
hdistill new drawn --data folder:shapes         # writes drawn.py
hdistill run drawn.py
"""

import colorsys
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, FINER = 32, 4  # drawn four times as large, then scaled down: smooth edges
CORNERS = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}
SHAPES = ("circle", "ring", "cross", "star", *CORNERS)


def points(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a polygon or a star around (x, y)."""
    number = CORNERS.get(shape, 10)
    radii = [radius if index % 2 == 0 or shape != "star" else 0.45 * radius for index in range(number)]
    angles = [turn + 2 * math.pi * index / number for index in range(number)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def draw(shape: str, chance: random.Random) -> Image.Image:
    """One picture: a vivid shape of random place, size and turn on a pale ground."""

    def colour(saturation: float, value: float) -> tuple[int, ...]:
        return tuple(round(255 * one) for one in colorsys.hsv_to_rgb(chance.random(), saturation, value))

    side = SIDE * FINER
    picture = Image.new("RGB", (side, side), colour(0.15, 0.95))
    pen, ink = ImageDraw.Draw(picture), colour(0.9, 0.8)
    x, y = (side * chance.uniform(0.4, 0.6) for _ in range(2))
    radius, turn = side * chance.uniform(0.22, 0.36), chance.uniform(0, 2 * math.pi)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=ink)
    elif shape == "ring":
        pen.ellipse(box, outline=ink, width=round(0.4 * radius))
    elif shape == "cross":
        for angle in (turn, turn + math.pi / 2):
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            pen.line((x - dx, y - dy, x + dx, y + dy), fill=ink, width=round(0.5 * radius))
    else:
        pen.polygon(points(shape, x, y, radius, turn), fill=ink)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(folder: Path, number: int = 2_000) -> None:
    """Write ``number`` pictures below ``folder``, the same ones each time."""
    chance = random.Random(0)
    for index in range(number):
        shape = SHAPES[index % len(SHAPES)]
        (folder / shape).mkdir(parents=True, exist_ok=True)
        draw(shape, chance).save(folder / shape / f"{index:04d}.png")
    print(f"Wrote {number:,} pictures into {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "shapes"))
