"""torch.compile takes the kernels as one operator of the graph; PyTorch's own checks of both operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from awd_helpers import make_case
from torch import Tensor

from hd_awd import attention_pool

COMPILERS = pytest.mark.parametrize("compiler", ["eager", "aot_eager"])


# Dynamo makes an autograd Function's context in a way that torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _forget_compiled_graphs() -> None:
    torch.compiler.reset()


def call(tokens: Tensor, queries: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    pooled, weights = attention_pool(tokens, queries, bias, mask, return_weights=True, backend="triton")
    return pooled.square().flatten(1).sum(1) + weights.square().flatten(1).sum(1)


def with_gradients(function: Any, case: Any) -> list[Tensor]:
    leaves = [one.detach().requires_grad_() for one in (case.tokens, case.queries, case.bias) if one is not None]
    value = function(*leaves[:2], leaves[2] if len(leaves) > 2 else None, case.mask)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


@COMPILERS
@pytest.mark.parametrize(("bias", "masked"), [(None, False), (("M", "N"), True)], ids=str)
def test_a_graph_gives_the_same(device: str, compiler: str, bias: tuple[Any, ...] | None, masked: bool) -> None:
    case = make_case((2, 7, 24, 3), device=device, bias=bias, masked=masked)
    graph = torch.compile(call, backend=compiler, fullgraph=True)
    for found, expected in zip(with_gradients(graph, case), with_gradients(call, case), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_second_derivatives_of_a_graph(device: str) -> None:
    """Exact where the graph keeps autograd, an error where it does not: never a sum that lacks them."""
    case = make_case((2, 7, 24, 3), device=device)

    def second(function: Any) -> tuple[Tensor, ...]:
        leaves = [case.tokens.detach().requires_grad_(), case.queries.detach().requires_grad_()]
        (first,) = torch.autograd.grad(function(*leaves, None, None).sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(first.square().sum() + leaves[0].sum(), leaves)

    found = second(torch.compile(call, backend="eager", fullgraph=True))
    for one, two in zip(found, second(call), strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="double backward"):
        second(torch.compile(call, backend="aot_eager", fullgraph=True))


@COMPILERS
def test_half_precision_in_a_graph(device: str, compiler: str) -> None:
    case = make_case((2, 7, 24, 3), torch.bfloat16, device, layout="tokens first")
    graph = torch.compile(call, backend=compiler, fullgraph=True)
    for found, expected in zip(with_gradients(graph, case), with_gradients(call, case), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


@COMPILERS
@pytest.mark.parametrize("marked", [False, True])
def test_a_graph_takes_another_batch(device: str, compiler: str, marked: bool) -> None:
    graphs = 0

    def counting(graph: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(compiler)(graph, example)

    graph = torch.compile(call, backend=counting, fullgraph=True, dynamic=None)
    for batch, num_tokens in ((2, 7), (3, 9), (5, 11)):
        case = make_case((batch, num_tokens, 24, 3), device=device)
        if marked:
            for dimension in (0, 1):
                torch._dynamo.mark_dynamic(case.tokens, dimension)
        for found, expected in zip(with_gradients(graph, case), with_gradients(call, case), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert graphs <= 2, "sizes were built into the graph"


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.float32), ("tokens first", torch.bfloat16), ("sliced", torch.float32)],
    ids=str,
)
def test_operators_pass_pytorchs_checks(device: str, layout: str, dtype: torch.dtype) -> None:
    """Schema, no aliasing or mutation, shapes, strides and dtypes without data, and both in a dynamic graph."""
    case = make_case((2, 5, 24, 3), dtype, device, bias=("B", "M", "N"), masked=True, weights=True, layout=layout)
    lse, delta = torch.randn(2, 2, 3, device=device) + 9
    ops, first = torch.ops.hd_awd, (case.tokens, case.queries, case.full_bias, case.mask)
    for want, want_tokens in [(False, True), (True, False)] if layout == "contiguous" else [(True, True)]:
        torch.library.opcheck(ops.attention_pool.default, (*first, case.eps, want, True))
        back = (*first, case.eps, case.grad_pooled.contiguous(), case.grad_weights if want else None, lse, delta)
        torch.library.opcheck(ops.attention_pool_backward.default, (*back, want_tokens, want, True))


def test_operators_pass_pytorchs_checks_without_options(device: str) -> None:
    for batch in (0, 2):
        case = make_case((batch, 5, 24, 3), device=device)
        lse, delta = torch.zeros(2, batch, 3, device=device)
        ops, first = torch.ops.hd_awd, (case.tokens, case.queries, None, None)
        torch.library.opcheck(ops.attention_pool.default, (*first, case.eps, False, True))
        back = (*first, case.eps, case.grad_pooled, None, lse, delta, True, False, True)
        torch.library.opcheck(ops.attention_pool_backward.default, back)
