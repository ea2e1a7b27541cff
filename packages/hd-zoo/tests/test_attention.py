"""Attention: its backends equal each other and a loop; the switch; forward-mode differentiation; compilation."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from zoo_helpers import draw_batch, randomised

from hd_zoo import attention_backend, create_model, set_attention_backend, why_not_xformers
from hd_zoo.networks.attention import BACKENDS, attend


@pytest.fixture(autouse=True)
def _default() -> Iterator[None]:
    yield
    set_attention_backend("fused")


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries of every call of PyTorch's fused attention: which backend ran."""
    calls: list[Tensor] = []
    fused = F.scaled_dot_product_attention

    def note(q: Tensor, *others: Any, **more: Any) -> Tensor:
        calls.append(q)
        return fused(q, *others, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    return calls


def draw(width: int, heads: int = 2, tokens: int = 7, batch: int = 3) -> list[Tensor]:
    """q, k, v (B, H, N, D) in float64."""
    return [torch.randn(batch, heads, tokens, width, dtype=torch.float64) for _ in range(3)]


def by_loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query at a time, the definition."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for n in range(q.shape[2]):
                weights = ((k[b, h] @ q[b, h, n]) / q.shape[-1] ** 0.5).exp()
                out[b, h, n] = (weights[:, None] * v[b, h]).sum(0) / weights.sum()
    return out


@pytest.mark.parametrize("width", [16, 72, 5, 1])
@pytest.mark.parametrize("backend", ["fused", "math"])
def test_the_backends_equal_the_definition(backend: str, width: int, fused_calls: list[Tensor]) -> None:
    q, k, v = draw(width)
    with attention_backend(backend):
        found = attend(q, k, v)
    torch.testing.assert_close(found, by_loops(q, k, v), atol=1e-12, rtol=1e-12)
    assert len(fused_calls) == (backend == "fused")


@pytest.mark.parametrize("width", [16, 72, 5])
def test_the_backends_have_the_same_gradient(width: int) -> None:
    inputs = [one.requires_grad_() for one in draw(width)]
    weight = torch.randn_like(inputs[0])
    gradients = []
    for backend in ("fused", "math"):
        with attention_backend(backend):
            gradients.append(torch.autograd.grad((attend(*inputs) * weight).sum(), inputs))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "gradient", "tokens", "fused"),
    [
        (torch.bfloat16, True, 6, False),
        (torch.float16, True, 6, False),
        (torch.bfloat16, False, 6, True),
        (torch.bfloat16, True, 513, True),
        (torch.float32, True, 6, True),
    ],
)
def test_training_in_half_precision_on_a_cpu_takes_two_products(
    dtype: torch.dtype, gradient: bool, tokens: int, fused: bool, fused_calls: list[Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 8, generator=generator).to(dtype) for _ in range(3))
    q.requires_grad_(gradient)
    found = attend(q, k, v)
    assert bool(fused_calls) == fused
    exact = F.softmax(q.double() @ k.double().transpose(-2, -1) / 8**0.5, dim=-1) @ v.double()
    torch.testing.assert_close(found.double(), exact, atol=0.03, rtol=0.03)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = draw(16)
    for backend in ("fused", "math"):
        with attention_backend(backend):
            found = attend(1e4 * q, k, v)
        nearest = (q @ k.transpose(-2, -1)).argmax(-1)
        torch.testing.assert_close(found, v.gather(2, nearest[..., None].expand_as(v)), atol=1e-6, rtol=1e-6)


def test_the_switch_holds_until_it_is_turned_again(fused_calls: list[Tensor]) -> None:
    inputs = draw(8)
    for backend, calls in (("fused", 1), ("math", 1), ("fused", 2), ("fused", 3)):
        set_attention_backend(backend)
        attend(*inputs)
        assert len(fused_calls) == calls


def test_the_block_restores_what_was_chosen_before(fused_calls: list[Tensor]) -> None:
    inputs = draw(8)

    def is_fused() -> bool:
        before = len(fused_calls)
        attend(*inputs)
        return len(fused_calls) > before

    with attention_backend("math"):
        with attention_backend("fused"):
            assert is_fused()
        assert not is_fused()
    assert is_fused()
    set_attention_backend("math")
    with attention_backend("fused"):
        pass
    assert not is_fused()
    with pytest.raises(ZeroDivisionError), attention_backend("fused"):
        raise ZeroDivisionError
    assert not is_fused()
    with pytest.raises(ValueError, match="attention backend must be"), attention_backend("flash"):
        pass
    assert not is_fused()


def test_every_network_follows_the_switch(fused_calls: list[Tensor]) -> None:
    network = randomised(create_model("dit_nano_2", depth=3, width=16).double())
    x, t, _, _ = draw_batch(network, dtype=torch.float64)
    fused = network(x, t)
    assert len(fused_calls) == 3
    with attention_backend("math"):
        torch.testing.assert_close(network(x, t), fused, atol=1e-12, rtol=1e-12)
    assert len(fused_calls) == 3


