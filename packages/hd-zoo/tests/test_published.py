"""Official checkpoints: plain networks under the official names, written anew here, against what is loaded of them."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hd_zoo import DiffusedNoise, DiffusionTransformer, from_pretrained, save_pretrained
from hd_zoo.weights.published import load_published, read_weights

SIZE, WIDTH, DEPTH, HEADS, CLASSES = 8, 32, 3, 2, 5
EARLY = 2  # blocks of the small DMF that are shown t
SMALL = {"image_size": SIZE, "width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "classes": CLASSES}


class PlainAttention(nn.Module):
    """Queries, keys and values side by side, each split into heads; softmax written out."""

    def __init__(self, turn: Callable[[Tensor], Tensor], qk_norm: str | None) -> None:
        super().__init__()
        self.qkv, self.proj, self.turn = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), turn
        if qk_norm:
            self.q_norm, self.k_norm = (QK_NORMS[qk_norm](WIDTH // HEADS) for _ in range(2))
        else:
            self.q_norm = self.k_norm = lambda h: h

    def forward(self, h: Tensor) -> Tensor:
        b, n, c = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k = self.turn(self.q_norm(q)), self.turn(self.k_norm(k))
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(c // HEADS)
        shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return self.proj(torch.einsum("bhnm,bhmd->bnhd", shares, v).reshape(b, n, c))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        return self.weight * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class ScaledRMSNorm(nn.Module):
    """DMF's name for the same weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class TimmNorm(nn.Module):
    """timm's LayerNorm of queries and keys: PyTorch's own eps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return self.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + self.bias


QK_NORMS = {"rms": RMSNorm, "scale": ScaledRMSNorm, "layer": TimmNorm}


class PlainMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        h = self.fc1(h)
        return self.fc2(h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = int(4 * WIDTH * 2 / 3)
        self.w12, self.w3 = nn.Linear(WIDTH, 2 * hidden), nn.Linear(hidden, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        a, b = self.w12(h).chunk(2, dim=-1)
        return self.w3(a * torch.sigmoid(a) * b)


def waves(t: Tensor) -> Tensor:
    """128 cosines, then as many sines, from frequency 1 to nearly 1 / 10,000."""
    angles = torch.stack([t * 10000 ** (-j / 128) for j in range(128)], dim=1)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def layer_norm(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=1e-6)


class PlainBlock(nn.Module):
    """adaLN-zero: shift, scale and gate of attention, then of the MLP."""

    def __init__(self, lightning: bool, turn: Callable[[Tensor], Tensor], qk_norm: str | None) -> None:
        super().__init__()
        self.norm1 = RMSNorm(WIDTH) if lightning else layer_norm
        self.norm2 = RMSNorm(WIDTH) if lightning else layer_norm
        self.attn, self.mlp = PlainAttention(turn, qk_norm), SwiGLU() if lightning else PlainMLP()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        parts = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        h = h + parts[2] * self.attn(self.norm1(h) * (1 + parts[1]) + parts[0])
        return h + parts[5] * self.mlp(self.norm2(h) * (1 + parts[4]) + parts[3])


class Plain(nn.Module):
    """DiT / SiT, or LightningDiT: the network of (x, t, y) with the papers' own clock and output.

    With ``student="meanflow"`` also MeanFlow's embedding of t - r, with "dmf" DMF's two parts of t and of r.
    """

    def __init__(
        self,
        *,
        lightning: bool = False,
        patch: int = 2,
        channels: int = 4,
        variance: bool = False,
        qk_norm: str | None = None,
        student: str | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.patch, self.channels, self.grid = patch, channels, SIZE // patch
        self.out = (2 if variance else 1) * channels
        self.x_embedder, self.t_embedder, self.y_embedder = nn.Module(), nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, WIDTH, patch, stride=patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        if student == "meanflow":
            self.r_embedder = nn.Module()
            self.r_embedder.mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        if student == "dmf":
            self.logvar_linear = nn.Linear(256, 1)
        self.y_embedder.embedding_table = nn.Embedding(CLASSES + 1, WIDTH)
        self.pos_embed = nn.Parameter(self.sines()[None], requires_grad=False)
        turn = self.turn if lightning else lambda h: h
        self.blocks = nn.ModuleList(PlainBlock(lightning, turn, qk_norm) for _ in range(DEPTH))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(WIDTH, patch * patch * self.out)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.final_layer.norm_final = RMSNorm(WIDTH) if lightning else layer_norm
        generator = torch.Generator().manual_seed(5)
        for name, parameter in self.named_parameters():
            if name != "pos_embed":
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def sines(self) -> Tensor:
        """Column first, row second, each half sines and half cosines."""
        rows = []
        for n in range(self.grid**2):
            row, col = divmod(n, self.grid)
            at = [[p / 10000 ** (j / (WIDTH / 4)) for j in range(WIDTH // 4)] for p in (col, row)]
            rows.append([f(a) for angles in at for f in (math.sin, math.cos) for a in angles])
        return torch.tensor(rows)

    def turn(self, h: Tensor) -> Tensor:
        """Each pair (2 j, 2 j + 1) is a complex number, multiplied by exp(i angle): rows first, then columns."""
        width = h.shape[-1]
        half = width // 2
        factors = []
        for n in range(self.grid**2):
            row, col = divmod(n, self.grid)
            angles = [p * 10000 ** (-2 * j / half) for p in (row, col) for j in range(half // 2)]
            factors.append([complex(math.cos(a), math.sin(a)) for a in angles])
        pairs = torch.view_as_complex(h.reshape(*h.shape[:-1], half, 2).contiguous())
        return torch.view_as_real(pairs * torch.tensor(factors, dtype=pairs.dtype)).flatten(-2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        label = self.y_embedder.embedding_table(y)
        c = self.t_embedder.mlp(waves(t)) + label
        if self.student == "meanflow":
            c = c + self.r_embedder.mlp(waves(t - r))
        for index, block in enumerate(self.blocks):
            if self.student == "dmf" and index == EARLY:
                c = self.t_embedder.mlp(waves(r)) + label
            h = block(h, c)
        shift, scale = self.final_layer.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)
        h = self.final_layer.linear(self.final_layer.norm_final(h) * (1 + scale) + shift)
        h = h.reshape(len(x), self.grid, self.grid, self.patch, self.patch, self.out)
        image = torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), self.out, SIZE, SIZE)
        return image[:, : self.channels]


def write(network: nn.Module, path: Path, **more: Tensor) -> Path:
    """As a training script does it: averaged and current weights, settings, and the wrapper's prefix."""
    averaged = {f"module.{name}": tensor for name, tensor in {**network.state_dict(), **more}.items()}
    current = {name: tensor + 1 if "pos_embed" not in name else tensor for name, tensor in averaged.items()}
    settings = argparse.Namespace(model="SiT-XL/2", global_batch_size=256)
    torch.save({"model": current, "ema": averaged, "args": settings, "opt": {"step": 3}}, path)
    return path


