"""Noise levels t at which two distributions are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LevelSampler(Protocol):
    """``sample(batch, generator, device) -> t``, float32 of shape (batch,) in [0, 1]."""

    def sample(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor: ...


def shift_levels(t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t): s > 1 moves levels towards noise, s < 1 towards data; keeps ends and order.

    The time shift of rectified flow at higher resolution (arXiv 2403.03206, eq. 23).
    """
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True, kw_only=True)
class UniformLevels:
    """t ~ U[low, high], then shifted. DMD2 (arXiv 2405.14867) draws from U[0.02, 0.98]."""

    low: float = 0.02
    """lowest level, in [0, high)"""
    high: float = 0.98
    """highest level, in (low, 1]"""
    shift: float = 1.0
    """time shift s > 0, see :func:`shift_levels`; it acts on the share of the way from low to high"""

    def __post_init__(self) -> None:
        _check(self.low, self.high, self.shift)

    def sample(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """float32 of shape (batch,), drawn on the generator's device, then moved to ``device``."""
        share = torch.rand(batch, generator=generator, device=_device(generator, device))
        return (self.low + (self.high - self.low) * shift_levels(share, self.shift)).to(device)


@dataclass(frozen=True, kw_only=True)
class LogitNormalLevels:
    """t = sigmoid(N(mean, std^2)) between low and high, then shifted."""

    mean: float = 0.0
    """mean of the normal before the sigmoid"""
    std: float = 1.0
    """its standard deviation, > 0"""
    low: float = 0.02
    """lowest level, in [0, high)"""
    high: float = 0.98
    """highest level, in (low, 1]"""
    shift: float = 1.0
    """time shift s > 0, see :func:`shift_levels`; it acts on the share of the way from low to high"""

    def __post_init__(self) -> None:
        _check(self.low, self.high, self.shift)
        if self.std <= 0:
            raise ValueError(f"std must be > 0; got {self.std}")

    def sample(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """float32 of shape (batch,), drawn on the generator's device, then moved to ``device``."""
        normal = torch.randn(batch, generator=generator, device=_device(generator, device))
        share = torch.sigmoid(self.mean + self.std * normal)
        return (self.low + (self.high - self.low) * shift_levels(share, self.shift)).to(device)


def _check(low: float, high: float, shift: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"levels must satisfy 0 <= low < high <= 1; got low = {low}, high = {high}")
    if shift <= 0:
        raise ValueError(f"shift must be > 0; got {shift}")


def _device(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device | str | None:
    return device if generator is None else generator.device
