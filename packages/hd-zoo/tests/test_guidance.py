"""Classifier-free guidance: the formula, the calls it makes, the interval, null conditions, nesting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_helpers import Recorder, draw_batch, randomised

from hd_zoo import Guidance, create_model

NULL = 10


def labelled(x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor, **cond: Any) -> Tensor:
    """A field in closed form; the null class has a value of its own."""
    factor = torch.where(labels == NULL, -3.0, labels.to(x.dtype)) + t + (0 if r is None else 100 * r)
    return factor.view(-1, *[1] * (x.ndim - 1)) * x


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x (4, 2, 3), t (4,), labels (4,)."""
    return (
        torch.randn(4, 2, 3, dtype=torch.float64),
        torch.tensor([0.0, 0.3, 0.7, 1.0]).double(),
        torch.arange(4),
    )


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
def test_the_formula(inputs: tuple[Tensor, Tensor, Tensor], scale: float) -> None:
    x, t, labels = inputs
    found = Guidance(labelled, scale, null={"labels": NULL})(x, t, labels=labels)
    conditional = labelled(x, t, labels=labels)
    unconditional = labelled(x, t, labels=torch.full_like(labels, NULL))
    torch.testing.assert_close(found, unconditional + scale * (conditional - unconditional))


def test_the_two_halves_run_as_one_batch(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, labels = inputs
    other, flag = torch.randn(4, 2), object()
    inner = Recorder(labelled)
    Guidance(inner, 2.0, null={"labels": NULL})(x, t, t / 2, labels=labels, other=other, flag=flag)
    (call,) = inner.calls
    assert torch.equal(call["x"], torch.cat([x, x]))
    assert torch.equal(call["t"], torch.cat([t, t]))
    assert torch.equal(call["r"], torch.cat([t, t]) / 2)
    assert call["cond"]["labels"].tolist() == [0, 1, 2, 3, NULL, NULL, NULL, NULL]
    assert torch.equal(call["cond"]["other"], torch.cat([other, other]))
    assert call["cond"]["flag"] is flag


def test_scale_one_is_a_single_call_of_the_plain_batch(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, labels = inputs
    inner = Recorder(labelled)
    found = Guidance(inner, 1.0, null={"labels": NULL})(x, t, t / 2, labels=labels)
    (call,) = inner.calls
    assert call["x"] is x
    assert call["r"].shape == (4,)
    assert torch.equal(found, labelled(x, t, t / 2, labels=labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_interval_holds_its_ends(inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    x, _, labels = inputs
    x, t = x.to(dtype), torch.tensor([0.29, 0.3, 0.7, 0.71], dtype=dtype)
    on, off = Guidance(labelled, 3.0, null={"labels": NULL}), labelled(x, t, labels=labels)
    found = Guidance(labelled, 3.0, (0.3, 0.7), null={"labels": NULL})(x, t, labels=labels)
    expected = on(x, t, labels=labels)
    assert torch.equal(found[1:3], expected[1:3])
    assert torch.equal(found[[0, 3]], off[[0, 3]])
    assert not torch.allclose(found[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_only_the_first_channels_are_guided(channels: int) -> None:
    """As the official samplers of DiT, SiT and LightningDiT do: the others keep the conditional answer."""
    x, t, labels = torch.randn(4, 4, 2, 2).double(), torch.tensor([0.1, 0.4, 0.6, 0.9]).double(), torch.arange(4)
    settings: dict[str, Any] = {"guidance_interval": (0.3, 1.0), "null": {"labels": NULL}}
    found = Guidance(labelled, 3.0, channels=channels, **settings)(x, t, t / 2, labels=labels)
    everything = Guidance(labelled, 3.0, **settings)(x, t, t / 2, labels=labels)
    conditional = labelled(x, t, t / 2, labels=labels)
    assert torch.equal(found[:, :channels], everything[:, :channels])
    assert torch.equal(found[:, channels:], conditional[:, channels:])
    assert not torch.isclose(everything[1:], conditional[1:]).any()


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_there_must_be_so_many_channels(shape: tuple[int, ...]) -> None:
    guided = Guidance(labelled, 3.0, null={"labels": NULL}, channels=4)
    with pytest.raises(ValueError, match=r"channels must be at most those of x; got 4 for x \(2,"):
        guided(torch.randn(shape), torch.rand(2), labels=torch.arange(2))


def test_r_is_passed_on_or_left_out(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, labels = inputs
    for scale in (1.0, 2.0):
        inner = Recorder(labelled)
        field = Guidance(inner, scale, null={"labels": NULL})
        assert not torch.allclose(field(x, t, t, labels=labels), field(x, t, labels=labels))
        assert inner.calls[1]["r"] is None


def test_a_tensor_can_stand_for_none(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """An empty text's embedding (tokens, width), broadcast over the batch and cast like the condition."""
    x, t, _ = inputs
    text, empty = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(5, 6)
    inner = Recorder(lambda x, t, r=None, *, text: x * text.mean(dim=(1, 2))[:, None, None])
    found = Guidance(inner, 2.5, null={"text": empty})(x, t, text=text)
    assert torch.equal(inner.calls[0]["cond"]["text"][4:], empty.double().expand(4, 5, 6))
    conditional, unconditional = x * text.mean(dim=(1, 2))[:, None, None], x * empty.double().mean()
    torch.testing.assert_close(found, unconditional + 2.5 * (conditional - unconditional))


def test_nested_guidance_in_two_conditions(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, labels = inputs
    style = torch.tensor([5.0, 6.0, 7.0, 8.0]).double()

    def both(x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor, style: Tensor) -> Tensor:
        return x * (10 * labels + style)[:, None, None]

    inner = Guidance(both, 2.0, null={"style": 0.0})
    found = Guidance(inner, 3.0, null={"labels": NULL})(x, t, labels=labels, style=style)

    def in_style(labels: Tensor) -> Tensor:
        plain = both(x, t, labels=labels, style=torch.zeros_like(style))
        return plain + 2.0 * (both(x, t, labels=labels, style=style) - plain)

    plain = in_style(torch.full_like(labels, NULL))
    torch.testing.assert_close(found, plain + 3.0 * (in_style(labels) - plain))


def test_around_a_network_it_owns_its_parameters_and_has_its_derivative() -> None:
    network = randomised(create_model("mlp_2d", classes=NULL, width=16).double())
    guided = Guidance(network, 2.0, (0.0, 0.8), null={"labels": network.null_label})
    assert {id(p) for p in guided.parameters()} == {id(p) for p in network.parameters()}
    x, t, _, labels = draw_batch(network, dtype=torch.float64)
    tangents = (torch.randn_like(x), torch.ones_like(t))
    _, slope = torch.func.jvp(lambda x, t: guided(x, t, labels=labels), (x, t), tangents)
    ahead, behind = (guided(x + s * tangents[0], t + s, labels=labels) for s in (1e-5, -1e-5))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((-1.0,), {}, "scale must be >= 0 and finite; got -1.0"),
        ((float("nan"),), {}, "scale must be >= 0"),
        ((float("inf"),), {}, "scale must be >= 0 and finite"),
        ((1.0, (0.5, 0.2)), {}, "guidance_interval must satisfy"),
        ((1.0, (-0.1, 0.2)), {}, "guidance_interval must satisfy"),
        ((1.0, (0.1, 1.2)), {}, "guidance_interval must satisfy"),
        ((1.0,), {"channels": 0}, "channels must be >= 1, or None for all; got 0"),
        ((1.0,), {"null": {}}, "null must name at least one condition"),
    ],
)
def test_impossible_settings(arguments: tuple[Any, ...], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(labelled, *arguments, **{"null": {"labels": NULL}, **keywords})


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("cond", [{}, {"labels": None}, {"classes": torch.arange(4)}])
def test_a_call_without_the_condition(
    inputs: tuple[Tensor, Tensor, Tensor], scale: float, cond: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"guidance needs the condition\(s\) labels at every call"):
        Guidance(labelled, scale, null={"labels": NULL})(*inputs[:2], **cond)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_teacher_without_an_argument_r_is_guided(scale: float) -> None:
    """Its third argument may be the labels: an r that was not given must not land there."""

    def teacher(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        return x * labels[:, None]

    x, labels = torch.ones(2, 3), torch.tensor([1, 2])
    guided = Guidance(teacher, scale, null={"labels": 0})
    assert torch.equal(guided(x, torch.full((2,), 0.5), labels=labels), scale * x * labels[:, None])
