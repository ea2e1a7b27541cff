"""The one form in which every data set reaches a stage, and a data order that is a function of the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A labelled image set in memory, split once and for all."""

    name: str
    """as in ``load_data(name)``"""
    train: Tensor
    """(N, channels, height, width) float32 in [-1, 1]: what every network is trained on, and the metrics' reference"""
    train_labels: Tensor
    """(N,) int64"""
    held_out: Tensor
    """as ``train``; seen by no network, the metric's own included"""
    held_out_labels: Tensor
    """as ``train_labels``"""
    classes: tuple[str, ...]
    """name of each class"""
    levels: int
    """grey levels of a stored pixel; generated images are rounded to them before they are measured"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image, (channels, height, width)."""
        return tuple(self.train.shape[1:])


def batch_at(step: int, batch: int, count: int, seed: int) -> Tensor:
    """Indices (batch,) of training step ``step``: a fresh shuffle of all ``count`` samples every epoch.

    A function of its arguments alone, so that a resumed run sees the very batches it would have seen.
    """
    parts, position = [], step * batch
    while batch > 0:
        epoch, offset = divmod(position, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        parts.append(order[offset : offset + batch])
        position += len(parts[-1])
        batch -= len(parts[-1])
    return torch.cat(parts)
