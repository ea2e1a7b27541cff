"""The contract between the losses and a network, and the checks that make a broken one loud."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

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


def check_output(output: Tensor, x: Tensor, name: str) -> Tensor:
    """Return ``output`` if it has x's shape; else raise ValueError naming the field at fault."""
    if not isinstance(output, Tensor):
        raise ValueError(f"{name} must return a tensor of x's shape {tuple(x.shape)}; got {type(output).__name__}")
    if output.shape != x.shape:
        raise ValueError(f"{name} must return x's shape {tuple(x.shape)}; got {tuple(output.shape)}")
    return output
