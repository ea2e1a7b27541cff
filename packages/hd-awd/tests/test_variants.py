"""The discriminator's ablation variants against heads written without folding, and against each other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awd_helpers import randomised
from torch import Tensor

from hd_awd import Discriminator, PoolingHead

WIDTHS = (8, 6)
VARIANTS = [
    {"pooling": pooling, "merge": merge, "pool_over": pool_over, "num_heads": num_heads}
    for pooling, merge, pool_over, num_heads in itertools.product(
        ("attention", "scorer", "mean"), ("logits", "concatenate"), ("features", "logits"), (1, 2)
    )
    if pool_over == "features" or (merge == "logits" and num_heads == 1)
]
NAMES = ["-".join(str(value) for value in variant.values()) for variant in VARIANTS]


def features(batch: int = 3) -> list[Tensor]:
    """One (B, N, C) tensor per width, float64."""
    return [torch.randn(batch, num_tokens, width).double() for num_tokens, width in zip((5, 9), WIDTHS, strict=True)]


def build(seed: int = 3, **settings: Any) -> Discriminator:
    torch.manual_seed(seed)
    return Discriminator(WIDTHS, **{"num_queries": 3, "head_width": 4, "hidden": 7, **settings}).double()


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
@pytest.mark.parametrize("num_queries", [1, 3])
def test_shapes_and_weights(variant: dict[str, Any], num_queries: int) -> None:
    discriminator = randomised(build(num_queries=num_queries, **variant))
    logits = discriminator(inputs := features())
    assert logits.shape == (3, 1 if variant["merge"] == "concatenate" else len(WIDTHS))
    for tokens, weights in zip(inputs, discriminator.token_weights(inputs), strict=True):
        assert weights.shape == (3, num_queries * variant["num_heads"], tokens.shape[1])
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_gradient_reaches_tokens_and_every_parameter(variant: dict[str, Any]) -> None:
    discriminator = randomised(build(**variant))
    inputs = [tokens.requires_grad_() for tokens in features()]
    discriminator(inputs).square().sum().backward()
    assert all(tokens.grad.abs().sum(dim=(1, 2)).min() > 1e-12 for tokens in inputs)
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad.abs().sum() > 1e-12, name


def test_a_scorer_leaves_other_generators_alone_and_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def seed_everything(seed: int) -> None:
        raise AssertionError("this seeds a GPU's generator too")

    monkeypatch.setattr(torch, "manual_seed", seed_everything)
    monkeypatch.setattr(torch.random, "manual_seed", seed_everything)
    with torch.device("meta"):
        head = PoolingHead(8, pooling="scorer")
    assert {one.device.type for one in head.parameters()} == {"meta"}
    assert PoolingHead(8, pooling="scorer").scorer[0].weight.device.type == "cpu"


def test_scorers_are_drawn_from_the_seed_and_differ_from_layer_to_layer() -> None:
    one, same, other = (build(seed, pooling="scorer", num_queries=2).state_dict() for seed in (3, 3, 4))
    for layer in (0, 1):
        first, last = f"layer_heads.{layer}.scorer.0.weight", f"layer_heads.{layer}.scorer.2.weight"
        assert torch.equal(one[first], same[first])
        assert not torch.equal(one[first], other[first])
        assert torch.all(one[last] == 0)
    torch.manual_seed(3)
    twins = Discriminator((8, 8), pooling="scorer").state_dict()
    assert not torch.equal(twins["layer_heads.0.scorer.0.weight"], twins["layer_heads.1.scorer.0.weight"])


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_every_variant_starts_as_global_average_pooling(variant: dict[str, Any]) -> None:
    inputs = features()
    mean = build(**{**variant, "pooling": "mean"})
    torch.testing.assert_close(build(**variant)(inputs), mean(inputs), atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_what_the_poolings_share_is_the_same_from_the_same_seed(variant: dict[str, Any]) -> None:
    ours, mean = build(**variant).state_dict(), build(**{**variant, "pooling": "mean"}).state_dict()
    after = torch.rand(4)
    build(**{**variant, "pooling": "attention"})
    assert torch.equal(after, torch.rand(4)), "the generator is left somewhere else"
    assert mean.keys() <= ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in mean.items())


def test_the_default_variant_keeps_its_names_of_weights() -> None:
    own = {"norm.weight", "norm.bias", "value.weight", "value.bias", "key.weight", "queries"}
    own |= {f"mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(build().state_dict()) == {f"layer_heads.{i}.{name}" for i in range(len(WIDTHS)) for name in own}


def oracle(head: PoolingHead, tokens: Tensor) -> Tensor:
    """The head's logit from its equations, with keys, values and scores of every single token."""
    normal = F.layer_norm(tokens, tokens.shape[-1:], head.norm.weight, head.norm.bias, head.eps)
    values = normal @ head.value.weight.T + head.value.bias
    shape = (len(tokens), tokens.shape[1], head.num_heads, -1)
    if head.pooling == "attention":
        keys = (normal @ head.key.weight.T).reshape(shape)
        queries = head.queries.reshape(head.num_queries, head.num_heads, -1)
        scores = torch.einsum("bnhd,mhd->bmhn", keys, queries) / keys.shape[-1] ** 0.5
    elif head.pooling == "scorer":
        scores = head.scorer(normal).reshape(*shape[:2], head.num_queries, head.num_heads).permute(0, 2, 3, 1)
    else:
        scores = tokens.new_zeros(len(tokens), head.num_queries, head.num_heads, tokens.shape[1])
    weights = scores.softmax(dim=-1)
    if head.pool_over == "logits":
        return (weights[:, :, 0] * head.mlp(values).transpose(1, 2)).sum(-1).mean(1)
    pooled = torch.einsum("bmhn,bnhd->bmhd", weights, values.reshape(shape))
    return head.mlp(pooled.flatten(1))[:, 0]


