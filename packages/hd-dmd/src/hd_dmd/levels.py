"""Noise levels t at which two distributions are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hd_dmd.checks import check_finite, check_positive, check_share, is_finite


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
    """t ~ U[low, high], then shifted [ours].

    DMD2 (arXiv 2405.14867) draws its STEPS uniformly from 2 % to 98 %, not t: see :class:`KarrasLevels`.
    """

    low: float = 0.02
    """lowest level, in [0, high)"""
    high: float = 0.98
    """highest level, in (low, 1]"""
    shift: float = 1.0
    """time shift s > 0, see :func:`shift_levels`; it acts on the share of the way from low to high"""

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        check_positive("shift", self.shift)

    def sample(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """float32 of shape (batch,), drawn on the generator's device, then moved to ``device``."""
        share = torch.rand(batch, generator=generator, device=_device(generator, device))
        return (self.low + (self.high - self.low) * shift_levels(share, self.shift)).to(device)


@dataclass(frozen=True, kw_only=True)
class LogitNormalLevels:
    """t = sigmoid(N(mean, std^2)), squeezed into [low, high], then shifted [ours]."""

    mean: float = 0.0
    """mean of the normal before the sigmoid, finite"""
    std: float = 1.0
    """its standard deviation, > 0 and finite"""
    low: float = 0.02
    """lowest level, in [0, high)"""
    high: float = 0.98
    """highest level, in (low, 1]"""
    shift: float = 1.0
    """time shift s > 0, see :func:`shift_levels`; it acts on the share of the way from low to high"""

    def __post_init__(self) -> None:
        check_finite("mean", self.mean)
        check_positive("std", self.std)
        _check_range(self.low, self.high)
        check_positive("shift", self.shift)

    def sample(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """float32 of shape (batch,), drawn on the generator's device, then moved to ``device``."""
        normal = torch.randn(batch, generator=generator, device=_device(generator, device))
        share = torch.sigmoid(self.mean + self.std * normal)
        return (self.low + (self.high - self.low) * shift_levels(share, self.shift)).to(device)


@dataclass(frozen=True, kw_only=True)
class KarrasLevels:
    """DMD2's law on ImageNet (arXiv 2405.14867 and its published settings), as times of the linear path.

    Level i of N has EDM's sigma_i = (sigma_min^(1/rho) + i / (N - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho
    (arXiv 2206.00364, eq. 5, counted from the smallest), and i is uniform over a share of the STEPS. A sample
    x + sigma n, divided by 1 + sigma, lies on the linear path at t = sigma / (1 + sigma). The quantiles of t at
    5, 25, 50, 75 and 95 % are 0.009, 0.163, 0.716, 0.943 and 0.982: far from uniform.

    The defaults are the levels at which DMD2 updates the student. Its fake score is trained on all of them:
    ``KarrasLevels(min_step_share=0.0, max_step_share=1.0)``.
    """

    min_step_share: float = 0.02
    """where the steps begin, as a share of all, in [0, max_step_share)"""
    max_step_share: float = 0.98
    """where they end, in (min_step_share, 1]; the step at that share is included"""
    num_steps: int = 1000
    """number of levels N, >= 2"""
    sigma_min: float = 0.002
    """smallest sigma, in (0, sigma_max)"""
    sigma_max: float = 80.0
    """largest sigma, finite"""
    rho: float = 7.0
    """exponent of the spacing, > 0"""
    shift: float = 1.0
    """factor on sigma, > 0: the time shift of :func:`shift_levels`. EDM's data has standard deviation 0.5; data of
    standard deviation s has the same signal-to-noise ratios with a shift of s / 0.5"""

    def __post_init__(self) -> None:
        for name in ("min_step_share", "max_step_share"):
            check_share(name, getattr(self, name))
        for name in ("sigma_min", "sigma_max", "rho", "shift"):
            check_positive(name, getattr(self, name))
        if not isinstance(self.num_steps, int) or isinstance(self.num_steps, bool) or self.num_steps < 2:
            raise ValueError(f"num_steps must be an integer >= 2; got {self.num_steps!r}")
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min must be < sigma_max = {self.sigma_max}; got {self.sigma_min!r}")
        if self.min_step_share >= self.max_step_share:
            raise ValueError(
                f"min_step_share must be < max_step_share = {self.max_step_share}; got {self.min_step_share!r}"
            )

    def sample(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """float32 of shape (batch,), drawn on the generator's device, then moved to ``device``."""
        last = self.num_steps - 1
        low = min(round(self.min_step_share * self.num_steps), last)
        high = min(round(self.max_step_share * self.num_steps), last)
        steps = torch.randint(low, high + 1, (batch,), generator=generator, device=_device(generator, device))
        small, large = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = (small + steps / last * (large - small)) ** self.rho
        return shift_levels(sigma / (1 + sigma), self.shift).to(device)


def _check_range(low: Any, high: Any) -> None:
    if not (is_finite(low) and is_finite(high) and 0 <= low < high <= 1):
        raise ValueError(f"low and high must satisfy 0 <= low < high <= 1; got low = {low!r}, high = {high!r}")


def _device(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device | str | None:
    return device if generator is None else generator.device
