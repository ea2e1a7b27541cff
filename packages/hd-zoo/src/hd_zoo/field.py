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


class Described(Protocol):
    """What a network says about itself. Trainers, converters and samplers read these four names and no others.

    The networks of this package have them. :class:`hd_zoo.Guidance` and the converters repeat what the network inside
    says; a name that it lacks is missing on them too (AttributeError).

    Attributes:
        sample_shape: of one sample, without the batch: (channels, height, width), or (features,).
        classes: number of classes, 0 for a network that takes no labels.
        null_label: the label that stands for "no class", None where there are no labels.
        takes_r: True for a network that uses r, such as a student's mean velocity; False for one that ignores r.
            A converter that is called with r around a network without this name raises ValueError.
    """

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    @property
    def classes(self) -> int: ...

    @property
    def null_label(self) -> int | None: ...

    @property
    def takes_r(self) -> bool: ...


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
