"""``folder:PATH``: pictures in class sub-folders or in none. The rules are in docs/data.md."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from hd_trainer import decoding
from hd_trainer.data.byte_images import HELD_OUT, images_from_bytes
from hd_trainer.data.cache import Pictures, cached_pictures
from hd_trainer.data.dataset import FEWEST, Dataset
from hd_trainer.data.source import (
    a_share,
    a_size,
    a_switch,
    channels,
    existing,
    split_options,
    tell_left_out,
)
from hd_trainer.data.workers import decode_files
from hd_trainer.engine.parallel import total_memory
from hd_trainer.errors import UserError

OPTIONS = {"size": a_size, "channels": channels, "flip": a_switch, "held_out": a_share}

#: Files of more bytes than this in all are decoded once, by worker processes, and kept in the cache folder [ours].
LARGE = 16 << 20


def load_folder(text: str) -> Dataset:
    """The data set of ``PATH?size=32&channels=3&flip=true&held_out=0.1``.

    Raises:
        UserError: for whatever is wrong with the folder, in one line that says what to do.
    """
    place, options = split_options("folder", text, OPTIONS)
    root = existing("folder", place, "folder")
    files, labels, classes = find_pictures(root)
    name = f"folder:{root.resolve().name}"
    if len(files) < 2 * FEWEST:
        raise UserError(f"{root} holds {len(files)} picture(s); at least {2 * FEWEST} are needed: add some")
    size, wanted = options.get("size"), options.get("channels")
    if sum(file.stat().st_size for file in files) > LARGE:
        found = decode_once(root, files, size, wanted)
    else:
        found = decode_here(root, files, size, wanted)
    kept = [row for row in range(len(files)) if row not in found.unreadable]
    if len(kept) < 2 * FEWEST:
        first = next(iter(found.unreadable.items()))
        raise UserError(
            f"{root} holds {len(kept)} picture(s) that can be read, of {len(files)}; at least {2 * FEWEST} are needed "
            f"({_relative(files[first[0]], root)}: {first[1]})"
        )
    tell_left_out(name, len(files), ((_relative(files[row], root), why) for row, why in found.unreadable.items()))
    return images_from_bytes(
        name,
        found.pixels,
        torch.tensor(labels) if classes else None,
        rows=torch.tensor(kept),
        classes=classes,
        flip=options.get("flip", False),
        held_out=options.get("held_out", HELD_OUT),
    )


def find_pictures(root: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """(files in the order of their names, label of each, names of the classes: () where there are no sub-folders).

    A sub-folder is a class, with all that lies below it; one without pictures is none. Names that begin with a dot,
    and files whose suffix is no picture's, are passed over.

    Raises:
        UserError: for no pictures, one class, or pictures both beside and in sub-folders.
    """
    try:
        beside = sorted((path for path in root.iterdir() if _is_picture(path)), key=os.fspath)
        folders = sorted((path for path in root.iterdir() if _is_class(path)), key=os.fspath)
        inside = {folder.name: found for folder in folders if (found := list(_below(folder)))}
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror or error}") from error
    if beside and inside:
        raise UserError(
            f"{root} has pictures beside class folders ({beside[0].name}, {next(iter(inside))}/): "
            "move them into a class, or the classes elsewhere"
        )
    if beside:
        return beside, [], ()
    if not inside:
        raise UserError(f"{root} holds no pictures: give a folder of pictures, or of one sub-folder for each class")
    if len(inside) == 1:
        only = next(iter(inside))
        raise UserError(f"{root} has one class ({only}): name that folder instead, folder:{root / only}")
    files = [file for found in inside.values() for file in found]
    labels = [label for label, found in enumerate(inside.values()) for _ in found]
    # A folder may be named in other bytes than UTF-8, which no report could show.
    return files, labels, tuple(name.encode(errors="backslashreplace").decode() for name in inside)


def decode_here(root: Path, files: list[Path], size: int | None, channels: int | None) -> Pictures:
    """Decode in this process, into memory."""
    shape, unreadable = _shape(root, files, size, channels)
    total = total_memory(torch.device("cpu"))
    if total is not None and len(files) * math.prod(shape) > total:
        raise UserError(
            f"{len(files)} pictures of {shape[1]}x{shape[0]} do not fit into the memory: choose a smaller ?size="
        )
    pixels = np.zeros((len(files), *shape), np.uint8)
    for row, file in enumerate(files):
        if row in unreadable:
            continue
        try:
            pixels[row] = decoding.decode(file, size, shape[2])
        except decoding.UnreadableError as error:
            unreadable[row] = str(error)
    return Pictures(pixels, dict(sorted(unreadable.items())))


def decode_once(root: Path, files: list[Path], size: int | None, channels: int | None) -> Pictures:
    """Decode by worker processes into the cache folder, unless that is done.

    They are found again by a hash of the names, sizes and times of all files and of what was asked for.
    """
    listing = [(_relative(file, root), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def fill(room: Callable[[tuple[int, ...]], np.ndarray]) -> dict[int, str]:
        shape, unreadable = _shape(root, files, size, channels)
        rows = [row for row in range(len(files)) if row not in unreadable]
        return unreadable | decode_files(files, rows, room(shape), size)

    return cached_pictures(["folder", size, channels, listing], len(files), fill)


def _shape(
    root: Path, files: list[Path], size: int | None, channels: int | None
) -> tuple[tuple[int, int, int], dict[int, str]]:
    """((height, width, channels) of every picture, reason by row for files that are none), from the files' heads.

    Raises:
        UserError: if no size is given and the pictures are not square and alike.
    """
    unreadable: dict[int, str] = {}
    sizes: dict[tuple[int, int], Path] = {}
    grey = True
    for row, file in enumerate(files):
        try:
            one, is_grey = decoding.read_head(file)
        except decoding.UnreadableError as error:
            unreadable[row] = str(error)
            continue
        sizes.setdefault(one, file)
        grey = grey and is_grey
    depth = channels or (1 if grey else 3)
    if size is not None or not sizes:
        return (size or 1, size or 1, depth), unreadable
    (width, height), *others = sizes
    if others or width != height:
        shown = ", ".join(f"{_relative(file, root)} {w}x{h}" for (w, h), file in list(sizes.items())[:2])
        found = f"{len(sizes)} different sizes" if others else "one size that is not square"
        raise UserError(f"{root} has pictures of {found} ({shown}): choose a side, e.g. folder:{root}?size=32")
    return (height, width, depth), unreadable


def _below(folder: Path) -> Iterator[Path]:
    """The pictures in a folder and below, in the order of their names."""
    for path in sorted(folder.iterdir(), key=os.fspath):
        if _is_picture(path):
            yield path
        elif path.is_dir() and not path.is_symlink() and not _is_hidden(path):
            yield from _below(path)


def _is_picture(path: Path) -> bool:
    return not _is_hidden(path) and path.suffix.lower() in decoding.suffixes() and path.is_file()


def _is_class(path: Path) -> bool:
    """Whether it is a folder, or a link to one that does not hold it: that would hold every picture once more."""
    if not path.is_dir() or _is_hidden(path):
        return False
    holder = path.parent.resolve()
    return path.resolve() not in (holder, *holder.parents)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
