"""default_layers: evenly spaced blocks of whatever the network is, and features of every layout."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from awd_helpers import ConvNet, TokenNet
from torch import Tensor, nn

from hd_awd import Discriminator, FeatureTap, as_tokens, default_layers


class Block(nn.Module):
    """A residual block that holds a longer list of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(40))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.experts[0](h).tanh()


class Transformer(nn.Module):
    """Blocks in a list or in a Sequential, beside a time embedding and a list of tables."""

    def __init__(self, depth: int, container: Any = nn.ModuleList) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(4, 8) for _ in range(50))
        self.time_embed = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        blocks = [Block() for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks) if container is nn.ModuleList else nn.Sequential(*blocks)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x + self.time_embed(t[:, None])[:, None]
        for block in self.blocks:
            h = block(h)
        return h


class UNet(nn.Module):
    """Two levels down, a middle, two up; the way down returns what the skip connections need as well."""

    class Down(nn.Module):
        def __init__(self, conv: Any, channels: int, width: int) -> None:
            super().__init__()
            self.convs = nn.ModuleList([conv(channels, width, 3, padding=1), conv(width, width, 3, padding=1)])

        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            h = self.convs[0](h).tanh()
            return self.convs[1](h).tanh(), h

    def __init__(self, names: tuple[str, str, str], conv: Any = nn.Conv2d) -> None:
        super().__init__()
        down, mid, up = self.names = names
        setattr(self, down, nn.ModuleList([UNet.Down(conv, 2, 4), UNet.Down(conv, 4, 6)]))
        setattr(self, mid, conv(6, 6, 3, padding=1))
        setattr(self, up, nn.ModuleList([conv(12, 4, 3, padding=1), conv(8, 2, 3, padding=1)]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        down, mid, up = (getattr(self, name) for name in self.names)
        skips, h = [], x
        for level in down:
            h, skip = level(h)
            skips.append(skip)
        h = mid(h)
        for level in up:
            h = level(torch.cat([h, skips.pop()], dim=1))
        return h


class Wrapped(nn.Module):
    """As a converter does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


@pytest.mark.parametrize(
    ("depth", "number", "expected"),
    [
        (28, 4, [6, 13, 20, 27]),
        (12, 4, [2, 5, 8, 11]),
        (4, 2, [1, 3]),
        (4, 4, [0, 1, 2, 3]),
        (3, 4, [0, 1, 2]),
        (7, 3, [2, 4, 6]),
        (6, 1, [5]),
        (1, 4, [0]),
    ],
)
def test_blocks_are_evenly_spaced_and_the_last_is_among_them(depth: int, number: int, expected: list[int]) -> None:
    assert default_layers(Transformer(depth), number) == [f"blocks.{i}" for i in expected]


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_a_blocks_own_lists_tables_and_small_mlps_are_passed_by(container: Any) -> None:
    network = Transformer(3, container)
    assert default_layers(network) == ["blocks.0", "blocks.1", "blocks.2"]
    assert default_layers(Wrapped(Wrapped(network)), 1) == ["network.network.blocks.2"]
    tokens = FeatureTap(network, default_layers(network))(torch.randn(2, 5, 8), torch.rand(2))
    assert [tuple(one.shape) for one in tokens] == [(2, 5, 8)] * 3


@pytest.mark.parametrize(
    "names",
    [
        ("down_blocks", "mid_block", "up_blocks"),
        ("input_blocks", "middle_block", "output_blocks"),
        ("downs", "mid", "ups"),
    ],
)
def test_a_unets_levels(names: tuple[str, str, str]) -> None:
    down, mid, up = names
    network = UNet(names)
    assert default_layers(network, 5) == [f"{down}.0", f"{down}.1", mid, f"{up}.0", f"{up}.1"]
    assert default_layers(Wrapped(network), 2) == [f"network.{mid}", f"network.{up}.1"]
    tokens = FeatureTap(network, default_layers(network))(torch.randn(3, 2, 4, 4), torch.rand(3))
    assert [tuple(one.shape) for one in tokens] == [(3, 16, 6), (3, 16, 6), (3, 16, 4), (3, 16, 2)]


def test_a_unet_of_video_through_the_discriminator() -> None:
    """(B, C, T, H, W) maps; the gradient reaches every pixel of every frame."""
    network = UNet(("down_blocks", "mid_block", "up_blocks"), nn.Conv3d).requires_grad_(False)
    tap = FeatureTap(network, default_layers(network))
    x = torch.randn(2, 2, 3, 4, 5, requires_grad=True)
    features = tap(x, torch.rand(2))
    assert [one.shape[1] for one in features] == [60] * 4
    discriminator = Discriminator([one.shape[-1] for one in features])
    discriminator(features).sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()


def test_tokens_of_video_come_frame_after_frame() -> None:
    feature = torch.randn(2, 3, 4, 5, 6)
    tokens = as_tokens(feature)
    assert tokens.shape == (2, 120, 3)
    for frame in range(4):
        for row in range(5):
            for column in range(6):
                assert torch.equal(tokens[:, 30 * frame + 6 * row + column], feature[:, :, frame, row, column])


def test_of_equally_long_lists_the_one_with_more_weights() -> None:
    network = nn.Module()
    network.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    network.large = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
    assert default_layers(network, 1) == ["large.2"]


def test_the_helpers_networks() -> None:
    assert default_layers(TokenNet(), 1) == [f"blocks.{len(TokenNet().blocks) - 1}"]
    assert default_layers(ConvNet()) == ["stages.0", "stages.1"]


def test_what_has_no_blocks_and_numbers_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"found no repeated blocks in this Linear: .*; name its layers"):
        default_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="found no repeated blocks"):
        default_layers(nn.ModuleList([nn.SiLU(), nn.Embedding(3, 2)]))
    for number in (0, -1, 2.0, "4", True):
        with pytest.raises(ValueError, match="number must be an int >= 1; got"):
            default_layers(Transformer(2), number)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def diffusers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def test_a_unet_of_diffusers(diffusers: Any) -> None:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    sizes = {"in_channels": 2, "out_channels": 2, "attention_head_dim": 4}
    network = diffusers.UNet2DModel(**UNET, **sizes, down_block_types=down, up_block_types=up)
    names = default_layers(network, 5)
    assert names == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    tokens = FeatureTap(network, names)(torch.randn(2, 2, 8, 8), torch.rand(2))
    assert [tuple(one.shape) for one in tokens] == [(2, 16, 8), (2, 16, 16), (2, 16, 16), (2, 64, 16), (2, 64, 8)]


def test_transformers_of_diffusers(diffusers: Any) -> None:
    """DiT's blocks return tokens; SD3's the text's first, so that the image's part is taken."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "in_channels": 4}
    dit = diffusers.DiTTransformer2DModel(**heads, out_channels=8, num_layers=5, patch_size=2, num_embeds_ada_norm=3)
    assert default_layers(dit, 2) == ["transformer_blocks.2", "transformer_blocks.4"]
    labels = torch.zeros(2, dtype=torch.long)
    tokens = FeatureTap(dit, default_layers(dit))(torch.randn(2, 4, 8, 8), torch.rand(2), labels)
    assert [tuple(one.shape) for one in tokens] == [(2, 16, 16)] * 4
    text = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    sd3 = diffusers.SD3Transformer2DModel(**heads, **text, out_channels=4, num_layers=3, pos_embed_max_size=8)
    names = default_layers(sd3, 2)
    assert names[0] == "transformer_blocks.1.ff"
    tap = FeatureTap(sd3, names)
    cond = {"encoder_hidden_states": torch.randn(2, 5, 12), "pooled_projections": torch.randn(2, 10)}
    tokens = tap(torch.randn(2, 4, 8, 8), timestep=torch.rand(2), **cond)
    assert [tuple(one.shape) for one in tokens] == [(2, 16, 16)] * 2
