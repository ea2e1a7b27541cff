"""The transformer's forward pass against one written out anew, its patches and its positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_helpers import draw_batch, randomised

from hd_zoo import DiffusionTransformer
from hd_zoo.networks.transformer import grid_embedding

SIZES = {"image_size": 8, "channels": 3, "patch": 2, "width": 16, "depth": 2, "num_heads": 4, "frequencies": 8}


def build(**changes: Any) -> DiffusionTransformer:
    return DiffusionTransformer(**{**SIZES, "classes": 5, **changes})


def plain_forward(
    state: dict[str, Tensor], x: Tensor, t: Tensor, gap: Tensor | None, labels: Tensor, activation: str
) -> Tensor:
    """The network written out over its state dict with loops, index arithmetic and an explicit softmax."""

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(h: Tensor) -> Tensor:
        return h / (1 + (-h).exp())

    def gelu(h: Tensor) -> Tensor:
        return h / 2 * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())

    def norm(h: Tensor) -> Tensor:
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def embed(name: str, times: Tensor) -> Tensor:
        half = state[f"{name}.mlp.0.weight"].shape[1] // 2
        angles = [times * 10_000 ** (-i / half) for i in range(half)]
        waves = torch.stack([a.cos() for a in angles] + [a.sin() for a in angles], dim=1)
        return linear(f"{name}.mlp.2", silu(linear(f"{name}.mlp.0", waves)))

    patch, heads = SIZES["patch"], SIZES["num_heads"]
    batch, channels, size, _ = x.shape
    grid = size // patch
    condition = embed("time_embed", t) + state["label_embed.weight"][labels]
    if gap is not None:
        condition = condition + embed("interval_embed", gap)
    patches = [
        x[:, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)].permute(0, 2, 3, 1).reshape(batch, -1)
        for i in range(grid)
        for j in range(grid)
    ]
    h = linear("patch_embed", torch.stack(patches, dim=1)) + state["positions"]
    for b in range(SIZES["depth"]):
        parts = linear(f"blocks.{b}.modulation.1", silu(condition))[:, None].chunk(6, dim=-1)
        q, k, v = linear(f"blocks.{b}.attn.qkv", norm(h) * (1 + parts[1]) + parts[0]).chunk(3, dim=-1)
        out = []
        for piece in range(heads):
            cut = slice(piece * q.shape[-1] // heads, (piece + 1) * q.shape[-1] // heads)
            scores = q[..., cut] @ k[..., cut].transpose(1, 2) / math.sqrt(q.shape[-1] / heads)
            share = scores.exp() / scores.exp().sum(-1, keepdim=True)
            out.append(share @ v[..., cut])
        h = h + parts[2] * linear(f"blocks.{b}.attn.proj", torch.cat(out, dim=-1))
        curve = {"gelu_tanh": gelu, "silu": silu}[activation]
        inner = curve(linear(f"blocks.{b}.mlp.0", norm(h) * (1 + parts[4]) + parts[3]))
        h = h + parts[5] * linear(f"blocks.{b}.mlp.2", inner)
    shift, scale = linear("head.modulation.1", silu(condition))[:, None].chunk(2, dim=-1)
    tokens = linear("head.linear", norm(h) * (1 + scale) + shift)
    image = torch.zeros_like(x)
    for n in range(grid * grid):
        i, j = divmod(n, grid)
        block = tokens[:, n].reshape(batch, patch, patch, channels).permute(0, 3, 1, 2)
        image[:, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)] = block
    return image


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
@pytest.mark.parametrize("r_embedding", [None, "added"])
def test_equals_an_independent_forward_pass(r_embedding: str | None, activation: str) -> None:
    network = randomised(build(r_embedding=r_embedding, activation=activation).double(), std=0.2)
    x, t, r, labels = draw_batch(network, dtype=torch.float64)
    for second in (None, r):
        gap = None if r_embedding is None else torch.zeros_like(t) if second is None else t - second
        expected = plain_forward(network.state_dict(), x, t, gap, labels, activation)
        found = network(x, t, second, labels=labels)
        assert found.std() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_come_back_where_they_were(patch: int) -> None:
    """With identity embedding and head, and blocks gated off, only patchify and unpatchify are left."""
    width = 3 * patch * patch * 4
    network = build(patch=patch, width=width, num_heads=2).double()
    side = 3 * patch * patch
    with torch.no_grad():
        network.patch_embed.weight.copy_(torch.eye(width, side))
        network.positions.zero_()
        network.head.linear.weight.copy_(torch.eye(side, width))
    network.head.norm = nn.Identity()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(network(x, torch.rand(2).double()), x)


def test_positions_are_dits() -> None:
    """Column in the first half of the channels, row in the second; in each, sines before cosines."""
    width, height, columns = 16, 3, 5
    table = grid_embedding(width, height, columns)
    assert table.shape == (height * columns, width)
    for row in range(height):
        for col in range(columns):
            expected = []
            for position in (col, row):
                angles = [position / 10_000 ** (i / (width / 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * columns + col], torch.tensor(expected))
