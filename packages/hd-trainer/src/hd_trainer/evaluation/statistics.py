"""``stats:FILE``: mean and covariance of a reference, as others publish them. A Fréchet distance needs no more."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hd_trainer.data.npz import read_array
from hd_trainer.errors import UserError
from hd_trainer.evaluation.distances import Moments
from hd_trainer.evaluation.numpy_pickle import read_pickled_arrays

#: Pairs of names under which mean and covariance lie.
NAMES = (("mu", "sigma"), ("mean", "covariance"))


def read_statistics(path: Path, width: int) -> Moments:
    """The mean and covariance of ``width`` features in a file.

    * ``.npz``: ``mu`` and ``sigma``, as ADM's reference batches, pytorch-fid's and torch-fidelity's files have them.
    * ``.pkl``: EDM2's, a pair for each metric; the one of this width is taken. Read as data: no pickle is run.
    * ``.pt``, ``.pth``: torch-fidelity's, of tensors or arrays. Read as data too.

    Raises:
        UserError: if it is missing or damaged, or holds no pair of this width.
    """
    if not path.is_file():
        raise UserError(f"stats: no file {path}")
    pairs = list(_pairs(_contents(path)))
    fitting = [pair for pair in pairs if pair[0].shape == (width,) and pair[1].shape == (width, width)]
    if len(fitting) != 1:
        found = ", ".join(str(tuple(mean.shape)) for mean, _ in pairs) or "none"
        raise UserError(f"{path} must hold one mean and covariance of {width} features; its means are of shape {found}")
    mean, covariance = fitting[0]
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise UserError(f"{path} holds numbers that are not finite")
    if not torch.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6 * float(covariance.abs().max())):
        raise UserError(f"{path}: the covariance is not symmetric")
    return Moments(mean, (covariance + covariance.T) / 2, 0)


def _contents(path: Path) -> Any:
    """What the file holds, arrays or tensors by name."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
            return {name: np.asarray(read_array(path, name)) for pair in NAMES for name in pair if name in names}
        if path.suffix in (".pt", ".pth"):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception:  # NumPy arrays in it: torch names its refusal in several ways
                return read_pickled_arrays(path)
        return read_pickled_arrays(path)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read as statistics ({str(error)[:200]}); convert it with its own library: "
            "numpy.savez('stats.npz', mu=..., sigma=...)"
        ) from error


def _pairs(value: Any, depth: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Every mean with its covariance, also of dictionaries inside."""
    if not isinstance(value, dict) or depth > 5:
        return
    for mean, covariance in NAMES:
        if mean in value and covariance in value:
            pair = [_tensor(value[name]) for name in (mean, covariance)]
            if pair[0] is not None and pair[1] is not None:
                yield pair[0], pair[1]
    for one in value.values():
        yield from _pairs(one, depth + 1)


def _tensor(value: Any) -> Tensor | None:
    """float64, or None for what is no array of numbers."""
    if isinstance(value, Tensor):
        return value.double().squeeze() if value.dtype.is_floating_point else None
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(value.astype(np.float64)).squeeze()
    return None
