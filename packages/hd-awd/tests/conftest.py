"""Oracles and small networks that the tests share as fixtures. Nothing here uses the package under test."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


def naive_pool(
    tokens: Tensor, queries: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The definition, one sample and one query at a time, with a hand-written norm and softmax."""
    batch, num_tokens, width = tokens.shape
    full = torch.zeros(batch, len(queries), num_tokens, dtype=tokens.dtype)
    full = full if bias is None else full + bias
    mask = torch.ones(batch, num_tokens, dtype=torch.bool) if mask is None else mask
    pooled, weights = [], []
    for b in range(batch):
        centred = tokens[b] - tokens[b].sum(-1, keepdim=True) / width
        normal = centred / ((centred**2).sum(-1, keepdim=True) / width + eps).sqrt()
        for m in range(len(queries)):
            scores = (normal * queries[m]).sum(-1) + full[b, m]
            top = scores[mask[b]].max() if mask[b].any() else scores.max()
            share = (scores - top).clamp(max=0).exp() * mask[b]
            share = share / share.sum().clamp(min=1e-300)
            weights.append(share)
            pooled.append((share[:, None] * normal).sum(0))
    return (
        torch.stack(pooled).reshape(batch, len(queries), width),
        torch.stack(weights).reshape(batch, len(queries), num_tokens),
    )


class UnfoldedHead(nn.Module):
    """The attention head as the equations write it: affine norm, keys and values of every token."""

    def __init__(self, width: int, queries: int, head_width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.value = nn.Linear(width, head_width)
        self.mlp = nn.Sequential(nn.Linear(queries * head_width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.key = nn.Linear(width, head_width, bias=False)
        self.queries = nn.Parameter(torch.zeros(queries, head_width))

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm(tokens)
        keys, values = self.key(normal), self.value(normal)
        scores = keys @ self.queries.T / math.sqrt(self.queries.shape[1])  # (B, N, M)
        pooled = torch.einsum("bnm,bnd->bmd", scores.softmax(dim=1), values)
        return self.mlp(pooled.reshape(len(tokens), -1)).squeeze(1)


class ConvNet(nn.Module):
    """A frozen convolutional feature network with a residual, a tuple output and a vector at its end."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x + self.conv(x).tanh(), "skip"

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.stages = nn.ModuleList([ConvNet.Stage(), ConvNet.Stage()])
        self.last = nn.Linear(3, 4)
        self.unused = nn.Linear(3, 4)

    def forward(self, x: Tensor, t: Tensor | None = None, *, shift: Tensor | None = None) -> Tensor:
        h = self.first(x).tanh()
        if t is not None:
            h = h + t[:, None, None, None]
        for stage in self.stages:
            h, _ = stage(h)
        h = h.mean(dim=(2, 3))
        return self.last(h if shift is None else h + shift)


class TokenNet(nn.Module):
    """A two-block transformer encoder: tokens of shape (B, N, C) at every tap."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return h.mean(dim=(1, 2))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def naive() -> Callable[..., tuple[Tensor, Tensor]]:
    return naive_pool


@pytest.fixture(scope="session")
def unfolded_head() -> type[UnfoldedHead]:
    return UnfoldedHead


@pytest.fixture
def conv_net() -> ConvNet:
    return ConvNet().requires_grad_(False)


@pytest.fixture
def token_net() -> TokenNet:
    return TokenNet().requires_grad_(False)


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Gives every parameter a value of its own, so that nothing hides behind zeros and ones."""

    def change(module: nn.Module, std: float = 0.5) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(std * torch.randn_like(parameter))
        return module

    return change
