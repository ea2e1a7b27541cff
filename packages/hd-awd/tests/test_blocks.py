"""The PyTorch path with its backward by hand: values, gradients, blocks, memory, what an operator must keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from awd_helpers import naive_pool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hd_awd import attention_pool
from hd_awd.pooling import autograd, blocks
from hd_awd.pooling.folded import attention_pool_folded
from hd_awd.pooling.inputs import Incoming, PoolInputs

SHAPES = {"none": None, "N": (7,), "MN": (3, 7), "BMN": (4, 3, 7), "B1N": (4, 1, 7), "M1": (3, 1)}


def inputs(batch: int = 4, num_tokens: int = 7, width: int = 5, num_queries: int = 3) -> tuple[Tensor, Tensor]:
    tokens = 2 * torch.randn(batch, num_tokens, width, dtype=torch.float64) + 1
    return tokens.requires_grad_(), torch.randn(num_queries, width, dtype=torch.float64, requires_grad=True)


def in_blocks_of(elements: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many elements for each of so many threads."""
    monkeypatch.setattr(blocks, "THREAD_ELEMENTS", elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


@pytest.mark.parametrize("bias_shape", list(SHAPES))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("elements", "threads"),
    [(2 * 5, 1), (3 * 5, 3), (7 * 5, 1), (3 * 7 * 5, 1), (9 * 7 * 5, 1)],
    ids=["two tokens", "three tokens of three samples", "one sample", "three and one", "all"],
)
def test_equals_autograd_through_the_folded_form(
    bias_shape: str, masked: bool, elements: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of tokens, queries and bias, through vectors and through weights, however tokens are divided."""
    in_blocks_of(elements, threads, monkeypatch)
    tokens, queries = inputs()
    shape = SHAPES[bias_shape]
    bias = None if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 7) < 0.6 if masked else None
    if mask is not None:
        mask[:, 0], mask[1] = True, False
    wanted = [one for one in (tokens, queries, bias) if one is not None]
    ways = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 7, dtype=torch.float64)
    ours = attention_pool(tokens, queries, bias, mask, return_weights=True, backend="torch")
    other = attention_pool_folded(tokens, queries, bias, mask)
    for one, two in zip(ours, other, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)
    for one, two in zip(torch.autograd.grad(ours, wanted, ways), torch.autograd.grad(other, wanted, ways), strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_input_alone_may_want_a_gradient(index: int) -> None:
    tokens, queries = inputs()
    arguments = [tokens.detach(), queries.detach(), torch.randn(3, 7, dtype=torch.float64)]
    arguments[index].requires_grad_()
    found = torch.autograd.grad(attention_pool(*arguments).square().sum(), arguments[index])[0]
    expected = torch.autograd.grad(naive_pool(*arguments)[0].square().sum(), arguments[index])[0]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)


def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    """A discriminator's own step: features come from a frozen network, only the queries learn."""
    tokens, queries = (one.detach().float() for one in inputs(12, 16, 32))
    given = PoolInputs(tokens, queries, None, None, 1e-6)
    pooled, lse, _ = blocks.pool_forward(given, False)
    incoming = Incoming(pooled, None, lse, pooled.square().sum(-1), want_tokens=True, want_bias=True)
    every = blocks.pool_backward(given, incoming)
    some = blocks.pool_backward(given, dataclasses.replace(incoming, want_tokens=False, want_bias=False))
    none, queries_alone, no_scores = some
    assert (none.numel(), no_scores.numel(), none.dtype) == (0, 0, tokens.dtype)
    assert torch.equal(queries_alone, every[1])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_second_derivatives_of_some_inputs(wanted: tuple[int, ...]) -> None:
    """Of each first derivative that was taken, in each input that wants one."""
    tokens, queries = inputs()
    arguments = [tokens.detach(), queries.detach(), torch.randn(3, 7, dtype=torch.float64)]
    leaves = [arguments[index].requires_grad_() for index in wanted]

    def second(pool: Any) -> tuple[Tensor, ...]:
        pooled, weights = pool(*arguments)
        first = torch.autograd.grad(pooled.square().sum() + weights.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), leaves)

    found = second(lambda *a: attention_pool(*a, eps=1e-2, return_weights=True))
    expected = second(lambda *a: attention_pool_folded(*a, eps=1e-2))
    for one, two in zip(found, expected, strict=True):
        assert two.abs().max() > 1e-3
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)


def test_a_batch_of_gradients() -> None:
    tokens, queries = inputs()
    pooled = attention_pool(tokens, queries)
    ways = torch.randn(3, *pooled.shape, dtype=pooled.dtype)
    found = torch.autograd.grad(pooled, (tokens, queries), ways, is_grads_batched=True, retain_graph=True)
    for i, way in enumerate(ways):
        for one, batched in zip(
            torch.autograd.grad(pooled, (tokens, queries), way, retain_graph=True), found, strict=True
        ):
            torch.testing.assert_close(batched[i], one)


