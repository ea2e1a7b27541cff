"""A data set from arrays: the shortest way to train on one's own images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hd_trainer.checks import check_number
from hd_trainer.data.dataset import FEWEST, Dataset, InMemory
from hd_trainer.engine.draws import shuffled
from hd_trainer.errors import UserError

#: A label beyond it is a slip: every class up to the largest label gets a name and a row of weights.
MAX_CLASSES = 100_000


def images_from_arrays(
    name: str,
    images: Any,
    labels: Any = None,
    *,
    classes: tuple[str, ...] | None = None,
    held_out: float = 0.1,
    grey_levels: int = 256,
    seed: int = 0,
) -> Dataset:
    """Split images at random into training and held-out ones.

    Args:
        name: of the data set.
        images: array or tensor (N, H, W), (N, C, H, W) or (N, H, W, C) with C of 1 or 3: uint8, or floating in [-1, 1].
        labels: (N,) integers from 0, or None for no classes.
        classes: their names; None: "0", "1" ... up to the largest label.
        held_out: share of the images that no network is trained on.
        grey_levels: values of a stored pixel.
        seed: of the split.

    Raises:
        UserError: for anything else, in one line.
    """
    check_number(high=0.9, above=True, held_out=held_out)
    x = _images(name, images)
    if len(x) < 2 * FEWEST:
        raise UserError(f"data set {name!r}: {len(x)} image(s); at least {2 * FEWEST} are needed")
    order = shuffled(len(x), seed)
    number = max(FEWEST, round(held_out * len(x)))
    if labels is None:
        conditions: dict[str, Tensor] = {}
        classes, null = (), {}
    else:
        numbers = _labels(name, labels, len(x))
        if classes is None:
            classes = tuple(str(label) for label in range(int(numbers.max()) + 1))
        conditions, null = {"labels": numbers}, {"labels": len(classes)}

    def take(index: Tensor) -> InMemory:
        return InMemory(x=x[index], conditions={key: value[index] for key, value in conditions.items()})

    return Dataset(
        name=name,
        train=take(order[number:]),
        held_out=take(order[:number]),
        classes=classes,
        null=null,
        grey_levels=grey_levels,
    )


def _images(name: str, images: Any) -> Tensor:
    """(N, C, H, W) float32."""
    x = _tensor(name, "images", images)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.movedim(3, 1)
    if x.ndim != 4:
        raise UserError(
            f"data set {name!r}: images must be (N, H, W), (N, C, H, W) or (N, H, W, C); got {tuple(x.shape)}"
        )
    if x.dtype == torch.uint8:
        return (x.float() / 127.5 - 1).contiguous()
    if not x.is_floating_point():
        raise UserError(f"data set {name!r}: images must be uint8, or floating in [-1, 1]; got {x.dtype}")
    return x.float().contiguous()


def _labels(name: str, labels: Any, number: int) -> Tensor:
    """(N,) int64."""
    found = _tensor(name, "labels", labels)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.shape != (number,):
        raise UserError(
            f"data set {name!r}: labels must be {number} integers, one per image; "
            f"got {found.dtype} {tuple(found.shape)}"
        )
    found = found.long()  # PyTorch knows no minimum of wide unsigned numbers
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= MAX_CLASSES:
        raise UserError(f"data set {name!r}: labels must lie in 0..{MAX_CLASSES - 1}; got {low}..{high}")
    return found


def _tensor(name: str, what: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"data set {name!r}: {what} are no array of numbers ({error})") from error
