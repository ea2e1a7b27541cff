"""Forward mode, torch.func and torch.compile around the op: exact or refused, never a silent zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hd_awd import attention_pool
from hd_awd.pooling.reference import attention_pool_reference

COMPILERS = pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
Function = Callable[[Tensor], Tensor]


def dual(function: Function, point: Tensor, way: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(point, way))).tangent


def jvp(function: Function, point: Tensor, way: Tensor) -> Tensor:
    return torch.func.jvp(function, (point,), (way,))[1]


FORWARD_MODES = pytest.mark.parametrize("forward_mode", [dual, jvp])


# Dynamo makes an autograd Function's context in a way that torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _forget_compiled_graphs() -> None:
    torch.compiler.reset()


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (2, 5, 6), queries (3, 6), and a direction for the tokens."""
    tokens, queries, way = torch.randn(2, 5, 6), torch.randn(3, 6), torch.randn(2, 5, 6)
    return tokens.to(device, dtype), queries.to(device, dtype), way.to(device, dtype)


def pooling(queries: Tensor, backend: str) -> Function:
    def function(tokens: Tensor) -> Tensor:
        pooled, weights = attention_pool(tokens, queries, return_weights=True, backend=backend)
        return torch.cat([pooled.square().flatten(), weights.flatten()])

    return function


@FORWARD_MODES
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_forward_mode_against_finite_differences(forward_mode: Any, backend: str) -> None:
    tokens, queries, way = inputs()
    function, step = pooling(queries, backend), 1e-5
    slope = (function(tokens + step * way) - function(tokens - step * way)) / (2 * step)
    assert slope.abs().max() > 0.1
    torch.testing.assert_close(forward_mode(function, tokens, way), slope, atol=1e-8, rtol=1e-7)


@FORWARD_MODES
def test_forward_mode_where_the_kernels_could_be_chosen(device: str, forward_mode: Any) -> None:
    tokens, queries, way = inputs(device, torch.float32)
    found = forward_mode(lambda x: attention_pool(x, queries), tokens, way)

    def reference(x: Tensor) -> Tensor:
        return attention_pool_reference(x, queries.cpu().double())[0]

    expected = jvp(reference, tokens.cpu().double(), way.cpu().double())
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-5, rtol=1e-5)


@FORWARD_MODES
def test_forward_mode_is_refused_by_the_kernels(device: str, forward_mode: Any) -> None:
    tokens, queries, way = inputs(device, torch.float32)
    with pytest.raises(RuntimeError, match="forward-mode derivative"):
        forward_mode(pooling(queries, "triton"), tokens, way)


def test_forward_mode_is_refused_by_the_operators_autograd(device: str) -> None:
    """Beneath the public op's own check: the autograd Function has no forward-mode rule, and says so."""
    from hd_awd.pooling.autograd import pool_op

    tokens, queries, way = inputs(device, torch.float32)
    for triton in (False, True):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            dual(lambda x, t=triton: pool_op(x, queries, None, None, 1e-6, False, t)[0], tokens, way)


@COMPILERS
@FORWARD_MODES
@pytest.mark.parametrize("fullgraph", [True, False])
def test_forward_mode_within_a_graph(device: str, compiler: str, forward_mode: Any, fullgraph: bool) -> None:
    """The kernels raise, PyTorch's operations are exact."""
    tokens, queries, way = inputs(device, torch.float32)
    expected = forward_mode(pooling(queries, "torch"), tokens, way)

    def compiled(backend: str) -> Any:
        function = pooling(queries, backend)
        graph = torch.compile(lambda x, v: forward_mode(function, x, v), backend=compiler, fullgraph=fullgraph)
        return graph(tokens, way)

    torch.testing.assert_close(compiled("torch"), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError):
        compiled("triton")


@COMPILERS
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("warm", [False, True])
def test_forward_mode_through_a_graph(device: str, compiler: str, fullgraph: bool, warm: bool) -> None:
    """The function is compiled, possibly used, and then differentiated from outside."""
    tokens, queries, way = inputs(device, torch.float32)
    for backend in ("torch", "triton"):
        graph = torch.compile(pooling(queries, backend), backend=compiler, fullgraph=fullgraph)
        plain = graph(tokens) if warm else None
        if backend == "torch":
            expected = dual(pooling(queries, "torch"), tokens, way)
            torch.testing.assert_close(dual(graph, tokens, way), expected, atol=1e-5, rtol=1e-5)
        else:
            with pytest.raises(RuntimeError):
                dual(graph, tokens, way)
        if warm:
            assert torch.equal(graph(tokens), plain)


def test_vmap_and_grad_of_the_torch_path() -> None:
    tokens, queries, _ = inputs()
    function = pooling(queries, "torch")
    apart = torch.func.vmap(lambda x: function(x[None]))(tokens)
    torch.testing.assert_close(apart, torch.stack([function(x[None]) for x in tokens]))
    leaf = tokens.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: function(x).square().sum())(tokens), expected)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: function(x[None]).square().sum()))(tokens)
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_torch_func_is_refused_by_the_kernels(device: str, transform: Any) -> None:
    tokens, queries, _ = inputs(device, torch.float32)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        transform(lambda x: attention_pool(x.reshape(-1, 5, 6), queries, backend="triton"))(tokens)
