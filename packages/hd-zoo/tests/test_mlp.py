"""The MLP field: an independent forward pass, the null class, labels, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_helpers import draw_batch, randomised

from hd_zoo import MLPField


def plain_forward(state: dict[str, Tensor], x: Tensor, t: Tensor, gap: Tensor, labels: Tensor) -> Tensor:
    """Written out over the state dict for time_scale 2 and two layers."""

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(h: Tensor) -> Tensor:
        return h * h.sigmoid()

    def embed(name: str, times: Tensor) -> Tensor:
        half = state[f"{name}.mlp.0.weight"].shape[1] // 2
        angles = 2 * times[:, None] * torch.tensor([10_000 ** (-i / half) for i in range(half)], dtype=x.dtype)
        return linear(f"{name}.mlp.2", silu(linear(f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))

    condition = embed("time_embed", t) + embed("interval_embed", gap) + state["label_embed.weight"][labels]
    h = linear("input", x)
    for i in range(2):
        h = h + linear(f"blocks.{i}", silu(h + linear(f"modulations.{i}", silu(condition))))
    return linear("head", silu(h))


def test_equals_an_independent_forward_pass() -> None:
    sizes = {"features": 3, "width": 12, "depth": 2, "classes": 3, "time_scale": 2.0, "frequencies": 6}
    network = randomised(MLPField(r_embedding="added", **sizes).double(), std=0.3)
    x, t, r, labels = draw_batch(network, dtype=torch.float64)
    expected = plain_forward(network.state_dict(), x, t, t - r, labels)
    torch.testing.assert_close(network(x, t, r, labels=labels), expected, atol=1e-12, rtol=1e-12)
    null = plain_forward(network.state_dict(), x, t, torch.zeros_like(t), torch.full((3,), 3))
    torch.testing.assert_close(network(x, t), null, atol=1e-12, rtol=1e-12)


def test_a_new_network_predicts_exactly_zero() -> None:
    network = MLPField(classes=2)
    x, t, r, labels = draw_batch(network)
    assert torch.all(network(x, t, r, labels=labels) == 0)
    assert network.sample_shape == (2,)
    assert (network.null_label, MLPField().null_label) == (2, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 4)}, r"x must have shape \(B, 2\); got \(3, 4\)"),
        ({"x": torch.randn(3)}, "x must have shape"),
        ({"t": torch.rand(1)}, r"t must have shape \(3,\); got \(1,\)"),
        ({"r": torch.rand(3, 1)}, "r must have shape"),
        ({"labels": torch.zeros(3)}, "labels must be int64"),
        ({"labels": torch.zeros(1, dtype=torch.long)}, r"labels must be int64 of shape \(3,\)"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.randn(3, 2), "t": torch.rand(3), "r": None, "labels": None, **change}
    with pytest.raises(ValueError, match=message):
        MLPField(classes=4)(given["x"], given["t"], given["r"], labels=given["labels"])


def test_labels_for_an_unconditional_network() -> None:
    with pytest.raises(ValueError, match="unconditional network"):
        MLPField()(torch.randn(3, 2), torch.rand(3), labels=torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "must be >= 1"),
        ({"depth": 0}, "must be >= 1"),
        ({"classes": -1}, "classes must be >= 0; got -1"),
        ({"r_embedding": "x"}, "r_embedding must be None"),
        ({"frequencies": 3}, "frequencies must be even"),
        ({"time_scale": -1.0}, "time_scale must be > 0"),
    ],
)
def test_impossible_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLPField(**changes)
