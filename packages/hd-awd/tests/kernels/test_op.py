"""The public op with backend "triton": first and second derivatives, weights, autocast, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from awd_helpers import compute, make_case, naive_pool, planned
from torch import Tensor

from hd_awd import attention_pool
from hd_awd.pooling.reference import attention_pool_reference

OPTIONS = pytest.mark.parametrize(
    ("bias", "masked"), [(None, False), ((), True), (("M", "N"), False), (("B", 1, "N"), True)], ids=str
)
SIZES = (2, 7, 24, 3)


def leaves(case: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
    """tokens, queries and, where there is one, bias, wanting gradients; on the CPU where a dtype is named."""
    given = [one for one in (case.tokens, case.queries, case.bias) if one is not None]
    given = [one.detach() if dtype is None else one.detach().cpu().to(dtype) for one in given]
    return [one.requires_grad_() for one in given]


def scalar(case: Any, pool: Any, arguments: list[Tensor], terms: str = "both", **options: Any) -> Tensor:
    """A loss with a value, a slope and a curvature in both results, or in one of them."""
    tokens, queries, *bias = arguments
    device, wide = tokens.device, torch.promote_types(tokens.dtype, torch.float32)
    mask = None if case.mask is None else case.mask.to(device)
    pooled, weights = pool(tokens, queries, bias[0] if bias else None, mask, case.eps, **options)
    dz, da = (one.to(device, wide) for one in (case.grad_pooled, case.grad_weights))
    loss = torch.zeros((), dtype=wide, device=device)
    if terms != "weights":
        loss = loss + (dz * pooled.to(wide)).sum() + pooled.to(wide).square().sum()
    if terms != "pooled":
        loss = loss + (da * weights).sum() + weights.square().sum()
    return loss


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = (one.detach().cpu().double() for one in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


@OPTIONS
@pytest.mark.parametrize("terms", ["both", "pooled", "weights"])
def test_values_and_gradients(device: str, bias: tuple[Any, ...] | None, masked: bool, terms: str) -> None:
    case = make_case(SIZES, device=device, bias=bias, masked=masked, weights=True)
    losses, grads = [], []
    for backend in ("triton", "torch"):
        arguments = leaves(case)
        loss = scalar(case, attention_pool, arguments, terms, return_weights=True, backend=backend)
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, arguments))
    arguments = leaves(case, torch.float64)
    exact = scalar(case, attention_pool_reference, arguments, terms)
    expected = torch.autograd.grad(exact, arguments)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses[0].cpu().double(), exact, atol=1e-4, rtol=1e-5)
    for triton, plain, wide in zip(*grads, expected, strict=True):
        assert triton.shape == wide.shape
        # A constant bias cancels in the softmax: its gradient is rounding.
        if wide.ndim:
            assert distance(triton, wide) < 1e-5
            assert distance(plain, wide) < 1e-5
        else:
            assert triton.abs() < 1e-4


def test_results_have_the_tokens_dtype(device: str) -> None:
    case = make_case(SIZES, torch.bfloat16, device, bias=("M", "N"), weights=True)
    tokens, queries, bias = leaves(case)
    queries = queries.detach().float().requires_grad_()
    pooled, weights = attention_pool(tokens, queries, bias, return_weights=True, backend="triton")
    assert (pooled.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    alone = attention_pool(tokens, queries, bias, backend="triton")
    assert torch.equal(alone, pooled)
    grads = torch.autograd.grad(pooled.float().square().sum(), (tokens, queries, bias))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_only_what_is_asked_for_gets_a_gradient(device: str) -> None:
    case = make_case(SIZES, device=device, bias=("M", "N"), weights=True)
    for index in range(3):
        arguments = [one.detach() for one in leaves(case)]
        arguments[index].requires_grad_()
        loss = scalar(case, attention_pool, arguments, "pooled", return_weights=True, backend="triton")
        (found,) = torch.autograd.grad(loss, arguments[index])
        every = leaves(case)
        loss = scalar(case, attention_pool, every, "pooled", return_weights=True, backend="triton")
        assert torch.equal(found, torch.autograd.grad(loss, every)[index])


@pytest.mark.parametrize("passes", [1, 2])
def test_a_gradient_that_nobody_wants_is_not_computed(device: str, passes: int) -> None:
    case = make_case((2, 9, 72, 3), device=device, bias=("M", "N"), masked=True, weights=True)
    plans = planned(case, passes, 2)
    every, some = compute(case, *plans), compute(case, *plans, tokens=False, scores=False)
    assert set(every) - set(some) == {"grad_tokens", "grad_scores"}
    assert all(torch.equal(value, every[name]) for name, value in some.items())


@OPTIONS
@pytest.mark.parametrize("terms", ["both", "pooled", "weights"])
def test_second_derivatives(device: str, bias: tuple[Any, ...] | None, masked: bool, terms: str) -> None:
    """Of a function of all first derivatives, in all arguments, against the float64 reference's."""
    case = make_case(SIZES, device=device, bias=bias, masked=masked, weights=True, eps=1e-2)
    found = []
    for dtype, pool, options in (
        (None, attention_pool, {"return_weights": True, "backend": "triton"}),
        (torch.float64, attention_pool_reference, {}),
    ):
        arguments = leaves(case, dtype)
        first = torch.autograd.grad(scalar(case, pool, arguments, terms, **options), arguments, create_graph=True)
        ways = (torch.cos(torch.arange(one.numel())).reshape(one.shape).to(one) for one in first)
        penalty = sum((one.square() + one * way).sum() for one, way in zip(first, ways, strict=True))
        found.append(torch.autograd.grad(penalty, arguments))
    for one, other in zip(*found, strict=True):
        if other.ndim:
            assert distance(one, other) < 1e-4
        else:
            assert one.abs() < 1e-2 * max(grad.abs().max() for grad in found[1])


