"""Decoded pictures, kept as bytes in the cache folder and memory-mapped from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hd_trainer.data.source import cache_folder
from hd_trainer.errors import UserError
from hd_trainer.files import folder_in_progress, read_json, remove_incomplete, write_json

#: Part of every key: another number when the rule for a picture changes.
RULE = 1

#: Seconds after which an unfinished entry is nobody's: other commands may be at work in the same folder.
ABANDONED = 86_400.0

IMAGES, FACTS = "images.npy", "pictures.json"

#: (height, width, channels) -> (N, height, width, channels) uint8 to write into.
Room = Callable[[tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures of one size."""

    pixels: np.ndarray
    """(N, H, W, C) uint8; rows of unreadable pictures hold nothing"""
    unreadable: dict[int, str]
    """reason by row"""


def cached_pictures(key: Any, number: int, fill: Callable[[Room], dict[int, str]]) -> Pictures:
    """The pictures that belong to the key; the first time they are made.

    Args:
        key: plain JSON values: all that decides what the pictures are.
        number: of pictures.
        fill: asks once for room and fills it; returns the reason by row for what cannot be read.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps([RULE, key]).encode()).hexdigest()
    target = cache_folder() / "pictures" / digest[:32]
    if (found := _read(target, number)) is not None:
        return found
    remove_incomplete(target.parent, older_than=ABANDONED)
    with folder_in_progress(target) as temporary:

        def room(shape: tuple[int, ...]) -> np.ndarray:
            path = temporary / IMAGES
            pixels: np.ndarray = np.lib.format.open_memmap(path, "w+", dtype=np.uint8, shape=(number, *shape))
            if hasattr(os, "posix_fallocate"):
                # A disk that fills up under a memory map kills the process without a word: claim the blocks now.
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            return pixels

        unreadable = fill(room)
        write_json(temporary / FACTS, {"unreadable": sorted(unreadable.items())})
    again = _read(target, number)
    if again is None:
        raise UserError(f"{target} cannot be read back; choose another cache folder with HDISTILL_CACHE")
    return again


def _read(target: Path, number: int) -> Pictures | None:
    """What was kept there; None if nothing was, or it is damaged."""
    if not (target / IMAGES).is_file():
        return None
    try:
        pixels = np.load(target / IMAGES, mmap_mode="r", allow_pickle=False)
        unreadable = {int(row): str(why) for row, why in read_json(target / FACTS)["unreadable"]}
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    fits = pixels.dtype == np.uint8 and pixels.ndim == 4 and len(pixels) == number
    return Pictures(pixels, unreadable) if fits else None
