"""The diffusion transformer: how it starts, labels, times, precision, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_helpers import draw_batch, randomised

from hd_zoo import DiffusionTransformer
from hd_zoo.networks.embedding import sinusoidal_embedding

SIZES = {"image_size": 8, "channels": 3, "patch": 2, "width": 16, "depth": 2, "num_heads": 4, "frequencies": 8}


def build(**changes: Any) -> DiffusionTransformer:
    return DiffusionTransformer(**{**SIZES, "classes": 5, **changes})


def test_sinusoids_run_in_float32_or_better() -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert sinusoidal_embedding(torch.rand(3).to(dtype), 8).dtype == wide


def test_a_new_network_predicts_exactly_zero_and_its_blocks_are_the_identity() -> None:
    network = build(r_embedding="added")
    x, t, r, labels = draw_batch(network)
    assert torch.all(network(x, t, r, labels=labels) == 0)
    h, condition = torch.randn(2, 16, 16), torch.randn(2, 16)
    for block in network.blocks:
        assert torch.equal(block(h, condition), h)


def test_a_new_network_can_learn() -> None:
    """Zero output, but not a dead end: the head gets a gradient at once, and the rest after it has moved."""
    network = build()
    x, t, _, labels = draw_batch(network)
    network(x, t, labels=labels).sub(x).square().sum().backward()
    assert network.head.linear.weight.grad.abs().sum() > 0
    with torch.no_grad():
        network.head.linear.weight.sub_(0.1 * network.head.linear.weight.grad)
    network.zero_grad()
    network(x, t, labels=labels).sub(x).square().sum().backward()
    assert all(block.modulation[1].weight.grad.abs().sum() > 0 for block in network.blocks)
    assert network.patch_embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("image_size", [4, 8])
def test_samples_do_not_mix(image_size: int) -> None:
    network = randomised(build(image_size=image_size).double())
    x, t, _, labels = draw_batch(network, dtype=torch.float64)
    together = network(x, t, labels=labels)
    for b in range(3):
        alone = network(x[b : b + 1], t[b : b + 1], labels=labels[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], atol=1e-12, rtol=1e-12)


def test_no_labels_means_the_null_class() -> None:
    network = randomised(build())
    x, t, _, labels = draw_batch(network)
    assert network.null_label == 5
    null = network(x, t, labels=torch.full((3,), 5))
    assert torch.equal(network(x, t), null)
    assert not torch.allclose(network(x, t, labels=labels), null)


def test_an_unconditional_network() -> None:
    network = randomised(build(classes=0))
    x, t, _, _ = draw_batch(network)
    assert network.null_label is None
    assert network(x, t).shape == x.shape
    with pytest.raises(ValueError, match="unconditional network"):
        network(x, t, labels=torch.zeros(3, dtype=torch.long))


def test_time_scale_stretches_time_and_multiplies_its_derivative() -> None:
    slow = randomised(build(r_embedding="added").double(), std=0.2)
    fast = build(r_embedding="added", time_scale=3.0).double()
    fast.load_state_dict(slow.state_dict())
    x, t, r, labels = draw_batch(slow, dtype=torch.float64)

    def with_slope(network: nn.Module, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda t: network(x, t, r, labels=labels), (t,), (torch.ones_like(t),))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (value, slope), (other, scaled) = with_slope(slow, 3 * t, 3 * r), with_slope(fast, t, r)
    torch.testing.assert_close(other, value, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(scaled, 3 * slope, atol=1e-11, rtol=1e-11)
    assert slope.abs().max() > 1e-3


def test_bfloat16() -> None:
    network = randomised(build(r_embedding="added"), std=0.05)
    x, t, r, labels = draw_batch(network)
    expected = network(x, t, r, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x, t, r, labels=labels)
    pure = network.bfloat16()(x.bfloat16(), t, r, labels=labels)
    for found in (mixed, pure):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("r_embedding", [None, "added"])
def test_compiles_to_one_graph(r_embedding: str | None) -> None:
    network = randomised(build(depth=1, r_embedding=r_embedding).double())
    x, t, r, labels = draw_batch(network, dtype=torch.float64)
    torch.compiler.reset()
    found = torch.compile(network, backend="aot_eager", fullgraph=True)(x, t, r, labels=labels)
    expected = network(x, t, r, labels=labels)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    parameters = list(network.parameters())
    one, other = (torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "multiple of patch; got 9 and 2"),
        ({"patch": 0}, "multiple of patch"),
        ({"width": 18, "num_heads": 3}, "width must be a multiple of 4 and of num_heads; got width 18"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"depth": 0}, "depth must be >= 1"),
        ({"channels": 0}, "channels and depth"),
        ({"classes": -1}, "classes must be >= 0; got -1"),
        ({"r_embedding": "concatenated"}, "r_embedding must be None, 'added' or 'decoupled'; got 'concatenated'"),
        ({"frequencies": 7}, "frequencies must be even and >= 2; got 7"),
        ({"mlp_ratio": -1.0}, "mlp_ratio must be >= 1"),
        ({"time_scale": 0.0}, "time_scale must be > 0 and finite; got 0.0"),
        ({"time_scale": float("inf")}, "time_scale must be > 0 and finite"),
        ({"activation": "relu"}, "activation must be one of gelu_tanh, silu, swiglu; got 'relu'"),
    ],
)
def test_impossible_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 3, 8, 4)}, r"x must have shape \(B, 3, 8, 8\); got \(3, 3, 8, 4\)"),
        ({"x": torch.randn(3, 8, 8)}, "x must have shape"),
        ({"t": torch.rand(1)}, r"t must have shape \(3,\); got \(1,\)"),
        ({"t": torch.rand(3, 1)}, "t must have shape"),
        ({"r": torch.rand(2)}, r"r must have shape \(3,\); got \(2,\)"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, r"labels must be int64 of shape \(3,\)"),
        ({"labels": torch.zeros(3)}, "labels must be int64.*torch.float32"),
        ({"labels": torch.zeros(3, 5, dtype=torch.long)}, r"labels must be int64.*\(3, 5\)"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.randn(3, 3, 8, 8), "t": torch.rand(3), "r": None, "labels": None, **change}
    with pytest.raises(ValueError, match=message):
        build()(given["x"], given["t"], given["r"], labels=given["labels"])


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_out_of_range(label: int) -> None:
    with pytest.raises(IndexError):
        build()(torch.randn(1, 3, 8, 8), torch.rand(1), labels=torch.tensor([label]))
