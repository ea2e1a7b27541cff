"""attention_pool's first and second derivatives, and its way through torch.compile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from awd_helpers import naive_pool
from torch import Tensor

from hd_awd import attention_pool

MASK = torch.tensor([[True, False, True, True], [False] * 4])  # the second sample has no token at all


def inputs(num_tokens: int = 4, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (2, N, C), queries (2, C), bias (2, 1, N) in float64, all wanting gradients."""
    shapes = ((2, num_tokens, width), (2, width), (2, 1, num_tokens))
    tokens, queries, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return tokens, queries, bias


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_against_finite_differences(mask: Tensor | None, order: int) -> None:
    def pool(tokens: Tensor, queries: Tensor, bias: Tensor) -> Any:
        return attention_pool(tokens, queries, bias, mask, 1e-2, return_weights=True)

    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(pool, inputs())


def test_gradients_equal_the_definitions() -> None:
    arguments = inputs(7, 5)
    grads = []
    for pool in (attention_pool, lambda *a: naive_pool(*a)[0]):
        loss = pool(*arguments).mul(torch.arange(5.0, dtype=torch.float64)).square().sum()
        grads.append(torch.autograd.grad(loss, arguments))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_fully_masked_samples_have_zero_gradients_and_no_nan_on_the_way() -> None:
    tokens, queries, bias = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly mode says that it is slow
        # Looks at every intermediate gradient: a NaN that a later operation hides is still found.
        with torch.autograd.detect_anomaly(check_nan=True):
            attention_pool(tokens, queries, bias, MASK).square().sum().backward()
    assert torch.all(tokens.grad[1] == 0)
    assert torch.all(tokens.grad[0, 1] == 0)
    assert torch.all(bias.grad[1] == 0)
    assert tokens.grad[0, 0].abs().sum() > 0
    assert queries.grad.isfinite().all()
    assert queries.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_come_back_in_the_tokens_dtype(dtype: torch.dtype) -> None:
    tokens = torch.randn(2, 9, 16).to(dtype).requires_grad_()
    queries = torch.randn(3, 16, requires_grad=True)
    attention_pool(tokens, queries).float().square().sum().backward()
    assert (tokens.grad.dtype, queries.grad.dtype) == (dtype, torch.float32)
    wide = tokens.detach().double().requires_grad_()
    attention_pool(wide, queries.detach().double()).square().sum().backward()
    torch.testing.assert_close(tokens.grad.double(), wide.grad, atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(backend: str, masked: bool) -> None:
    def pool(tokens: Tensor, queries: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        return attention_pool(tokens, queries, bias, mask)

    torch.compiler.reset()
    compiled = torch.compile(pool, backend=backend, fullgraph=True)
    arguments = (*inputs(), MASK if masked else None)
    found, expected = compiled(*arguments), pool(*arguments)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-13)
    one = torch.autograd.grad(found.square().sum(), arguments[:3])
    other = torch.autograd.grad(expected.square().sum(), arguments[:3])
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def minus_infinity(tokens: Tensor, queries: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The mask as a bias: -inf at single tokens of the first sample, at all of the second."""
    return attention_pool(
        tokens, queries, bias.masked_fill(~MASK[:, None], float("-inf")), eps=1e-2, return_weights=True, backend=backend
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bias_of_minus_infinity_is_a_mask(compiled: bool) -> None:
    """Values, first and second derivatives, in every path; where no token is left all of them are zero."""
    arguments = inputs()

    def second(pool: Any) -> list[Tensor]:
        outputs = pool(*arguments)
        first = torch.autograd.grad(sum(one.square().sum() for one in outputs), arguments, create_graph=True)
        return [*outputs, *first, *torch.autograd.grad(sum(one.square().sum() for one in first), arguments)]

    def by_bias(*arguments: Tensor) -> Any:
        return minus_infinity(*arguments, "torch")

    torch.compiler.reset()
    found = second(torch.compile(by_bias, backend="eager", fullgraph=True) if compiled else by_bias)
    expected = second(lambda *a: attention_pool(*a, MASK, 1e-2, return_weights=True))
    for one, two in zip(found, expected, strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)
    assert all(torch.all(one[1] == 0) for one in (*found[:3], found[4], found[5]) if one.shape[0] == 2)
