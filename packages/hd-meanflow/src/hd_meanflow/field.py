"""The contract between the loss and a network, and the checks that make a broken one loud."""

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


def check_interval(t: Tensor, r: Tensor) -> None:
    """Raise ValueError unless 0 <= r <= t <= 1 everywhere.

    Values are looked at on the CPU only: on an accelerator the look would stall the stream at every step.
    """
    if t.shape != r.shape:
        raise ValueError(f"t and r must have the same shape; got {tuple(t.shape)} and {tuple(r.shape)}")
    if t.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not bool(((r >= 0) & (r <= t) & (t <= 1)).all()):
        raise ValueError(
            f"times must satisfy 0 <= r <= t <= 1; got r in [{r.min():.4g}, {r.max():.4g}], "
            f"t in [{t.min():.4g}, {t.max():.4g}] and max(r - t) = {(r - t).max():.4g}"
        )


def check_output(output: Tensor, x: Tensor, name: str) -> Tensor:
    """Return ``output`` if it has x's shape; else raise ValueError naming the field at fault."""
    if not isinstance(output, Tensor):
        raise ValueError(f"{name} must return a tensor of x's shape {tuple(x.shape)}; got {type(output).__name__}")
    if output.shape != x.shape:
        raise ValueError(f"{name} must return x's shape {tuple(x.shape)}; got {tuple(output.shape)}")
    return output


def select(cond: dict[str, Any], index: Tensor, batch: int) -> dict[str, Any]:
    """The conditions of the samples in ``index``; what is not one entry per sample is passed on as it is."""

    def per_sample(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch

    return {name: value[index] if per_sample(value) else value for name, value in cond.items()}
