"""Closed forms for Gaussian data, and small fields, that the tests share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def column(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) against samples (B, ...): written anew, so that the package's own helper is under test."""
    return t.view([-1] + [1] * (x.dim() - 1))


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2 I) on the path x_t = (1 - t) x + t n; called, it is their velocity field."""

    mean: float = 0.7
    std: float = 0.4

    def variance(self, t: Tensor) -> Tensor:
        return (1 - t) ** 2 * self.std**2 + t**2

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        slope = (t - (1 - t) * self.std**2) / self.variance(t)
        return slope * (x - (1 - t) * self.mean) - self.mean

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return -(x - (1 - t) * self.mean) / self.variance(t)

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t], by the rule for jointly normal variables: shares nothing with the velocity."""
        gain = (1 - t) * self.std**2 / self.variance(t)
        return self.mean + gain * (x - (1 - t) * self.mean)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.mean + self.std * torch.randn(*shape, dtype=dtype)

    def kl_from(self, other: Gaussian) -> float:
        """KL(other || self)."""
        ratio = other.std**2 / self.std**2
        return 0.5 * (ratio + (other.mean - self.mean) ** 2 / self.std**2 - 1 - float(torch.tensor(ratio).log()))

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        return self.velocity(x, column(t, x))


@dataclass
class Recorder:
    """A field around a field that writes down how it was called."""

    inner: Any
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        self.calls.append({"x": x, "t": t, "r": r, "cond": cond, "grad": torch.is_grad_enabled()})
        return self.inner(x, t, r)


class MLP(nn.Module):
    """(x, t) -> velocity, for x (B, D)."""

    def __init__(self, size: int = 2, width: int = 32) -> None:
        super().__init__()
        layers = [nn.Linear(size + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, size))

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        return self.net(torch.cat([x, t[:, None].to(x.dtype)], dim=-1))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own for whatever a case draws."""
    return torch.Generator().manual_seed(seed)
