"""``fashion``: Fashion-MNIST (arXiv 1708.07747, MIT licence), from four IDX files that are already on this machine."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from hd_trainer.data.byte_images import from_rows
from hd_trainer.data.dataset import Dataset
from hd_trainer.data.source import a_switch, existing, split_options
from hd_trainer.errors import UserError

#: Where Debian's package dataset-fashion-mnist puts them.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

_HOW_TO_GET_IT = (
    "install it with: apt-get install dataset-fashion-mnist; or, without root: apt-get download dataset-fashion-mnist "
    "&& dpkg -x dataset-fashion-mnist_*.deb DIR, then fashion:DIR/usr/share/datasets/fashion-mnist"
)


def load_fashion(text: str) -> Dataset:
    """60,000 training and 10,000 held-out images, grey, 28x28; of ``FOLDER?flip=true``, no folder: Debian's.

    Raises:
        UserError: if the files are not there, with the command that gets them, or are damaged.
    """
    place, options = split_options("fashion", text, {"flip": a_switch})
    folder = existing("fashion", place, "folder") if place else DEBIAN
    if not place and not folder.is_dir():
        raise UserError(f"Fashion-MNIST is not in {DEBIAN}; {_HOW_TO_GET_IT}")
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
        labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), dimensions=1)
        if len(images) != len(labels):
            raise UserError(f"{folder}: {part} has {len(images)} images and {len(labels)} labels")
        parts.append((images, labels))
    (train, train_labels), (test, test_labels) = parts
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"{folder}: train has images {train.shape[1:]}, t10k {test.shape[1:]}")
    rows = torch.arange(len(train) + len(test))
    return from_rows(
        "fashion",
        np.concatenate([train, test])[..., None],
        rows[: len(train)],
        rows[len(train) :],
        torch.from_numpy(np.concatenate([train_labels, test_labels])).long(),
        classes=CLASSES,
        flip=options.get("flip", False),
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file of bytes, gzip or not: two zeros, 8, the number of dimensions, each as 4 bytes, data.

    Raises:
        UserError: if it is no such file, or its length is another.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4 + 4 * dimensions)
            shape = tuple(int(side) for side in np.frombuffer(head[4:], ">u4"))
            size = math.prod(shape)
            if head[:4] != bytes([0, 0, 8, dimensions]) or len(shape) != dimensions or size > 1 << 32:
                raise UserError(f"{path} is no IDX file of bytes in {dimensions} dimension(s)")
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error, ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error}); get it again") from error
    if len(content) != size:
        raise UserError(f"{path} is damaged: it must hold {size} bytes of data; get it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(f"{folder} has no {name}.gz; {_HOW_TO_GET_IT}")