@pytest.mark.parametrize("name", ["flash", "", "FUSED", None])
def test_unknown_backends(name: Any, fused_calls: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=f"attention backend must be one of fused, math, xformers; got {name!r}"):
        set_attention_backend(name)
    attend(*draw(4))
    assert len(fused_calls) == 1
    assert BACKENDS == ("fused", "math", "xformers")


def pretend(monkeypatch: pytest.MonkeyPatch, installed: bool, cuda: bool) -> None:
    """That xformers and a CUDA device are there or not; every other package is looked up as ever."""
    find = importlib.util.find_spec

    def find_spec(name: str, *package: Any) -> Any:
        return find(name, *package) if name != "xformers" else object() if installed else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)


@pytest.mark.parametrize(
    ("installed", "cuda", "reason"),
    [
        (False, False, r"it is not installed \(pip install xformers, or hd-zoo\[xformers\]\)"),
        (False, True, "it is not installed"),
        (True, False, "it has no operator for a CPU, and no CUDA device is available"),
    ],
)
def test_why_xformers_cannot_be_used(
    installed: bool, cuda: bool, reason: str, monkeypatch: pytest.MonkeyPatch, fused_calls: list[Tensor]
) -> None:
    pretend(monkeypatch, installed, cuda)
    with pytest.raises(RuntimeError, match=f'attention backend "xformers" cannot be used: {reason}') as error:
        set_attention_backend("xformers")
    with pytest.raises(RuntimeError, match=reason), attention_backend("xformers"):
        pass
    said = why_not_xformers()
    assert said is not None
    assert said in str(error.value)
    attend(*draw(4))
    assert len(fused_calls) == 1


def test_xformers_sees_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator takes (B, N, H, D): a stand-in that knows no other."""
    seen: list[tuple[int, ...]] = []

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(tuple(q.shape))
        return by_loops(*(one.transpose(1, 2) for one in (q, k, v))).transpose(1, 2)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    with monkeypatch.context() as patch:
        pretend(patch, installed=True, cuda=True)
        assert why_not_xformers() is None
        set_attention_backend("xformers")
    q, k, v = draw(5, heads=2, tokens=7, batch=3)
    found = attend(q, k, v)
    torch.func.jvp(attend, (q, k, v), tuple(draw(5, heads=2, tokens=7, batch=3)))
    torch.testing.assert_close(found, by_loops(q, k, v), atol=1e-12, rtol=1e-12)
    assert seen == [(3, 7, 2, 5)]  # and not once for the derivative


def forward_func(function: Callable[..., Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> Tensor:
    return torch.func.jvp(function, tuple(inputs), tuple(tangents))[1]


def forward_dual(function: Callable[..., Tensor], inputs: list[Tensor], tangents: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(x, d) for x, d in zip(inputs, tangents, strict=True)))
        tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is not None
    return tangent


@pytest.mark.parametrize("derivative", [forward_func, forward_dual])
@pytest.mark.parametrize("width", [16, 72, 5])
def test_forward_mode_takes_the_differentiable_backend(
    derivative: Callable[..., Tensor], width: int, fused_calls: list[Tensor]
) -> None:
    inputs, tangents, step = draw(width), draw(width), 1e-5
    found = derivative(attend, inputs, tangents)
    assert not fused_calls
    ahead, behind = (by_loops(*(x + s * d for x, d in zip(inputs, tangents, strict=True))) for s in (step, -step))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), atol=1e-8, rtol=1e-6)
    attend(*inputs)
    assert len(fused_calls) == 1  # back to what was chosen


def test_reverse_over_forward_is_exact() -> None:
    """The gradient of a forward derivative, as some losses need it, against a gradient of finite differences."""
    inputs, tangents, weight, step = draw(4, tokens=3), draw(4, tokens=3), torch.randn(3, 2, 3, 4).double(), 1e-4

    def slope(*inputs: Tensor) -> Tensor:
        return (torch.func.jvp(attend, inputs, tuple(tangents))[1] * weight).sum()

    def by_differences(*inputs: Tensor) -> Tensor:
        ahead, behind = (by_loops(*(x + s * d for x, d in zip(inputs, tangents, strict=True))) for s in (step, -step))
        return ((ahead - behind) / (2 * step) * weight).sum()

    leaves = [one.requires_grad_() for one in inputs]
    found = torch.autograd.grad(slope(*leaves), leaves)
    expected = torch.autograd.grad(by_differences(*leaves), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["fused", "math"])
def test_compiles_to_one_graph(backend: str) -> None:
    inputs = draw(8)
    torch.compiler.reset()
    with attention_backend(backend):
        found = torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(found, by_loops(*inputs), atol=1e-12, rtol=1e-12)


def test_a_forward_derivative_compiles_with_math() -> None:
    inputs, tangents = draw(8), draw(8)

    def slope(*inputs: Tensor) -> Tensor:
        return torch.func.jvp(attend, inputs, tuple(tangents))[1]

    torch.compiler.reset()
    with attention_backend("math"):
        found = torch.compile(slope, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(found, slope(*inputs), atol=1e-12, rtol=1e-12)