@pytest.mark.parametrize("pooling", ["attention", "scorer", "mean"])
@pytest.mark.parametrize(("pool_over", "num_heads"), [("features", 1), ("features", 2), ("features", 4), ("logits", 1)])
def test_equals_the_head_without_folding(pooling: str, pool_over: str, num_heads: int) -> None:
    sizes = {"num_queries": 3, "head_width": 8, "hidden": 5}
    head = randomised(
        PoolingHead(10, pooling=pooling, pool_over=pool_over, num_heads=num_heads, eps=1e-3, **sizes).double()
    )
    tokens = (2 * torch.randn(4, 13, 10, dtype=torch.float64) + 1).requires_grad_()
    found, expected = head(tokens), oracle(head, tokens)
    assert found.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    wanted = [tokens, *head.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_heads_are_multihead_attentions(num_heads: int) -> None:
    """torch's own multi-head attention with the same weights, before its output projection."""
    head = randomised(PoolingHead(6, num_queries=3, num_heads=num_heads, head_width=8, hidden=5).double())
    tokens = torch.randn(2, 7, 6, dtype=torch.float64)
    normal = head.norm(tokens).transpose(0, 1)
    queries = head.queries.detach()[:, None].expand(-1, 2, -1)
    eye, zero = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    expected, _ = F.multi_head_attention_forward(
        queries, normal, normal, 8, num_heads, None, torch.cat([zero, zero, head.value.bias]), None, None, False, 0.0,
        eye, zero, use_separate_proj_weight=True, q_proj_weight=eye, k_proj_weight=head.key.weight,
        v_proj_weight=head.value.weight,
    )  # fmt: skip
    torch.testing.assert_close(head.vectors(tokens), expected.transpose(0, 1).flatten(1), atol=1e-12, rtol=1e-12)


def test_concatenation_sees_the_layers_in_order() -> None:
    discriminator = randomised(build(merge="concatenate"))
    inputs = features()
    vectors = [head.vectors(tokens) for head, tokens in zip(discriminator.layer_heads, inputs, strict=True)]
    torch.testing.assert_close(discriminator(inputs), discriminator.mlp(torch.cat(vectors, dim=1)))
    assert not any("mlp" in name for name in discriminator.layer_heads[0].state_dict())


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_compiles_to_one_graph_and_takes_half_precision(variant: dict[str, Any]) -> None:
    discriminator, inputs = randomised(build(**variant), std=0.1), features()
    expected = discriminator(inputs)
    torch.compiler.reset()
    found = torch.compile(discriminator, backend="aot_eager", fullgraph=True)(inputs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    half = discriminator.float()([tokens.bfloat16() for tokens in inputs])
    torch.testing.assert_close(half.double(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of attention, scorer, mean; got 'max'"),
        ({"merge": "sum"}, "merge must be one of logits, concatenate; got 'sum'"),
        ({"pool_over": "tokens"}, "pool_over must be one of features, logits; got 'tokens'"),
        ({"num_heads": 3}, "num_heads must divide head_width; got 3 and 4"),
        ({"num_heads": 0}, "num_heads must be an int >= 1; got 0"),
        ({"pool_over": "logits", "num_heads": 2}, "num_heads 1 alone.*; got num_heads 2"),
        ({"pool_over": "logits", "merge": "concatenate"}, "merge \"logits\" alone.*; got merge 'concatenate'"),
    ],
)
def test_impossible_variants(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)
