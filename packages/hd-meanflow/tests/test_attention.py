"""The derivative through a transformer-like field: fused attention, finite differences, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from meanflow_helpers import Attention, Recorder
from torch import Tensor

from hd_meanflow import MeanFlowLoss, UniformTimes, interpolate, total_derivative


def draw_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t and v (6, 5, 4), t and r (6,), float64."""
    x, v = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    t = torch.linspace(0.4, 0.9, 6, dtype=torch.float64)
    return x, v, t, t * torch.linspace(0, 0.8, 6, dtype=torch.float64)


def attention_flags() -> tuple[bool, bool, bool]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


def test_jvp_matches_functorch_and_finite_differences() -> None:
    net = Attention().double()
    x, v, t, r = draw_batch()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = torch.func.jvp(lambda x, t: net(x, t, r), (x, t), (v, torch.ones_like(t)))[1]
    got = total_derivative(net, x, t, r, v)
    torch.testing.assert_close(got, exact, atol=1e-12, rtol=0)
    # Written out here, with the fused kernel: fourth order, so 1e-9 at a step of 1e-3.
    with torch.no_grad():
        at = {k: net(x + k * 1e-3 * v, t + k * 1e-3, r) for k in (-2, -1, 1, 2)}
    differences = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / 12e-3
    torch.testing.assert_close(got, differences.detach(), atol=1e-9, rtol=0)
    assert got.abs().max() > 0.1


def test_the_two_methods_agree() -> None:
    net = Attention().double()
    x, v, t, r = draw_batch()
    fine = total_derivative(net, x, t, r, v, method="difference", step=1e-4)
    torch.testing.assert_close(total_derivative(net, x, t, r, v), fine, atol=1e-6, rtol=0)


def test_attention_takes_the_math_path_around_the_jvp_alone() -> None:
    field = Recorder(Attention())
    before = attention_flags()
    assert before[0], "fused attention is on by default; without it this test shows nothing"
    x = torch.randn(8, 5, 4)
    MeanFlowLoss()(field, x, torch.randn_like(x), teacher=field)
    assert [call["tangent"] for call in field.calls] == [False, True, False]
    assert [call["math_only"] for call in field.calls] == [False, True, False]
    assert attention_flags() == before


def test_attention_backend_is_restored_when_the_field_fails() -> None:
    def broken(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        raise ArithmeticError

    before = attention_flags()
    x, t = torch.randn(2, 3), torch.rand(2)
    with pytest.raises(ArithmeticError):
        total_derivative(broken, x, t, t / 2, x)
    assert attention_flags() == before


def test_difference_leaves_the_fused_kernels_on() -> None:
    field = Recorder(Attention())
    x, t = torch.randn(2, 5, 4), torch.tensor([0.5, 0.6])
    total_derivative(field, x, t, t / 2, x, method="difference")
    assert [call["math_only"] for call in field.calls] == [False, False]


def test_a_change_of_attention_kernel_leaves_the_loss_alone() -> None:
    """The math path inside the derivative and the fused one outside belong to the same function."""
    net = Attention()
    x, noise = torch.randn(2, 8, 5, 4)
    losses = []
    for backend in (torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        with torch.nn.attention.sdpa_kernel(backend):
            loss = MeanFlowLoss(times=UniformTimes(interval_share=1.0))
            losses.append(loss(net, x, noise, generator=torch.Generator().manual_seed(0)).loss)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
@pytest.mark.parametrize("shared_teacher", [False, True])
def test_under_autocast_the_gradient_arrives(derivative: Any, shared_teacher: bool) -> None:
    """bfloat16 autocast: every parameter gets a gradient that points where the float32 one does."""
    net = Attention()
    x, noise = torch.randn(2, 32, 5, 4)
    loss = MeanFlowLoss(times=UniformTimes(interval_share=0.5), derivative=derivative, step=0.05)

    def gradients(enabled: bool) -> Tensor:
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            teacher = net if shared_teacher else None
            output = loss(net, x, noise, teacher=teacher, generator=torch.Generator().manual_seed(0))
        assert output.loss.dtype == torch.float32
        assert output.loss.isfinite()
        output.loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    assert torch.cosine_similarity(gradients(True), gradients(False), dim=0) > 0.97


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
@pytest.mark.parametrize("shared_teacher", [False, True])
def test_autocast_cache_is_cleared_before_the_graph_is_built(
    monkeypatch: pytest.MonkeyPatch, derivative: Any, shared_teacher: bool
) -> None:
    """Older torch releases reuse casts made under no_grad, and lose the gradient: none may be left over."""
    events = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (events.append("clear"), clear()))
    net = Attention()
    hook = net.register_forward_pre_hook(lambda *_: events.append("graph" if torch.is_grad_enabled() else "no graph"))
    x, noise = torch.randn(2, 4, 5, 4)
    loss = MeanFlowLoss(times=UniformTimes(interval_share=0.5), derivative=derivative)
    with torch.autocast("cpu", torch.bfloat16):
        loss(net, x, noise, teacher=net if shared_teacher else None)
        until_graph = events[: events.index("graph")]
    hook.remove()
    assert "no graph" in until_graph
    assert until_graph[-1] == "clear"


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_teacher_casts_are_cleared_too_without_an_interval(monkeypatch: pytest.MonkeyPatch, derivative: Any) -> None:
    cleared = []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (cleared.append(1), clear()))
    net = Attention()
    x, noise = torch.randn(2, 4, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        MeanFlowLoss(times=UniformTimes(interval_share=0.0), derivative=derivative)(net, x, noise, teacher=net)
        assert cleared


def test_conditions_reach_the_derivative_per_sample() -> None:
    """A per-sample condition goes with its sample: the derivative of each sample alone is the same."""
    net = Attention().double()
    x, noise = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    shift, t = torch.randn(4, dtype=torch.float64), torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    x_t, v = interpolate(x, noise, t), noise - x
    together = total_derivative(net, x_t, t, t / 3, v, shift=shift)
    for i in range(4):
        one = slice(i, i + 1)
        alone = total_derivative(net, x_t[one], t[one], t[one] / 3, v[one], shift=shift[one])
        torch.testing.assert_close(together[one], alone, atol=1e-12, rtol=0)
