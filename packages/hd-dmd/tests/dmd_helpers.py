"""Closed forms for Gaussian data, and small fields, that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


class AttentionUNet(nn.Module):
    """A small UNet: x (B, 3, H, W) with even H and W -> the same shape; attention at half the resolution.

    After the attention the channels come last in memory, as in many published UNets: GroupNorm then sees a tensor
    that is not contiguous.
    """

    def __init__(self, width: int = 8, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.enter, self.time = nn.Conv2d(3, width, 3, padding=1), nn.Linear(3, width)
        self.norm_down, self.down = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_middle, self.middle = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm_up, self.leave = nn.GroupNorm(2, 2 * width), nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        gap = torch.zeros_like(t) if r is None else t - r
        skip = self.enter(x) + self.time(torch.stack([t.sin(), t.cos(), gap], dim=-1).to(x.dtype))[:, :, None, None]
        h = self.down(F.silu(self.norm_down(skip)))
        height = h.shape[2]
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2).chunk(3, dim=1)
        tokens = tokens + self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = tokens.transpose(1, 2).unflatten(2, (height, -1))
        h = self.middle(F.silu(self.norm_middle(h)))
        return self.leave(F.silu(self.norm_up(torch.cat([skip, F.interpolate(h, scale_factor=2.0)], dim=1))))


def diffusers_unet() -> nn.Module:
    """diffusers' UNet2DModel with attention as a field of this project; the test is skipped where it is missing."""
    diffusers = pytest.importorskip("diffusers")

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = diffusers.UNet2DModel(
                sample_size=8,
                layers_per_block=1,
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=4,
                attention_head_dim=4,
            )

        def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
            return self.inner(x, t if r is None else t + r).sample

    return UNet()


UNETS: dict[str, Callable[[], nn.Module]] = {"written here": AttentionUNet, "diffusers": diffusers_unet}


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own for whatever a case draws."""
    return torch.Generator().manual_seed(seed)
