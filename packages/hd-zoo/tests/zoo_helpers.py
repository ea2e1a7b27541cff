"""Closed forms for Gaussian data, and small helpers that the tests share; independent of the package."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn


def column(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) against samples (B, ...): written anew, so that the package's own helper is under test."""
    return t.view([-1] + [1] * (x.dim() - 1))


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2 I) on the path x_t = (1 - t) x + t eps, as fields of the package's contract."""

    mean: float = 0.7
    std: float = 0.4

    def sigma(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def position(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """x_r on the trajectory through x at time t; times broadcast."""
        return (1 - r) * self.mean + self.sigma(r) / self.sigma(t) * (x - (1 - t) * self.mean)

    def teacher(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        """v(x, t); ignores r."""
        t = column(t, x)
        slope = (t - (1 - t) * self.std**2) / self.sigma(t) ** 2
        return slope * (x - (1 - t) * self.mean) - self.mean

    def student(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        """u(x, r, t) = (x_t - x_r) / (t - r) where r is given."""
        if r is None:
            return self.teacher(x, t)
        t, r = column(t, x), column(r, x)
        return (x - self.position(x, t, r)) / (t - r)

    def data_prediction(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """E[data | x_t] by Gaussian conditioning."""
        t = column(t, x)
        gain = (1 - t) * self.std**2 / self.sigma(t) ** 2
        return self.mean + gain * (x - (1 - t) * self.mean)

    def noise_prediction(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """E[eps | x_t] by Gaussian conditioning."""
        t = column(t, x)
        return t / self.sigma(t) ** 2 * (x - (1 - t) * self.mean)


GAUSSIAN = Gaussian()


@dataclass
class Recorder:
    """A field around a field that writes down how it was called."""

    inner: Any
    calls: list[dict[str, Any]] = field(default_factory=list)
    takes_r: bool = True

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        self.calls.append({"x": x, "t": t, "r": r, "cond": cond, "grad": torch.is_grad_enabled()})
        return self.inner(x, t, r, **cond)


Network = TypeVar("Network", bound=nn.Module)


def randomised(module: Network, std: float = 0.1) -> Network:
    """The same module, every parameter moved away from its start: nothing hides behind zero-initialised layers."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


def draw_batch(
    network: Any, count: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(x, t, r, labels) for a network of the package, 0.05 < r < t < 0.95."""
    x = torch.randn(count, *network.sample_shape, dtype=dtype)
    t = torch.linspace(0.4, 0.9, count, dtype=dtype)
    r = torch.linspace(0.1, 0.6, count, dtype=dtype) * t
    labels = torch.arange(count) % network.classes if network.classes else None
    return x, t, r, labels
