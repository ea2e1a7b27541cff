"""What all stages share: the run's surroundings and the draws of one step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hd_zoo
from hd_trainer.data import ImageData, batch_at
from hd_trainer.device import Precision, autocast
from hd_trainer.errors import UserError

GRID_ROWS = 6


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where a stage runs and on what."""

    data: ImageData
    device: torch.device
    precision: Precision
    seed: int

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """A fresh autocast context. Leaving it drops its cache of casts: use one for each forward pass that trains."""
        return autocast(self.device, self.precision)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Images (size, C, H, W) and labels (size,) of a step, on the device."""
        index = batch_at(step, size, len(self.data.train), self.seed)
        return self.data.train[index].to(self.device), self.data.train_labels[index].to(self.device)

    def noise(self, size: int, generator: torch.Generator) -> Tensor:
        """Standard normal (size, C, H, W), drawn on the CPU whatever the device, so that a seed means one thing."""
        return torch.randn(size, *self.data.shape, generator=generator).to(self.device)

    def grid_inputs(self) -> tuple[Tensor, Tensor]:
        """Noise and labels of the sample grids: one column for each class, the same in every stage."""
        labels = torch.arange(len(self.data.classes)).repeat(GRID_ROWS)
        noise = hd_zoo.seeded_noise(self.data.shape, range(len(labels)))
        return noise.to(self.device), labels.to(self.device)


def guided(field: nn.Module, scale: float, interval: tuple[float, float]) -> nn.Module:
    """The teacher with classifier-free guidance on its labels; the field itself where scale is 1."""
    if scale == 1:
        return field
    if field.null_label is None:
        raise UserError(f"guidance scale {scale} needs a class-conditional network; use 1")
    return hd_zoo.Guidance(field, scale, interval, null={"labels": field.null_label})


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, what draws from the global generator is a function of the seed; afterwards it stands where it stood."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def seeded_student(network: nn.Module, seed: int) -> nn.Module:
    """A trainable student that starts as ``network``'s copy; the new embedding's first layer is a function of the seed.

    The global generator is left alone: a run that is stopped before its first checkpoint starts again as it did.
    """
    with seeded(seed):
        return hd_zoo.to_student(network).requires_grad_(True).train()


def check_guidance(scale: float, interval: tuple[float, float]) -> None:
    """Raise UserError unless scale is >= 0 and finite, and 0 <= low <= high <= 1."""
    if not 0 <= scale < math.inf:
        raise UserError(f"guidance_scale must be >= 0 and finite; got {scale}")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"guidance_interval must satisfy 0 <= low <= high <= 1; got {interval}")


def check_positive(**values: float) -> None:
    """Raise UserError naming the first value that is not > 0 and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be > 0 and finite; got {value}")


def load_network(folder: Path, data: ImageData, device: torch.device) -> nn.Module:
    """A frozen network of hd_zoo from its folder, checked against the data.

    Raises:
        UserError: if it is missing, damaged or made for other images.
    """
    try:
        network: Any = hd_zoo.from_pretrained(folder, device=device)
    except FileNotFoundError as error:
        raise UserError(f"{error}; train that stage first, or name another folder") from error
    except ValueError as error:
        raise UserError(f"{error}; train that stage again, or name another folder") from error
    if tuple(network.sample_shape) != data.shape or network.classes != len(data.classes):
        raise UserError(
            f"the network in {folder} is for images {tuple(network.sample_shape)} of {network.classes} classes, "
            f"the data set {data.name!r} has {data.shape} and {len(data.classes)}"
        )
    return network.requires_grad_(False)


def save_network(average: nn.Module, like: nn.Module, folder: Path, **metadata: Any) -> None:
    """Write a moving average's weights as a network of hd_zoo."""
    average.architecture, average.arguments = like.architecture, like.arguments
    hd_zoo.save_pretrained(average, folder, metadata=metadata)


def check_shares(**values: float) -> None:
    """Raise UserError naming the first value outside [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} must lie in [0, 1]; got {value}")
