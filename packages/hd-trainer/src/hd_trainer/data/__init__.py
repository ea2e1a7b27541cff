"""Data sets: images in [-1, 1] with integer labels, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Callable

from hd_trainer.data.dataset import ImageData, batch_at
from hd_trainer.data.digits import load_digits
from hd_trainer.errors import UserError

__all__ = ["ImageData", "batch_at", "load_data", "load_digits"]

_LOADERS: dict[str, Callable[[], ImageData]] = {"digits": load_digits}


def load_data(name: str) -> ImageData:
    """A data set by name.

    Raises:
        UserError: for an unknown name.
    """
    if name not in _LOADERS:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(sorted(_LOADERS))}")
    return _LOADERS[name]()