def test_a_pooling_from_outside_of_forward_mode_is_refused_within() -> None:
    tokens, queries = inputs()
    loss = attention_pool(tokens, queries).square().sum()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="outside of forward mode"):
        loss.backward()


def test_a_large_offset_costs_no_more_than_storing_it() -> None:
    tokens, queries = torch.randn(2, 40, 64) + 1e4, 0.3 * torch.randn(4, 64)
    expected = naive_pool(tokens.double(), queries.double())[0]
    torch.testing.assert_close(attention_pool(tokens, queries).double(), expected, atol=2e-3, rtol=0)
    assert (attention_pool_folded(tokens, queries)[0].double() - expected).abs().max() > 4e-3


def test_every_thread_has_whole_samples_or_even_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch has as many: two of 100,000 elements are nearer to a core's share than three."""
    for threads, found in ((1, (2, 100)), (2, (4, 100)), (8, (7, 100))):
        in_blocks_of(240_000, threads, monkeypatch)
        assert blocks._block(torch.zeros(7, 100, 1000), torch.float32)[:2] == found
    in_blocks_of(240_000, 2, monkeypatch)
    samples, rows, memory = blocks._block(torch.zeros(5, 1000, 1000), torch.float32)
    assert (samples, rows, memory.numel()) == (2, 250, 500_000)
    assert blocks._block(torch.zeros(1, 1000, 1000), torch.float32)[:2] == (1, 500)
    assert blocks._block(torch.zeros(5, 3, 1_000_000), torch.float32)[:2] == (2, 1)
    assert [len(range(7)[one]) for one in blocks._slices(7, 3)] == [3, 3, 1]
    assert list(blocks._slices(0, 0)) == []


