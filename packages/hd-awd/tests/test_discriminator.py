"""The two heads against each other and against the head written out unfolded; token weights; errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from awd_helpers import UnfoldedHead, randomised
from torch import Tensor, nn

from hd_awd import Discriminator, PoolingHead

WIDTHS = (8, 6, 8)


def features(dtype: torch.dtype = torch.float64, batch: int = 3) -> list[Tensor]:
    """One (B, N, C) tensor per width, with a different N each."""
    sizes = zip((5, 9, 1), WIDTHS, strict=True)
    return [torch.randn(batch, num_tokens, width).to(dtype) for num_tokens, width in sizes]


def build(pooling: str, seed: int = 3, **sizes: Any) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(WIDTHS, pooling, **{"num_queries": 2, "head_width": 4, "hidden": 7, **sizes}).double()


def test_the_folded_head_is_the_unfolded_head() -> None:
    head = PoolingHead(10, pooling="attention", num_queries=3, head_width=4, hidden=5, eps=1e-3).double()
    randomised(head)
    plain = UnfoldedHead(10, 3, 4, 5, 1e-3).double()
    plain.load_state_dict(head.state_dict())
    tokens = (2 * torch.randn(4, 13, 10, dtype=torch.float64) + 1).requires_grad_()
    weight = torch.randn(4, dtype=torch.float64)

    logits, expected = head(tokens), plain(tokens)
    assert logits.std() > 1e-3
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=1e-12)

    parameters, others = dict(head.named_parameters()), dict(plain.named_parameters())
    found = torch.autograd.grad((weight * logits).sum(), [tokens, *parameters.values()])
    oracle = torch.autograd.grad((weight * expected).sum(), [tokens, *(others[name] for name in parameters)])
    for name, one, other in zip(["tokens", *parameters], found, oracle, strict=True):
        assert other.abs().max() > 1e-9, f"{name} has no gradient: nothing is compared"
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_the_mean_head_is_global_average_pooling() -> None:
    discriminator = randomised(build("mean"))
    found = discriminator(inputs := features())
    for index, tokens in enumerate(inputs):
        head = discriminator.layer_heads[index]
        normal = F.layer_norm(tokens, tokens.shape[-1:], head.norm.weight, head.norm.bias, eps=1e-6)
        value = (normal @ head.value.weight.T + head.value.bias).mean(dim=1)  # of every token, then averaged
        expected = head.mlp(torch.cat([value, value], dim=1))[:, 0]
        torch.testing.assert_close(found[:, index], expected, atol=1e-12, rtol=1e-12)


def test_the_two_poolings_share_every_parameter_but_queries_and_keys() -> None:
    attention, mean = build("attention").state_dict(), build("mean").state_dict()
    own = attention.keys() - mean.keys()
    assert mean.keys() < attention.keys()
    assert {name.split(".", 2)[2] for name in own} == {"queries", "key.weight"}
    for name, tensor in mean.items():
        assert torch.equal(tensor, attention[name]), f"{name} differs from the same seed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_two_poolings_start_as_one_function(dtype: torch.dtype) -> None:
    inputs = features(dtype)
    attention, mean = build("attention").to(dtype)(inputs), build("mean").to(dtype)(inputs)
    assert attention.shape == (3, len(WIDTHS))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(attention, mean, atol=tolerance, rtol=tolerance)


def test_queries_move_first_and_then_the_poolings_part() -> None:
    attention, mean, inputs = build("attention"), build("mean"), features()
    attention(inputs).sum().backward()
    for index, head in enumerate(attention.layer_heads):
        # With one token there is nothing to weigh: the softmax of a single score has no gradient.
        assert (head.queries.grad.abs().sum() > 1e-12) == (inputs[index].shape[1] > 1)
        assert torch.all(head.key.weight.grad == 0)
    with torch.no_grad():
        for head in attention.layer_heads:
            head.queries.sub_(10 * head.queries.grad)
    gap = (attention(inputs) - mean(inputs)).abs().amax(dim=0)
    assert torch.all(gap[:2] > 1e-4)
    assert gap[2] < 1e-12


def test_token_weights_of_attention() -> None:
    discriminator, inputs = randomised(build("attention")), features()
    weights = discriminator.token_weights([tokens.requires_grad_() for tokens in inputs])
    for tokens, weight, head in zip(inputs, weights, discriminator.layer_heads, strict=True):
        assert weight.shape == (3, 2, tokens.shape[1])
        assert not weight.requires_grad
        torch.testing.assert_close(weight.sum(-1), torch.ones(3, 2, dtype=torch.float64))
        keys = head.norm(tokens) @ head.key.weight.T
        expected = (torch.einsum("bnd,md->bmn", keys, head.queries) / 2).softmax(-1)  # sqrt(head_width) = 2
        torch.testing.assert_close(weight, expected.detach(), atol=1e-12, rtol=1e-12)
    assert weights[0].std() > 1e-3


def test_token_weights_of_the_mean_are_uniform() -> None:
    for tokens, weight in zip(features(), build("mean").token_weights(features()), strict=True):
        assert weight.shape == (3, 2, tokens.shape[1])
        assert torch.all(weight == 1 / tokens.shape[1])


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_gradient_reaches_the_tokens_and_every_parameter(pooling: str) -> None:
    discriminator = randomised(build(pooling))
    inputs = [tokens.requires_grad_() for tokens in features()]
    discriminator(inputs).square().sum().backward()
    for tokens in inputs:
        assert torch.all(tokens.grad.abs().sum(dim=(1, 2)) > 0)
    for name, parameter in discriminator.named_parameters():
        alone = name in ("layer_heads.2.queries", "layer_heads.2.key.weight")  # one token: see above
        assert (parameter.grad.abs().sum() > 1e-12) != alone, name


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_gradcheck_of_the_whole_head(pooling: str) -> None:
    head = randomised(PoolingHead(4, pooling=pooling, num_queries=2, head_width=3, hidden=3, eps=1e-2).double())
    tokens = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, (tokens,))
    assert torch.autograd.gradgradcheck(head, (tokens,))


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_half_precision_features_and_autocast(pooling: str) -> None:
    discriminator = randomised(build(pooling), std=0.1)
    expected = discriminator(inputs := features())
    discriminator.float()
    half = [tokens.bfloat16() for tokens in inputs]
    torch.testing.assert_close(discriminator(half).double(), expected, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = discriminator(half)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph(backend: str) -> None:
    discriminator, inputs = randomised(build("attention")), features()
    torch.compiler.reset()
    found = torch.compile(discriminator, backend=backend, fullgraph=True)(inputs)
    torch.testing.assert_close(found, discriminator(inputs), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([8], "max"), "pooling must be one of attention, scorer, mean; got 'max'"),
        (([8], "mean", {"num_queries": 0}), "num_queries must be an int >= 1; got 0"),
        (([8], "mean", {"num_queries": "4"}), "num_queries must be an int >= 1; got '4'"),
        (([8], "mean", {"num_queries": True}), "num_queries must be an int >= 1; got True"),
        (([8], "mean", {"head_width": 64.0}), r"head_width must be an int >= 1; got 64\.0"),
        (([8], "mean", {"hidden": -1}), "hidden must be an int >= 1; got -1"),
        (([8], "mean", {"eps": 0.0}), "eps must be a number > 0; got 0.0"),
        (([8], "mean", {"eps": "small"}), "eps must be a number > 0; got 'small'"),
        (([8], "mean", {"eps": float("nan")}), "eps must be a number > 0; got nan"),
    ],
)
def test_impossible_sizes(arguments: tuple[Any, ...], message: str) -> None:
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        Discriminator(*positional, **keywords)


@pytest.mark.parametrize(
    ("widths", "given"),
    [
        (64, "64"),
        (64.0, "64.0"),
        (None, "None"),
        ("64", "'64'"),
        ({"blocks.1": 64}, r"\{'blocks.1': 64\}"),
        ([], r"\[\]"),
        ([8, 0], r"\[8, 0\]"),
        (["64"], r"\['64'\]"),
        ([64.0], r"\[64.0\]"),
        ([True], r"\[True\]"),
    ],
)
def test_widths_are_a_sequence_of_ints(widths: Any, given: str) -> None:
    with pytest.raises(ValueError, match=f"sequence of ints >= 1, one for each layer, such as .64.; got {given}$"):
        Discriminator(widths)


def test_widths_may_be_any_sequence_of_ints() -> None:
    for widths in ((8, 6), np.array([8, 6]), torch.Size([8, 6]), (width for width in (8, 6))):
        assert Discriminator(widths).widths == (8, 6)


def test_a_single_head_checks_its_own_sizes() -> None:
    with pytest.raises(ValueError, match=r"width must be an int >= 1; got \[8\]"):
        PoolingHead([8])
    with pytest.raises(ValueError, match="pooling must be one of attention, scorer, mean; got 'gap'"):
        PoolingHead(8, pooling="gap")


@pytest.mark.parametrize("prefix", ["", "discriminator."])
def test_weights_from_before_the_heads_were_renamed_are_loaded(prefix: str) -> None:
    """Alone, and as a part of another module; what the caller holds stays as it was."""
    saved = randomised(build("attention", merge="concatenate"))
    then = {prefix + name.replace("layer_heads.", "heads."): value for name, value in saved.state_dict().items()}
    names = set(then)
    fresh = build("attention", seed=4, merge="concatenate")
    module = nn.ModuleDict({"discriminator": fresh}) if prefix else fresh
    module.load_state_dict(then)
    assert set(then) == names
    inputs = features()
    assert torch.equal(fresh(inputs), saved(inputs))


def test_weights_of_no_version_are_refused() -> None:
    weights = {name.replace("layer_heads.", "layers."): value for name, value in build("mean").state_dict().items()}
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*layer_heads\.0\.norm.*Unexpected.*layers\.0\.norm"):
        build("mean").load_state_dict(weights)


@pytest.mark.parametrize("call", ["forward", "token_weights"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda f: f[:2],
        lambda f: [f[1], f[0], f[2]],
        lambda f: [f[0][0], *f[1:]],
        lambda f: [f[0][:, :0], *f[1:]],
        lambda f: [*f, f[0]],
        lambda f: f[0],
        lambda f: [f[0].tolist(), *f[1:]],
    ],
    ids=["a layer is missing", "order", "no batch", "no tokens", "a layer too many", "a tensor", "lists"],
)
@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_features_that_do_not_fit(call: str, wrong: Callable[..., Any], pooling: str) -> None:
    discriminator = build(pooling)
    with pytest.raises(ValueError, match=r"a list of 3 tensors \(B, N, C\) with N >= 1 and widths \[8, 6, 8\]; got"):
        getattr(discriminator, call)(wrong(features()))
