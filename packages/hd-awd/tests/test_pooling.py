"""attention_pool against its definition: values, shapes, dtypes, masks, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awd_helpers import naive_pool
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from hd_awd import attention_pool
from hd_awd.pooling.reference import attention_pool_reference

TINY = {"atol": 1e-11, "rtol": 1e-11}  # float64: rounding and no more


@pytest.mark.parametrize(("batch", "num_tokens", "width"), [(1, 1, 2), (2, 1, 5), (3, 7, 1), (2, 16, 12), (1, 65, 33)])
@pytest.mark.parametrize("queries", [1, 2, 16])
@pytest.mark.parametrize(
    "bias_shape", [None, (), (1,), ("N",), ("M", "N"), (1, "M", 1), ("B", 1, "N"), ("B", "M", "N")]
)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_definition(
    batch: int, num_tokens: int, width: int, queries: int, bias_shape: Any, masked: bool
) -> None:
    tokens = 3 * torch.randn(batch, num_tokens, width, dtype=torch.float64) + 1
    q = torch.randn(queries, width, dtype=torch.float64)
    sizes = {"B": batch, "M": queries, "N": num_tokens}
    bias = None if bias_shape is None else torch.randn([sizes.get(s, s) for s in bias_shape], dtype=torch.float64)
    mask = torch.rand(batch, num_tokens) < 0.6 if masked else None
    found = attention_pool(tokens, q, bias, mask, 1e-5, return_weights=True)
    expected = naive_pool(tokens, q, bias, mask, 1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TINY)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def draw(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    batch, num_tokens, width, queries = draw("B", 1, 4), draw("N", 1, 40), draw("C", 1, 40), draw("M", 1, 16)
    generator = torch.Generator().manual_seed(draw("seed", 0, 2**31))
    spread = data.draw(st.sampled_from([1e-2, 1.0, 30.0]), label="spread")
    offset = data.draw(st.sampled_from([0.0, -5.0, 1e3]), label="offset")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens, q = spread * normal(batch, num_tokens, width) + offset, normal(queries, width)
    bias = normal(batch, 1, num_tokens) if data.draw(st.booleans(), label="bias") else None
    mask = torch.rand(batch, num_tokens, generator=generator) < 0.5 if data.draw(st.booleans(), label="mask") else None
    # The mean is removed after the products: rounding grows with a token's size over its spread.
    ratio = (tokens.abs().amax(-1) / (tokens.var(-1, correction=0) + 1e-6).sqrt()).max().item()
    found, expected = attention_pool(tokens, q, bias, mask, return_weights=True), naive_pool(tokens, q, bias, mask)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-13 * (1 + ratio) * width, rtol=1e-9)


def test_the_shipped_reference_is_the_definition() -> None:
    tokens, q = torch.randn(3, 6, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6])
    bias = torch.randn(2, 6, dtype=torch.float64)
    found, expected = attention_pool_reference(tokens, q, bias, mask), naive_pool(tokens, q, bias, mask)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TINY)


def test_weights_are_scipys_softmax_of_the_scores() -> None:
    tokens, q = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    scores = torch.einsum("bnc,mc->bmn", F.layer_norm(tokens, (6,), eps=1e-6), q)
    weights = attention_pool(tokens, q, return_weights=True)[1]
    torch.testing.assert_close(weights, torch.from_numpy(softmax(scores.numpy(), axis=-1)), **TINY)


def test_zero_queries_are_the_mean() -> None:
    tokens = torch.randn(4, 11, 7, dtype=torch.float64) + 2
    pooled, weights = attention_pool(tokens, torch.zeros(3, 7, dtype=torch.float64), return_weights=True)
    mean = F.layer_norm(tokens, (7,), eps=1e-6).mean(dim=1, keepdim=True)
    torch.testing.assert_close(pooled, mean.expand(-1, 3, -1), atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 11), atol=0, rtol=1e-15)


def test_a_constant_added_to_all_queries_or_tokens_changes_nothing() -> None:
    tokens, q = torch.randn(2, 8, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    plain = attention_pool(tokens, q)
    torch.testing.assert_close(attention_pool(tokens, q + 5), plain, **TINY)
    torch.testing.assert_close(attention_pool(tokens + 5, q), plain, **TINY)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_dtypes(dtype: torch.dtype, tolerance: float, offset: float) -> None:
    tokens = (torch.randn(2, 50, 64) + offset).to(dtype)
    q, bias = 0.3 * torch.randn(4, 64), torch.randn(4, 50)
    pooled, weights = attention_pool(tokens, q.to(dtype), bias.to(dtype), return_weights=True)
    wide = torch.promote_types(dtype, torch.float32)
    assert (pooled.dtype, weights.dtype) == (dtype, wide)
    # Exact inputs of that precision; only the output's rounding and float32 arithmetic are left.
    expected = naive_pool(tokens.double(), q.to(dtype).double(), bias.to(dtype).double())
    torch.testing.assert_close(pooled.double(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(weights.double(), expected[1], atol=min(tolerance, 2e-5), rtol=1e-4)


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
def test_a_large_mean_offset_costs_digits_in_proportion(offset: float) -> None:
    """Tokens of spread 1 far from zero: float32 stores them to eps * offset, and a few times that is left."""
    tokens, q = torch.randn(2, 40, 64) + offset, 0.3 * torch.randn(4, 64)
    expected = naive_pool(tokens.double(), q.double())[0]
    atol = 16 * torch.finfo(torch.float32).eps * offset
    torch.testing.assert_close(attention_pool(tokens, q).double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.bfloat16])
def test_mixed_dtypes_follow_the_tokens(bias_dtype: torch.dtype) -> None:
    tokens, q, bias = (
        torch.randn(2, 5, 6),
        torch.randn(2, 6, dtype=torch.float64),
        torch.randn(5).to(bias_dtype),
    )
    pooled, weights = attention_pool(tokens, q, bias, return_weights=True)
    assert (pooled.dtype, weights.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(pooled, attention_pool(tokens, q.float(), bias.float()), atol=1e-6, rtol=1e-5)


def test_autocast_does_not_lower_the_arithmetic() -> None:
    tokens, q = torch.randn(2, 50, 64) + 20, torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention_pool(tokens, q)
    assert torch.equal(inside, attention_pool(tokens, q))


def test_strides_do_not_matter() -> None:
    tokens, q = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    twisted = tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.randn(3, 10, 16, dtype=torch.float64)
    wide[:, ::2, ::2] = tokens
    columns = q.T.contiguous().T
    expected = attention_pool(tokens, q)
    assert not twisted.is_contiguous()
    for one in (twisted, wide[:, ::2, ::2]):
        torch.testing.assert_close(attention_pool(one, columns), expected, **TINY)


def test_a_masked_token_has_no_say() -> None:
    tokens, q = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False, True]] * 2)
    pooled, weights = attention_pool(tokens, q, mask=mask, return_weights=True)
    assert torch.all(weights[:, :, [2, 4]] == 0)
    torch.testing.assert_close(pooled, attention_pool(tokens[:, mask[0]], q), **TINY)


def test_a_fully_masked_sample_pools_to_zero() -> None:
    tokens, q = torch.randn(2, 4, 5), torch.randn(3, 5)
    mask = torch.tensor([[False] * 4, [True] * 4])
    pooled, weights = attention_pool(tokens, q, mask=mask, return_weights=True)
    assert torch.all(pooled[0] == 0)
    assert torch.all(weights[0] == 0)
    torch.testing.assert_close(pooled[1], attention_pool(tokens[1:], q)[0])


def test_one_token_gets_all_the_weight_and_constant_tokens_stay_finite() -> None:
    tokens, q = torch.randn(2, 1, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    pooled, weights = attention_pool(tokens, q, return_weights=True)
    assert torch.all(weights == 1)
    torch.testing.assert_close(pooled, F.layer_norm(tokens, (6,), eps=1e-6).expand(-1, 3, -1), **TINY)
    flat = attention_pool(torch.full((2, 4, 6), 3.0, dtype=torch.float64), q)
    torch.testing.assert_close(flat, torch.zeros_like(flat), atol=1e-11, rtol=0)


def test_inputs_are_left_alone() -> None:
    tokens, q, bias = torch.randn(2, 5, 6), torch.randn(3, 6), torch.randn(3, 5)
    copies = [tensor.clone() for tensor in (tokens, q, bias)]
    attention_pool(tokens, q, bias, torch.rand(2, 5) < 0.5)
    assert all(torch.equal(one, other) for one, other in zip((tokens, q, bias), copies, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.randn(5, 6)}, r"tokens must have shape \(B, N, C\).*\(5, 6\)"),
        ({"tokens": torch.randn(2, 0, 6)}, "N and C >= 1"),
        ({"tokens": torch.randn(2, 5, 0), "queries": torch.randn(3, 0)}, "N and C >= 1"),
        ({"tokens": torch.ones(2, 5, 6, dtype=torch.long)}, "floating point; got torch.int64"),
        ({"queries": torch.ones(3, 6, dtype=torch.long)}, "floating point.*torch.int64"),
        ({"queries": torch.randn(3, 7)}, r"queries must have shape \(M, 6\), M >= 1; got \(3, 7\)"),
        ({"queries": torch.randn(0, 6)}, r"M >= 1; got \(0, 6\)"),
        ({"queries": torch.randn(6)}, "queries must have shape"),
        ({"bias": torch.randn(4, 5)}, r"bias must broadcast to \(2, 3, 5\); got \(4, 5\)"),
        ({"bias": torch.randn(1, 2, 3, 5)}, "bias must broadcast"),
        ({"bias": torch.ones(2, 1, 5, dtype=torch.bool)}, "bias must be floating point.*bool"),
        ({"mask": torch.ones(2, 5)}, r"mask must be bool of shape \(2, 5\); got torch.float32"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask must be bool.*\(5,\)"),
        ({"eps": 0.0}, "eps must be > 0; got 0.0"),
        ({"eps": float("nan")}, "eps must be > 0; got nan"),
    ],
)
def test_errors_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    arguments = {"tokens": torch.randn(2, 5, 6), "queries": torch.randn(3, 6), **change}
    with pytest.raises(ValueError, match=message):
        attention_pool(**arguments)