def test_queries_far_from_zero_cost_no_digits() -> None:
    """A query's mean has no effect on normalised tokens."""
    tokens, queries = torch.randn(2, 64, 256), torch.randn(4, 256) / 16
    expected = naive_pool(tokens.double(), queries.double())[0]
    for offset in (0.0, 1.0, 10.0):
        found = attention_pool(tokens, queries + offset)
        rounded = naive_pool(tokens.double(), (queries + offset).double())[0]
        assert ((found.double() - rounded).norm() / rounded.norm()).item() < 1e-6
        assert ((found.double() - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_any_layout_under_autocast(layout: str, dtype: torch.dtype) -> None:
    """Autocast would take the products in 16 bits; tokens and incoming gradients need not be contiguous."""
    base = torch.randn(3, 20, 32) if layout == "contiguous" else torch.randn(3, 32, 20).transpose(1, 2)
    base = torch.randn(3, 20, 64)[..., ::2] if layout == "sliced" else base
    tokens, queries = base.to(dtype).requires_grad_(), torch.randn(2, 32, requires_grad=True)
    start = torch.randn(32, 2, 3).permute(2, 1, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = attention_pool(tokens, queries)
        found = torch.autograd.grad(pooled, (tokens, queries), start.to(pooled.dtype))
    wide = [one.detach().double().requires_grad_() for one in (tokens, queries)]
    expected = torch.autograd.grad(naive_pool(*wide)[0], wide, start.to(dtype).double())
    for one, two, limit in zip(found, expected, (1e-2 if dtype == torch.bfloat16 else 1e-5, 1e-5), strict=True):
        assert ((one.double() - two).norm() / two.norm()).item() < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens(dtype: torch.dtype) -> None:
    tokens, queries = torch.randn(3, 20, 32).to(dtype).requires_grad_(), torch.randn(2, 32, requires_grad=True)
    pooled = attention_pool(tokens, queries)
    found = torch.autograd.grad(pooled.float().square().sum(), (tokens, queries))
    wide = [one.detach().double().requires_grad_() for one in (tokens, queries)]
    expected = torch.autograd.grad(naive_pool(*wide)[0].square().sum(), wide)
    for one, two in zip(found, expected, strict=True):
        assert ((one.double() - two).norm() / two.norm()).item() < 1e-2


def test_a_batch_of_none() -> None:
    tokens, queries = torch.randn(0, 4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    pooled, weights = attention_pool(tokens, queries, return_weights=True)
    assert (pooled.shape, weights.shape) == ((0, 3, 5), (0, 3, 4))
    (pooled.sum() + weights.sum()).backward()
    assert tokens.grad.shape == (0, 4, 5)
    assert torch.all(queries.grad == 0)
    first = torch.autograd.grad(attention_pool(tokens, queries).square().sum(), (tokens, queries), create_graph=True)
    second = torch.autograd.grad(first[1].square().sum(), (tokens, queries))
    assert second[0].shape == (0, 4, 5)
    assert torch.all(second[1] == 0)


class Largest(TorchDispatchMode):
    """The largest tensor, in bytes, that any operation makes anew, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                size = one.numel() * one.element_size()
                self.bytes[one.dtype] = max(self.bytes.get(one.dtype, 0), size)
        return result


@pytest.mark.parametrize("rows", [16, 64, 128], ids=["a quarter of a sample", "one", "two"])
def test_no_float32_copy_of_more_than_a_block(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, num_tokens, width = 5, 64, 32
    in_blocks_of(rows * width, 1, monkeypatch)
    tokens, queries = torch.randn(batch, num_tokens, width).bfloat16(), torch.randn(1, width)
    given = PoolInputs(tokens, queries, None, None, 1e-6)
    with Largest() as forward:
        pooled, lse, _ = blocks.pool_forward(given, False)
    found = []
    for want_tokens in (True, False):
        with Largest() as backward:
            blocks.pool_backward(given, Incoming(pooled, None, lse, pooled.sum(-1), want_tokens, want_bias=False))
        found.append(backward.bytes)
    assert forward.bytes[torch.float32] == 4 * rows * width
    assert found[0][torch.float32] == found[1][torch.float32] == 4 * rows * width
    assert found[0][torch.bfloat16] == 2 * tokens.numel()
    assert found[1].get(torch.bfloat16, 0) == 0


@pytest.mark.parametrize("extras", [False, True])
def test_operators_pass_pytorchs_checks(extras: bool) -> None:
    tokens, queries = (one.detach().float() for one in inputs())
    bias, mask = (torch.randn(4, 3, 7), torch.rand(4, 7) < 0.7) if extras else (None, None)
    arguments = (tokens, queries, bias, mask, 1e-6, extras, False)
    torch.library.opcheck(autograd.pool_op, arguments)
    trained = [one.clone().requires_grad_() for one in (tokens, queries)]
    torch.library.opcheck(autograd.pool_op, (*trained, *arguments[2:]))
    assert [one.requires_grad for one in autograd.pool_op(*trained, *arguments[2:])[:2]] == [True, False]
    pooled, lse, weights = autograd.pool_op(*arguments)
    grads = (torch.randn_like(pooled), torch.randn_like(weights) if extras else None)
    given = (*arguments[:5], *grads, lse, pooled.sum(-1))
    for want_tokens in (False, True):
        torch.library.opcheck(autograd.pool_backward_op, (*given, want_tokens, extras, False))


def test_second_derivatives_under_autocast() -> None:
    """Autocast would take the products in 16 bits."""
    tokens, queries = (one.detach().float().requires_grad_() for one in inputs(width=32))

    def second() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(attention_pool(tokens, queries).square().sum(), tokens, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), (tokens, queries))

    expected = second()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one, two in zip(second(), expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_have_their_inputs_dtypes(dtype: torch.dtype) -> None:
    tokens, queries = torch.randn(2, 5, 8, requires_grad=True), torch.randn(3, 8).to(dtype).requires_grad_()
    bias = torch.randn(3, 5).to(dtype).requires_grad_()
    grads = torch.autograd.grad(attention_pool(tokens, queries, bias).square().sum(), (tokens, queries, bias))
    assert [one.dtype for one in grads] == [torch.float32, dtype, dtype]


def test_third_derivatives_are_exact() -> None:
    """Queries that depend on the tokens: every order sees both ways into the op."""

    def third(pool: Any) -> Tensor:
        torch.manual_seed(0)
        tokens = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
        value = pool(tokens, tokens[0, :2] * 2).square().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, tokens, create_graph=True)
            value = grad.square().sum()
        return value

    expected = third(lambda tokens, queries: attention_pool_folded(tokens, queries, eps=1e-2)[0])
    torch.testing.assert_close(third(lambda *a: attention_pool(*a, eps=1e-2)), expected, atol=1e-8, rtol=1e-8)


def test_forward_mode_and_transforms_are_exact() -> None:
    tokens, queries = (one.detach() for one in inputs())
    way = torch.randn_like(tokens)

    def pool(x: Tensor) -> Tensor:
        return attention_pool(x, queries)

    _, tangent = torch.func.jvp(pool, (tokens,), (way,))
    step = 1e-6
    slope = (pool(tokens + step * way) - pool(tokens - step * way)) / (2 * step)
    assert slope.abs().max() > 1e-3
    torch.testing.assert_close(tangent, slope, atol=1e-7, rtol=1e-6)
    apart = torch.func.vmap(lambda one: pool(one[None])[0])(tokens)
    torch.testing.assert_close(apart, pool(tokens), atol=1e-12, rtol=1e-12)
    jacobian = torch.func.jacrev(pool)(tokens[:1])
    torch.testing.assert_close(torch.einsum("amcbnd,bnd->amc", jacobian, way[:1]), tangent[:1], atol=1e-10, rtol=1e-9)


def test_a_compiler_sees_plain_operations() -> None:
    """Which it can fuse; an operator of our own would be opaque to it."""
    names: list[str] = []

    def note(graph: Any, example: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    tokens, queries = (one.detach() for one in inputs())
    found = torch.compile(lambda x: attention_pool(x, queries), backend=note, fullgraph=True)(tokens)
    torch.testing.assert_close(found, attention_pool(tokens, queries))
    assert any("softmax" in name for name in names)
    assert not any("hd_awd" in name for name in names)