@pytest.fixture
def sit() -> Plain:
    return Plain(patch=2, channels=4, variance=True)


@pytest.fixture
def checkpoint(sit: Plain, tmp_path: Path) -> Path:
    return write(sit, tmp_path / "sit.pt")


@pytest.fixture
def inputs() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def draw(channels: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(3, channels, SIZE, SIZE, dtype=dtype)
        return x, torch.tensor([0.1, 0.5, 0.93], dtype=dtype), torch.tensor([0, 4, CLASSES])

    return draw


def doubled(network: nn.Module) -> nn.Module:
    """In float64; the tables that are fixed keep the float32 values that were stored, on both sides."""
    return network.double().eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_sit(sit: Plain, checkpoint: Path, inputs: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Its t = 0 is noise and its velocity points to data."""
    field = load_published(checkpoint, "sit_s_2", **SMALL)
    assert not field.training
    assert field.arguments["reversed_time"] is True
    x, t, labels = inputs(dtype=dtype)
    expected = -sit.to(dtype)(x, 1 - t, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(field.to(dtype)(x, t, labels=labels), expected, atol=tolerance, rtol=tolerance)
    null = -sit(x, 1 - t, torch.full_like(labels, CLASSES))
    torch.testing.assert_close(field(x, t), null, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("patch", [1, 4])
def test_other_patches(patch: int, inputs: Any, tmp_path: Path) -> None:
    network = Plain(patch=patch, channels=4, variance=True)
    field = doubled(load_published(write(network, tmp_path / "a.pt"), "sit_s_2", **SMALL, patch=patch))
    x, t, labels = inputs()
    expected = -network.double()(x, 1 - t, labels)
    torch.testing.assert_close(field(x, t, labels=labels), expected, atol=1e-7, rtol=1e-7)


def test_dit(sit: Plain, checkpoint: Path, inputs: Any) -> None:
    """Its network predicts noise at step i of 1000; behind the converter it is a velocity field."""
    field = doubled(load_published(checkpoint, "dit_s_2", **SMALL))
    assert isinstance(field, DiffusedNoise)
    x, _, labels = inputs()
    sit = sit.double()
    steps = torch.tensor([0, 350, 999])
    expected = sit(x, steps.double(), labels)
    torch.testing.assert_close(field.network(x, steps / 1000.0, labels=labels), expected, atol=1e-4, rtol=1e-4)
    exact = field.network(x, steps.double() / 1000, labels=labels)
    torch.testing.assert_close(exact, expected, atol=1e-7, rtol=1e-7)
    # v = (eps - x_t) / (1 - t) where noise and data have the ratio of step i, z being x_t of unit scale there.
    signal = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)[steps]
    ratio = ((1 - signal) / signal).sqrt()
    t = ratio / (1 + ratio)
    share = (1 - t)[:, None, None, None]
    noise = sit(x * signal.sqrt()[:, None, None, None] / share, steps.double(), labels)
    torch.testing.assert_close(field(x, t, labels=labels), (noise - x) / share, atol=1e-5, rtol=1e-5)


def test_repa(inputs: Any, tmp_path: Path) -> None:
    """t = 0 is data as here, no variance; the projectors of its training are left out."""
    network = Plain(patch=2, channels=4, variance=False)
    extra = {"projectors.0.0.weight": torch.ones(3, 3), "projectors.0.0.bias": torch.ones(3)}
    path = write(network, tmp_path / "repa.pt", **extra)
    settings = {"reversed_time": False, "learned_variance": False}
    field = doubled(load_published(path, "sit_s_2", **SMALL, **settings))
    x, t, labels = inputs()
    torch.testing.assert_close(field(x, t, labels=labels), network.double()(x, t, labels), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("qk_norm", [None, "rms", "layer"])
def test_lightningdit(patch: int, qk_norm: str | None, inputs: Any, tmp_path: Path) -> None:
    network = Plain(lightning=True, patch=patch, channels=32, variance=False, qk_norm=qk_norm)
    path = write(network, tmp_path / "lightning.pt", **{"feat_rope.freqs_cos": torch.ones(3)})
    field = doubled(load_published(path, f"lightningdit_b_{patch}", **SMALL, qk_norm=qk_norm))
    x, t, labels = inputs(32)
    expected = -network.double()(x, 1 - t, labels)
    assert expected.std() > 0.1
    # The table of rotations is kept in float32.
    torch.testing.assert_close(field(x, t, labels=labels), expected, atol=1e-5, rtol=1e-5)
    for block in network.blocks:
        block.attn.turn = lambda h: h
    assert (network(x, 1 - t, labels) - -expected).abs().max() > 1e-3  # rotations matter


def test_averaged_or_current_weights(sit: Plain, checkpoint: Path) -> None:
    for averaged, shift in ((True, 0), (False, 1)):
        field = load_published(checkpoint, "sit_s_2", averaged=averaged, **SMALL)
        assert torch.equal(field.head.linear.weight, sit.final_layer.linear.weight + shift)


@pytest.mark.parametrize("place", ["ema", "model_ema", "ema_state_dict", "model", "state_dict", "net", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_every_usual_nesting(place: str | None, prefix: str, sit: Plain, tmp_path: Path) -> None:
    weights = {f"{prefix}{name}": tensor for name, tensor in sit.state_dict().items()}
    torch.save(weights if place is None else {place: weights, "epoch": 3}, tmp_path / "a.pth")
    for averaged in (True, False):
        found = read_weights(tmp_path / "a.pth", averaged=averaged)
        assert found.keys() == sit.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in sit.state_dict().items())


@pytest.mark.parametrize(("half", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_safetensors_and_half_precision(
    half: torch.dtype, tolerance: float, sit: Plain, inputs: Any, tmp_path: Path
) -> None:
    """Fixed positions are compared at the file's own precision."""
    weights = {name: tensor.to(half).contiguous() for name, tensor in sit.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    field = load_published(tmp_path / "a.safetensors", "sit_s_2", **SMALL)
    assert {one.dtype for one in field.state_dict().values()} == {torch.float32}
    x, t, labels = inputs(dtype=torch.float32)
    expected = -sit(x, 1 - t, labels)
    assert (field(x, t, labels=labels) - expected).norm() < tolerance * expected.norm()
    weights["pos_embed"] = weights["pos_embed"] + 0.01
    save_file(weights, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="pos_embed differs from the fixed"):
        load_published(tmp_path / "b.safetensors", "sit_s_2", **SMALL)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_of_small_queries_and_keys(kind: str, inputs: Any, tmp_path: Path) -> None:
    """Where eps shows: timm's 1e-5 for LayerNorm, 1e-6 for RMSNorm."""
    network = Plain(qk_norm=kind)
    with torch.no_grad():
        for block in network.blocks:
            block.attn.qkv.weight[: 2 * WIDTH] *= 1e-3
            block.attn.qkv.bias[: 2 * WIDTH] *= 1e-3
    path = write(network, tmp_path / "a.pt")
    x, t, labels = inputs()
    expected = network.double()(x, t, labels)
    field = doubled(load_published(path, "repa_xl_2", **SMALL, qk_norm=kind))
    torch.testing.assert_close(field(x, t, labels=labels), expected, atol=1e-7, rtol=1e-7)
    other = doubled(load_published(path, "repa_xl_2", **SMALL, qk_norm=kind, qk_norm_eps=3e-6))
    assert (other(x, t, labels=labels) - expected).abs().max() > 1e-3


def test_meanflow(inputs: Any, tmp_path: Path) -> None:
    """Two times as here: t = 0 is data, and an embedding of t - r beside t's."""
    network = Plain(student="meanflow")
    field = doubled(load_published(write(network, tmp_path / "a.pt"), "meanflow_b_2", **SMALL))
    x, t, labels = inputs()
    r = torch.tensor([0.0, 0.5, 0.2], dtype=torch.float64)
    expected = network.double()(x, t, labels, r)
    torch.testing.assert_close(field(x, t, r, labels=labels), expected, atol=1e-7, rtol=1e-7)
    at_t = network(x, t, labels, t)
    torch.testing.assert_close(field(x, t, labels=labels), at_t, atol=1e-7, rtol=1e-7)
    assert (at_t - expected)[0].abs().max() > 1e-3  # r matters
    assert field.takes_r


@pytest.mark.parametrize("qk_norm", [None, "scale"])
def test_dmf(qk_norm: str | None, inputs: Any, tmp_path: Path) -> None:
    """The first blocks are shown t, the others and the head r; what weighed the loss is left out."""
    network = Plain(student="dmf", qk_norm=qk_norm)
    settings = {**SMALL, "early_blocks": EARLY, "qk_norm": qk_norm and "rms"}
    field = doubled(load_published(write(network, tmp_path / "a.pt"), "dmf_xl_2", **settings))
    x, t, labels = inputs()
    r = torch.tensor([0.0, 0.5, 0.2], dtype=torch.float64)
    expected = network.double()(x, t, labels, r)
    torch.testing.assert_close(field(x, t, r, labels=labels), expected, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(field(x, t, labels=labels), network(x, t, labels, t), atol=1e-7, rtol=1e-7)
    assert (network(x, t, labels, t) - expected)[0].abs().max() > 1e-3
    again = doubled(from_pretrained(save_pretrained(field.float(), tmp_path / "a")))
    torch.testing.assert_close(again(x, t, r, labels=labels), expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "network", "message"),
    [
        ("sit_s_2", {"student": "meanflow"}, r"has an embedding of t - r \(MeanFlow\): meanflow_\*"),
        ("meanflow_b_2", {}, r"missing interval_embed\.mlp\.0"),
        ("repa_xl_2", {"qk_norm": "layer"}, 'qk_norm="layer" reads it'),
        ("repa_xl_2", {"qk_norm": "scale"}, 'qk_norm="rms" reads it'),
    ],
)
def test_a_network_of_another_kind_is_named(name: str, network: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_published(write(Plain(**network), tmp_path / "a.pt"), name, **SMALL)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["net.blocks.layers_0.attn.qkv._flax_linear.kernel"], "a JAX checkpoint .*, whose layout is not read here"),
        (["net.map_layer0.weight", "net.enc.32x32_conv.weight"], "py-meanflow's CIFAR-10 network is a U-Net"),
    ],
)
def test_other_layouts_are_refused_in_one_line(names: list[str], message: str, tmp_path: Path) -> None:
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as caught:
        load_published(tmp_path / "a.pt", "meanflow_xl_2", **SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad: float, sit: Plain, tmp_path: Path) -> None:
    with torch.no_grad():
        sit.blocks[1].mlp.fc1.bias[3] = bad
    with pytest.raises(ValueError, match=r"not finite: blocks\.1\.mlp\.0\.bias has 1 of 128 NaN or inf"):
        load_published(write(sit, tmp_path / "a.pt"), "sit_s_2", **SMALL)


def test_a_path_that_is_not_utf8(sit: Plain, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"a\xff.pt")
    torch.save(sit.state_dict(), tmp_path / "a.pt")
    (tmp_path / "a.pt").rename(path)
    assert isinstance(load_published(path, "sit_s_2", **SMALL), DiffusionTransformer)
    with pytest.raises(ValueError, match=r"a\\udcff\.pt: these are not the weights"):
        load_published(path, "repa_xl_2", **SMALL)
    path = path.rename(path.with_suffix(".safetensors"))
    with pytest.raises(ValueError, match=r"a\\udcff\.safetensors cannot be read as weights alone"):
        load_published(path, "sit_s_2", **SMALL)


def test_what_is_loaded_can_be_saved_and_trained(checkpoint: Path, inputs: Any, tmp_path: Path) -> None:
    x, t, labels = inputs(dtype=torch.float32)
    for name in ("sit_s_2", "dit_s_2"):
        field = load_published(checkpoint, name, **SMALL)
        again = from_pretrained(save_pretrained(field, tmp_path / name))
        assert type(again) is type(field)
        assert torch.equal(again(x, t, labels=labels), field(x, t, labels=labels))
        field(x, t, labels=labels).square().mean().backward()
        assert all(parameter.grad is not None for parameter in field.parameters())
        assert not any(one.is_meta for one in field.state_dict().values())


def test_loading_does_not_touch_the_global_generator(checkpoint: Path) -> None:
    state = torch.get_rng_state()
    load_published(checkpoint, "sit_s_2", **SMALL)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_missing_file(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"no file .*{re.escape(name)}"):
            load_published(tmp_path / name, "sit_s_2", **SMALL)


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (self.place,)


def test_nothing_is_executed(sit: Plain, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    torch.save({"ema": sit.state_dict(), "args": Hostile(str(mark))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt cannot be read as weights alone"):
        load_published(tmp_path / "a.pt", "sit_s_2", **SMALL)
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists()  # the trap works


def test_a_pickled_network_is_refused(sit: Plain, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_a_damaged_file(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} cannot be read as weights alone"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [{}, {"ema": {}}, {"step": 3}, [1, 2], torch.ones(3)])
def test_a_file_without_weights(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no weights by name"):
        read_weights(tmp_path / "a.pt")


def changed(sit: Plain, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    weights = dict(sit.state_dict())
    change(weights)
    torch.save(weights, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_the_first_keys_at_fault_are_named_in_a_short_line(sit: Plain, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        for name in ("x_embedder.proj.bias", "blocks.1.attn.qkv.weight", "blocks.2.attn.proj.bias"):
            del weights[name]
        weights["blocks.7.attn.qkv.weight"] = weights["surprise"] = torch.ones(2)
        weights["final_layer.linear.bias"] = torch.ones(3)
        weights["blocks.0.mlp.fc1.weight"] = torch.ones(4, 4)

    with pytest.raises(ValueError, match="these are not the weights of this network") as error:
        load_published(changed(sit, tmp_path, change), "sit_s_2", **SMALL)
    assert str(error.value).split(": ", 2)[2].split("; ") == [
        f"blocks.0.mlp.fc1.weight has shape (4, 4), not ({4 * WIDTH}, {WIDTH})",
        f"final_layer.linear.bias has shape (3,), not ({2 * 4 * 2 * 2},)",
        "missing blocks.1.attn.qkv.weight",
        "unexpected blocks.7.attn.qkv.weight",
        "and 3 more",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.flip(1), "pos_embed differs from the fixed sines and cosines by"),
        (lambda p: p.roll(WIDTH // 2, 2), "pos_embed differs from the fixed"),
        (lambda p: p + 0.01, r"pos_embed differs from the fixed sines and cosines by 0\.01"),
        (lambda p: p[:, :4], r"pos_embed has shape \(1, 4, 32\), not \(1, 16, 32\)"),
        (lambda p: p[0], r"pos_embed has shape \(16, 32\), not \(1, 16, 32\)"),
    ],
)
def test_other_positions_are_refused(
    change: Callable[[Tensor], Tensor], message: str, sit: Plain, tmp_path: Path
) -> None:
    path = changed(sit, tmp_path, lambda weights: weights.update(pos_embed=change(weights["pos_embed"])))
    with pytest.raises(ValueError, match=message):
        load_published(path, "sit_s_2", **SMALL)


def test_positions_may_be_absent_and_are_then_the_fixed_ones(sit: Plain, inputs: Any, tmp_path: Path) -> None:
    path = changed(sit, tmp_path, lambda weights: weights.pop("pos_embed"))
    field = load_published(path, "sit_s_2", **SMALL)
    torch.testing.assert_close(field.positions, sit.pos_embed[0], atol=1e-6, rtol=0)


def test_the_wrong_network(sit: Plain, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"name must be .*; got 'mlp_2d'"):
        load_published(checkpoint, "mlp_2d")
    with pytest.raises(ValueError, match=r"unknown model 'sit_s_3' \(did you mean"):
        load_published(checkpoint, "sit_s_3")
    with pytest.raises(ValueError, match=r"these are not the weights.*missing blocks\.3"):
        load_published(checkpoint, "sit_s_2", **{**SMALL, "depth": 4})
    with pytest.raises(ValueError, match=r"name must be .*; got 'dit_nano_2'"):
        load_published(checkpoint, "dit_nano_2")
    with pytest.raises(ValueError, match=r"unexpected blocks\.0\.mlp\.fc1"):
        load_published(checkpoint, "lightningdit_b_1", **SMALL)
    with pytest.raises(ValueError, match=r"final_layer\.linear\.bias has shape"):
        load_published(checkpoint, "sit_s_2", **SMALL, learned_variance=False)
    assert isinstance(load_published(checkpoint, "sit_s_2", **SMALL), DiffusionTransformer)
