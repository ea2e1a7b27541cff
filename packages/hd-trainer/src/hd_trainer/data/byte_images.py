"""Images kept as bytes, in memory or memory-mapped: a batch becomes float32 when it is read, never the whole set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hd_trainer.data.dataset import FEWEST, Batch, Dataset
from hd_trainer.engine.draws import shuffled
from hd_trainer.errors import UserError

#: Seed and share of the split into training and held-out images, where a source has none of its own [ours].
SPLIT_SEED, HELD_OUT = 0, 0.1


@dataclass(frozen=True, kw_only=True)
class ByteImages:
    """A split of uint8 images.

    With ``flip`` it is twice as long: sample N + i is the mirror image of sample i. An epoch then shows each image once
    as it is and once mirrored. Which of the two a batch holds is a function of the seed and the step, as its order is.
    """

    pixels: np.ndarray
    """(n, H, W, C) uint8, a memory map or any other view"""
    rows: Tensor
    """(N,) int64: which of ``pixels`` belong to this split, in its order"""
    conditions: dict[str, Tensor] = field(default_factory=dict)
    """by name, N first in each"""
    flip: bool = False
    """whether the mirror images are samples too"""
    captions: tuple[str, ...] = ()
    """a line of text for each of the N images, for those who embed text; no network of ours reads it"""

    def __post_init__(self) -> None:
        for name, value in self.conditions.items():
            if len(value) != len(self.rows):
                raise UserError(f"{len(self.rows)} samples have {len(value)} {name}: each needs one")

    def __len__(self) -> int:
        return len(self.rows) * (1 + self.flip)

    @property
    def unflipped(self) -> ByteImages:
        """The same images without the mirrored ones."""
        return ByteImages(pixels=self.pixels, rows=self.rows, conditions=self.conditions, captions=self.captions)

    def read(self, index: Tensor) -> Batch:
        """x (B, C, H, W) float32 in [-1, 1], byte b as b / 127.5 - 1; see :class:`hd_trainer.data.Split`."""
        chosen = np.moveaxis(self.pixels[self.rows[index % len(self.rows)].numpy()], 3, 1)
        x = torch.from_numpy(np.ascontiguousarray(chosen)).float().div_(127.5).sub_(1)
        mirrored = index >= len(self.rows)
        if bool(mirrored.any()):
            x[mirrored] = x[mirrored].flip(3)
        return Batch(x=x, cond=self.cond(index))

    def cond(self, index: Tensor) -> dict[str, Tensor]:
        """See :class:`hd_trainer.data.Split`."""
        return {name: value[index % len(self.rows)] for name, value in self.conditions.items()}

    def are_all_alike(self) -> bool:
        """Whether every byte is the same; reads no further than to the first that differs."""
        first = self.pixels[int(self.rows[0])].flat[0]
        return not any(bool((self.pixels[int(row)] != first).any()) for row in self.rows)


def images_from_bytes(
    name: str,
    pixels: np.ndarray,
    labels: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    classes: tuple[str, ...] = (),
    flip: bool = False,
    held_out: float = HELD_OUT,
) -> Dataset:
    """A data set from one array, split at random, the same way each time; the images are not copied.

    Args:
        name: of the data set.
        pixels: (N, H, W, C) uint8, C of 1 or 3.
        labels: (N,) int64, or None for no classes.
        rows: int64, which of the N images belong to it; None: all.
        classes: their names.
        flip: whether the mirror images are training samples too.
        held_out: share of the images that no network is trained on.

    Raises:
        UserError: for too few images, or what :class:`hd_trainer.data.Dataset` refuses.
    """
    number = len(pixels) if rows is None else len(rows)
    if number < 2 * FEWEST:
        raise UserError(f"data set {name!r}: {number} image(s); at least {2 * FEWEST} are needed: add some")
    order = shuffled(number, SPLIT_SEED)
    order = order if rows is None else rows[order]
    number = max(FEWEST, round(held_out * number))
    return from_rows(name, pixels, order[number:], order[:number], labels, classes=classes, flip=flip)


def from_rows(
    name: str,
    pixels: np.ndarray,
    train: Tensor,
    held_out: Tensor,
    labels: Tensor | None = None,
    *,
    classes: tuple[str, ...] = (),
    flip: bool = False,
    captions: tuple[str, ...] = (),
) -> Dataset:
    """As :func:`images_from_bytes`, split by the rows that are given: ``train`` and ``held_out``, int64."""

    def take(rows: Tensor, flip: bool) -> ByteImages:
        conditions = {} if labels is None else {"labels": labels[rows]}
        own = tuple(captions[row] for row in rows.tolist()) if captions else ()
        return ByteImages(pixels=pixels, rows=rows, conditions=conditions, flip=flip, captions=own)

    return Dataset(
        name=name,
        train=take(train, flip),
        held_out=take(held_out, False),
        classes=classes if labels is not None else (),
        null={} if labels is None else {"labels": len(classes)},
    )
