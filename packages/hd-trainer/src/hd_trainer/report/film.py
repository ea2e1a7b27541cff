"""A stage's samples through training, as frames small enough to stand in the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from hd_trainer.engine.loop import SAMPLES
from hd_trainer.report import figures

T = TypeVar("T")

#: Of one stage: frames at most, and bytes of all of them together at most [ours].
MOST_FRAMES, MOST_BYTES = 12, 1_500_000


@dataclass(frozen=True)
class Frame:
    """The grid of samples after ``step`` steps."""

    step: int
    address: str
    """the picture as a data address"""


def frames(folder: Path, most: int = MOST_FRAMES, most_bytes: int = MOST_BYTES) -> list[Frame]:
    """Grids of ``folder/samples``, the first and the last among them, evenly chosen; empty where there are none.

    Args:
        most: frames.
        most_bytes: of all frames as text in the page. Where they are more, every other frame is left out, down to two;
            two that are still too large are left out altogether.
    """
    paths = sorted(path for path in (folder / SAMPLES).glob("*.png") if path.stem.isdigit())
    found = [Frame(int(path.stem), _address(path)) for path in _evenly(paths, most)]
    while len(found) > 2 and _size(found) > most_bytes:
        found = _evenly(found, max(2, (len(found) + 1) // 2))
    return found if len(found) > 1 and _size(found) <= most_bytes else []


def _evenly(entries: list[T], most: int) -> list[T]:
    """At most so many of the entries, from the first to the last."""
    if len(entries) <= most:
        return entries
    return [entries[round(index * (len(entries) - 1) / (most - 1))] for index in range(most)]


def _size(found: list[Frame]) -> int:
    return sum(len(frame.address) for frame in found)


def _address(path: Path) -> str:
    with Image.open(path) as picture:
        return figures.address(picture.convert("RGB"))
