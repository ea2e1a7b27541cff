"""Where on the square 0 <= r <= t <= 1 a loss is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hd_meanflow.checks import check_finite, check_flag, check_positive, check_share


class TimeSampler(Protocol):
    """``sample(batch, generator, device) -> (t, r)``, float32 of shape (batch,) with 0 <= r <= t <= 1."""

    def sample(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class LogitNormalTimes:
    """t, r = max, min of two draws sigmoid(N(mean, std^2)) [MeanFlow, arXiv 2505.13447, section 4].

    The number of samples with r != t is ``round(interval_share * batch)`` exactly, not a coin per sample:
    every worker of a parallel run then does the same work (and a batch of one or two may have none). They are
    the first ones of the batch; the data behind them is shuffled. Samples with r = t take a single draw
    unless ``larger_at_r_equal_t`` is set.
    """

    mean: float = -0.4
    """mean of the normal before the sigmoid, finite"""
    std: float = 1.0
    """its standard deviation, > 0 and finite"""
    interval_share: float = 0.25
    """share of the samples with r != t, in [0, 1]; the others have r = t and are plain flow matching"""
    endpoint_share: float = 0.0
    """share of those that are set to (r, t) = (0, 1), the interval of one-step sampling, in [0, 1] [ours]"""
    larger_at_r_equal_t: bool = False
    """at r = t, take the larger of two draws, as MeanFlow's published code does, in place of one draw [ours]"""

    def __post_init__(self) -> None:
        check_finite("mean", self.mean)
        check_positive("std", self.std)
        check_share("interval_share", self.interval_share)
        check_share("endpoint_share", self.endpoint_share)
        check_flag("larger_at_r_equal_t", self.larger_at_r_equal_t)

    def sample(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(t, r), float32 of shape (batch,); drawn on the generator's device, then moved to ``device``."""
        draws = torch.randn(2, batch, generator=generator, device=_device(generator, device))
        return _pair(torch.sigmoid(self.mean + self.std * draws), self, device)


@dataclass(frozen=True, kw_only=True)
class UniformTimes:
    """t, r = max, min of two draws U[0, 1]; shares as in :class:`LogitNormalTimes`."""

    interval_share: float = 0.25
    """share of the samples with r != t, in [0, 1]; the others have r = t and are plain flow matching"""
    endpoint_share: float = 0.0
    """share of those that are set to (r, t) = (0, 1), the interval of one-step sampling, in [0, 1] [ours]"""
    larger_at_r_equal_t: bool = False
    """at r = t, take the larger of two draws, as MeanFlow's published code does, in place of one draw [ours]"""

    def __post_init__(self) -> None:
        check_share("interval_share", self.interval_share)
        check_share("endpoint_share", self.endpoint_share)
        check_flag("larger_at_r_equal_t", self.larger_at_r_equal_t)

    def sample(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(t, r), float32 of shape (batch,); drawn on the generator's device, then moved to ``device``."""
        draws = torch.rand(2, batch, generator=generator, device=_device(generator, device))
        return _pair(draws, self, device)


def _pair(
    draws: Tensor, times: LogitNormalTimes | UniformTimes, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Two rows of draws (2, B) -> (t, r) with the exact counts of r != t and of (0, 1)."""
    batch = draws.shape[1]
    intervals = round(times.interval_share * batch)
    endpoints = round(times.endpoint_share * intervals)
    # Without an interval there is one time only: its law is that of a single draw, not of a maximum.
    t = draws.amax(dim=0) if times.larger_at_r_equal_t else draws[0].clone()
    r = t.clone()
    t[:intervals] = draws[:, :intervals].amax(dim=0)
    r[:intervals] = draws[:, :intervals].amin(dim=0)
    t[:endpoints], r[:endpoints] = 1.0, 0.0
    return t.to(device), r.to(device)


def _device(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device | str | None:
    return device if generator is None else generator.device
