"""Data sets: samples with their conditions, by name or from a function of one's own."""

from __future__ import annotations

from collections.abc import Callable

from hd_trainer.data.arrays import images_from_arrays
from hd_trainer.data.dataset import Batch, Dataset, InMemory, Split, grid_conditions, pictures, read_all
from hd_trainer.data.digits import load_digits
from hd_trainer.errors import UserError
from hd_trainer.user_code import call, is_function, load_function

__all__ = [
    "Batch",
    "Dataset",
    "InMemory",
    "Split",
    "grid_conditions",
    "images_from_arrays",
    "load_data",
    "load_digits",
    "pictures",
    "read_all",
]

_LOADERS: dict[str, Callable[[], Dataset]] = {"digits": load_digits}


def load_data(name: str) -> Dataset:
    """A data set by name, or what ``path/to/file.py:function`` returns (the function's name is ``data`` if not given).

    Raises:
        UserError: for an unknown name, or what a user's function did wrong.
    """
    if is_function(name):
        dataset: Dataset = call(load_function(name, default="data"), name, Dataset)
        return dataset
    if name not in _LOADERS:
        raise UserError(f"unknown data set {name!r}; known: {', '.join(sorted(_LOADERS))}, or file.py:function")
    return _LOADERS[name]()
