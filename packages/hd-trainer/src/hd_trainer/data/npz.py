"""``npz:FILE``: a NumPy archive of images, memory-mapped where it is not compressed. No pickle is read."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hd_trainer.data.byte_images import HELD_OUT, images_from_bytes
from hd_trainer.data.dataset import Dataset
from hd_trainer.data.source import a_share, a_switch, existing, split_options
from hd_trainer.errors import UserError

OPTIONS = {"flip": a_switch, "held_out": a_share}

#: Names of the arrays, the first that is there; ``arr_0`` and ``arr_1`` are what np.savez and ADM's samples use.
IMAGES, LABELS, CLASSES = ("images", "arr_0"), ("labels", "arr_1"), "classes"
MOST_CLASSES = 100_000
_FAULTS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, KeyError, EOFError, MemoryError, SyntaxError, zlib.error, zipfile.BadZipFile),
    *(NotImplementedError, RuntimeError, TypeError, OverflowError),
)


def load_npz(text: str) -> Dataset:
    """The data set of ``FILE?flip=true&held_out=0.1``.

    Raises:
        UserError: for a file that is damaged, or arrays of another kind.
    """
    place, options = split_options("npz", text, OPTIONS)
    path = existing("npz", place, "file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except _FAULTS as error:
        raise UserError(f"{path} is no .npz archive ({str(error)[:100]})") from error
    if (images := next((name for name in IMAGES if name in names), None)) is None:
        found = ", ".join(sorted(names)[:5]) or "nothing"
        raise UserError(f"{path} needs an array {' or '.join(IMAGES)}; it holds {found}")
    pixels = as_pixels(path, read_array(path, images))
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    if (key := next((name for name in LABELS if name in names), None)) is not None:
        labels = _labels(path, key, read_array(path, key), len(pixels))
        classes = tuple(str(one) for one in range(int(labels.max()) + 1)) if len(labels) else ()
    if labels is not None and CLASSES in names:
        classes = _names(path, read_array(path, CLASSES), len(classes))
    return images_from_bytes(
        f"npz:{path.stem}",
        pixels,
        labels,
        classes=classes,
        flip=options.get("flip", False),
        held_out=options.get("held_out", HELD_OUT),
    )


def read_array(path: Path, name: str) -> np.ndarray:
    """An array of the archive: a read-only memory map if it is stored as it is, else read into memory.

    Raises:
        UserError: if it is damaged or holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{name}.npy")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, in_columns, dtype = read(file)
                offset = file.tell()
            if dtype.hasobject or entry.file_size != offset + math.prod(shape) * dtype.itemsize:
                raise ValueError("an array of Python objects, or one that is cut short")
            if entry.compress_type != zipfile.ZIP_STORED or not math.prod(shape):
                with archive.open(entry) as file:
                    array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
                    return array
    except _FAULTS as error:
        raise UserError(f"{path}: the array {name} cannot be read ({str(error)[:100]})") from error
    with open(path, "rb") as plain:
        plain.seek(entry.header_offset + 26)  # in the file itself the lengths of name and extra field may be others
        name_length, extra_length = np.frombuffer(plain.read(4), "<u2").tolist()
    start = entry.header_offset + 30 + name_length + extra_length + offset
    return np.memmap(path, dtype, "r", start, shape, "F" if in_columns else "C")


def as_pixels(path: Path, images: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8, a view of (N, H, W), (N, C, H, W) or (N, H, W, C).

    Raises:
        UserError: for another shape or dtype.
    """
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: images must be uint8; got {images.dtype}: convert them, or write a function (images_from_arrays)"
        )
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return np.moveaxis(images, 1, 3)
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images
    raise UserError(f"{path}: images must be (N, H, W), (N, C, H, W) or (N, H, W, C), C of 1 or 3; got {images.shape}")


def _labels(path: Path, name: str, labels: np.ndarray, number: int) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (number,):
        raise UserError(f"{path}: {name} must be {number} integers; got {labels.dtype} {labels.shape}")
    if number and not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
        raise UserError(f"{path}: {name} must lie in 0..{MOST_CLASSES - 1}; got {labels.min()}..{labels.max()}")
    if number and int(labels.min()) == int(labels.max()):
        raise UserError(f"{path}: {name} hold one class, {labels.min()}: leave them out of the file")
    return torch.from_numpy(labels.astype(np.int64))


def _names(path: Path, names: np.ndarray, number: int) -> tuple[str, ...]:
    if names.dtype.kind != "U" or names.ndim != 1 or len(names) < number:
        raise UserError(
            f"{path}: {CLASSES} must name at least {number} classes, as text; got {names.dtype} {names.shape}"
        )
    return tuple(str(name) for name in names)