def test_third_derivatives_are_exact_or_refused(device: str) -> None:
    case = make_case((1, 5, 8, 2), device=device, weights=True, eps=1e-2)

    def third(pool: Any, dtype: torch.dtype | None, **options: Any) -> Tensor:
        arguments = leaves(case, dtype)
        loss = scalar(case, pool, arguments, "pooled", **options)
        (first,) = torch.autograd.grad(loss, arguments[0], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), arguments[0], create_graph=True)
        return torch.autograd.grad(second.square().sum(), arguments[0])[0]

    expected = third(naive_pool, torch.float64)
    try:
        found = third(attention_pool, None, return_weights=True, backend="triton")
    except RuntimeError:
        return
    assert distance(found, expected) < 1e-3


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_changes_nothing(device: str, backend: str) -> None:
    case = make_case(SIZES, device=device, bias=("M", "N"), masked=True, weights=True)
    found = []
    for enabled in (False, True):
        arguments = leaves(case)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            tokens, queries, bias = arguments
            pooled, weights = attention_pool(tokens, queries, bias, case.mask, return_weights=True, backend=backend)
            assert pooled.dtype == torch.float32
            loss = pooled.square().sum() + weights.square().sum()
            first = torch.autograd.grad(loss, arguments, create_graph=True)
            second = torch.autograd.grad(sum(one.square().sum() for one in first), arguments)
        found.append([pooled, weights, *first, *second])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_weights_gradient_may_be_a_view(device: str) -> None:
    """Gradients that autograd hands over without memory of their own: expanded, transposed."""
    case = make_case(SIZES, device=device, weights=True)
    grads = []
    for dense in (False, True):
        tokens, queries = leaves(case)
        pooled, weights = attention_pool(tokens, queries, return_weights=True, backend="triton")
        ways = (case.grad_pooled[:, :1].expand_as(pooled), case.grad_weights[:, :, :1].expand_as(weights))
        ways = tuple(way.contiguous() for way in ways) if dense else ways
        grads.append(torch.autograd.grad((pooled, weights), (tokens, queries), ways))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
