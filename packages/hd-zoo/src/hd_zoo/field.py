"""The one contract every network of the project keeps: a field takes ``(x, t, r)`` and returns a velocity."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Field(Protocol):
    """A (mean) velocity field on the linear path ``x_t = (1 - t) x + t eps``; t = 0 is data, t = 1 is noise.

    ``field(x, t, r=None, **cond)`` takes ``x`` of shape (B, ...), ``t`` and ``r`` of shape (B,) with
    ``0 <= r <= t <= 1`` and returns a tensor of x's shape: the mean velocity over [r, t], or the
    instantaneous velocity at t where ``r`` is None (or equal to t). A teacher ignores ``r``. Every tensor in
    ``cond`` whose first dimension is B holds one entry per sample.
    """

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, /, **cond: Any) -> Tensor: ...


def expand_times(t: Tensor, x: Tensor) -> Tensor:
    """Shape (B,) -> (B, 1, ...) with x's number of dimensions, so that ``t * x`` broadcasts."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"times must have shape ({x.shape[0]},), one per sample; got {tuple(t.shape)}")
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def check_times(x: Tensor, t: Tensor, r: Tensor | None) -> None:
    """Raise ValueError unless t, and r where it is given, hold one time per sample of x."""
    for name, times in (("t", t), ("r", r)):
        if times is not None and times.shape != x.shape[:1]:
            raise ValueError(f"{name} must have shape ({x.shape[0]},); got {tuple(times.shape)}")


def labels_or_null(labels: Tensor | None, x: Tensor, classes: int) -> Tensor:
    """Labels (B,) int64 as they are; None becomes the null class, ``classes``, for every sample.

    Values are not looked at (that would make a GPU wait): the embedding refuses those outside [0, classes].

    Raises:
        ValueError: for another shape or dtype.
    """
    if labels is None:
        return torch.full((x.shape[0],), classes, device=x.device, dtype=torch.long)
    if labels.shape != x.shape[:1] or labels.dtype != torch.long:
        raise ValueError(f"labels must be int64 of shape ({x.shape[0]},); got {labels.dtype} {tuple(labels.shape)}")
    return labels
