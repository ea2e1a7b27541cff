"""The one contract every network of the project keeps: a field takes ``(x, t, r)`` and returns a velocity."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Field(Protocol):
    """A (mean) velocity field on the linear path ``x_t = (1 - t) x + t eps``; t = 0 is data, t = 1 is noise.

    ``field(x, t, r=None, **cond)`` takes ``x`` of shape (B, ...), ``t`` and ``r`` of shape (B,) with
    ``0 <= r <= t <= 1`` and returns a tensor of x's shape: the mean velocity over [r, t], or the
    instantaneous velocity at t where ``r`` is None (or equal to t). A teacher ignores ``r``. Every tensor in
    ``cond`` has the batch as its first dimension.
    """

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, /, **cond: Any) -> Tensor: ...


def expand_times(t: Tensor, x: Tensor) -> Tensor:
    """Shape (B,) -> (B, 1, ...) with x's number of dimensions, so that ``t * x`` broadcasts over the batch."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"times must have shape ({x.shape[0]},), one per sample; got {tuple(t.shape)}")
    return t.reshape(-1, *(1,) * (x.ndim - 1))
