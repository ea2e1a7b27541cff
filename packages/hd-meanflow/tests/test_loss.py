"""MeanFlowLoss: target, weight, which samples and parameters are touched, settings, dtypes, errors."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meanflow_helpers import GAUSSIAN, MLP, Recorder, seeded
from torch import Tensor

from hd_meanflow import (
    LogitNormalTimes,
    MeanFlowLoss,
    UniformTimes,
    adaptive_weight,
    interpolate,
    mean_velocity_target,
)


def draw_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """x and noise (16, 2), float64."""
    return tuple(torch.randn(2, 16, 2, dtype=torch.float64))


def by_hand(
    student: Any,
    frozen: Any,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    teacher: Any = None,
    p: float = 1.0,
    c: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """The loss written out with an explicitly frozen copy for the target and functorch for the derivative."""
    x_t = interpolate(x, noise, t)
    v = noise - x if teacher is None else teacher(x_t, t).detach()
    _, du = torch.func.jvp(lambda x, t: frozen(x, t, r), (x_t, t), (v, torch.ones_like(t)))
    target = (v - (t - r)[:, None] * du).detach()
    error = ((student(x_t, t, r) - target) ** 2).sum(dim=1)
    return (error / (error.detach() + c) ** p).mean(), error


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("from_scratch", [True, False])
def test_value_and_gradient_equal_the_loss_with_a_frozen_target(p: float, from_scratch: bool) -> None:
    student, teacher = MLP().double(), None if from_scratch else MLP().double()
    x, noise = draw_pair()
    output = MeanFlowLoss(times=UniformTimes(interval_share=0.5), p=p)(
        student, x, noise, teacher=teacher, generator=seeded()
    )
    output.loss.backward()
    twin = copy.deepcopy(student)
    twin.zero_grad()
    frozen = copy.deepcopy(student).requires_grad_(False)
    loss, error = by_hand(twin, frozen, x, noise, output.t, output.r, teacher, p)
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.squared_error, error.detach())
    for got, want in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-12, rtol=1e-9)


def test_gradient_reaches_the_student_alone() -> None:
    student, teacher = MLP().double(), MLP().double()
    MeanFlowLoss()(student, *draw_pair(), teacher=teacher, generator=seeded()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_all_outputs_but_the_loss_are_detached() -> None:
    output = MeanFlowLoss()(MLP().double(), *draw_pair(), teacher=MLP().double())
    assert output.loss.requires_grad
    for name in ("squared_error", "weight", "derivative_rms", "t", "r"):
        assert not getattr(output, name).requires_grad, name


def test_target_is_detached_from_everything() -> None:
    v, du = (value.clone().requires_grad_() for value in draw_pair())
    t = torch.rand(16, dtype=torch.float64)
    target = mean_velocity_target(v, du, t, t / 4)
    assert not target.requires_grad
    torch.testing.assert_close(target, v.detach() - 0.75 * t[:, None] * du.detach())
    assert torch.equal(mean_velocity_target(v, du, t, t), v.detach())


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_the_exact_field_has_no_loss(derivative: Any) -> None:
    """Exact teacher, exact student: error zero (jvp) or that of the difference, at every time."""
    loss = MeanFlowLoss(times=UniformTimes(interval_share=1.0), derivative=derivative, step=1e-4)
    output = loss(GAUSSIAN.field, *draw_pair(), teacher=GAUSSIAN.teacher)
    assert output.squared_error.max() < (1e-20 if derivative == "jvp" else 1e-12)


def test_a_plain_velocity_is_not_the_mean_velocity() -> None:
    """The previous test can fail: the teacher itself, taken as a student, has a loss on every interval."""
    loss = MeanFlowLoss(times=UniformTimes(interval_share=0.5))
    output = loss(lambda x, t, r: GAUSSIAN.teacher(x, t), *draw_pair(), teacher=GAUSSIAN.teacher)
    assert (output.squared_error[:8] > 1e-6).all()
    assert (output.squared_error[8:] < 1e-20).all()


def test_diagnostics_say_what_they_say() -> None:
    pair = draw_pair()
    times = UniformTimes(interval_share=0.5)
    output = MeanFlowLoss(times=times)(lambda x, t, r: 0 * x + 3 * t[:, None], *pair, generator=seeded())
    assert output.derivative_rms.item() == pytest.approx(3.0)
    t, r = times.sample(16, seeded())
    assert torch.equal(output.t, t.double())
    assert torch.equal(output.r, r.double())
    torch.testing.assert_close(output.loss, (output.weight * output.squared_error).mean())
    still = MeanFlowLoss(times=UniformTimes(interval_share=0.0))(GAUSSIAN.field, *pair)
    assert still.derivative_rms.item() == 0


def test_derivative_is_computed_where_r_is_below_t_alone() -> None:
    student, teacher = Recorder(GAUSSIAN.field), Recorder(lambda x, t, r, **cond: GAUSSIAN.teacher(x, t))
    label = torch.arange(16)
    loss = MeanFlowLoss(times=LogitNormalTimes(interval_share=0.25))
    output = loss(student, *draw_pair(), teacher=teacher, label=label, scale=2.0)
    (asked,) = teacher.calls
    assert asked["r"] is None
    assert not asked["grad"]
    derivative, forward = student.calls
    assert derivative["tangent"]
    assert derivative["cond"]["label"].tolist() == [0, 1, 2, 3]
    assert torch.equal(derivative["t"], output.t[:4])
    assert not forward["tangent"]
    assert forward["grad"]
    assert len(forward["x"]) == 16
    for call in (asked, forward):
        assert torch.equal(call["cond"]["label"], label)
        assert torch.equal(call["t"], output.t)
    assert all(call["cond"]["scale"] == 2.0 for call in (asked, derivative, forward))


@pytest.mark.parametrize(("share", "calls"), [(0.0, 1), (0.5, 2), (1.0, 2)])
def test_without_intervals_the_student_is_called_once(share: float, calls: int) -> None:
    student = Recorder(GAUSSIAN.field)
    MeanFlowLoss(times=UniformTimes(interval_share=share))(student, *draw_pair())
    assert len(student.calls) == calls


def test_scattered_intervals_get_their_own_targets() -> None:
    """A sampler may put its intervals anywhere; each target must land on its own sample."""
    pair = draw_pair()

    class Scattered:
        def sample(self, batch: int, generator: Any = None, device: Any = None) -> tuple[Tensor, Tensor]:
            t = torch.linspace(0.3, 0.9, batch)
            return t, torch.where(torch.arange(batch) % 3 == 1, t / 2, t)

    student = MLP().double()
    output = MeanFlowLoss(times=Scattered())(student, *pair, teacher=GAUSSIAN.teacher)
    _, error = by_hand(student, student, *pair, output.t, output.r, GAUSSIAN.teacher)
    torch.testing.assert_close(output.squared_error, error.detach())


@given(error=st.lists(st.floats(0, 1e6), min_size=1, max_size=5), p=st.floats(0, 2), c=st.floats(1e-3, 1))
def test_adaptive_weight_formula(error: list[float], p: float, c: float) -> None:
    error = torch.tensor(error, dtype=torch.float64, requires_grad=True)
    weight = adaptive_weight(error, p, c)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, torch.tensor([1 / (e + c) ** p for e in error.tolist()]).double())


def test_adaptive_weight_defaults_and_limits() -> None:
    error = torch.tensor([0.0, 1.0, 9.99])
    torch.testing.assert_close(adaptive_weight(error), torch.tensor([100.0, 1 / 1.01, 0.1]))
    assert torch.equal(adaptive_weight(error, p=0.0), torch.ones(3))
    with pytest.raises(ValueError, match=r"error must have shape \(B,\).*got \(3, 2\)"):
        adaptive_weight(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="c must be > 0"):
        adaptive_weight(error, c=0.0)


def test_error_is_the_sum_over_elements() -> None:
    """Every element off by 0.1: the sum over 2 x 3 elements is 0.06, and the weight sees the sum."""
    x = torch.randn(4, 2, 3)
    output = MeanFlowLoss(times=UniformTimes(interval_share=0.0))(
        lambda x, t, r: 0 * x + 0.1, x, x.clone(), teacher=lambda x, t: 0 * x
    )
    torch.testing.assert_close(output.squared_error, torch.full((4,), 0.06))
    torch.testing.assert_close(output.weight, torch.full((4,), 1 / 0.07))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_dtypes(dtype: torch.dtype, derivative: Any) -> None:
    """The field sees data in the data's type; times, errors and the loss stay in float32 or better."""
    net, seen = MLP().to(dtype), []
    x, noise = torch.randn(2, 8, 2, dtype=dtype)

    def student(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype, r.dtype))
        return net(x, t, r)

    output = MeanFlowLoss(derivative=derivative)(student, x, noise)
    output.loss.backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert set(seen) == {(dtype, wide, wide)}
    for name in ("loss", "squared_error", "weight", "derivative_rms", "t", "r"):
        assert getattr(output, name).dtype == wide, name
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in net.parameters())


def test_target_from_scratch_is_not_rounded_to_the_data_s_type() -> None:
    x, noise = torch.full((1, 1), 256.0).bfloat16(), torch.full((1, 1), 0.5).bfloat16()
    output = MeanFlowLoss(times=UniformTimes(interval_share=0.0))(lambda x, t, r: 0 * x, x, noise)
    assert output.squared_error.item() == 255.5**2


@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 8, 8), (1, 2), (4, 5, 6)])
def test_any_sample_shape(shape: tuple[int, ...]) -> None:
    loss = MeanFlowLoss(times=UniformTimes(interval_share=1.0))
    x = torch.randn(shape, dtype=torch.float64)
    assert loss(GAUSSIAN.field, x, torch.randn_like(x), teacher=GAUSSIAN.teacher).loss < 1e-18


def test_works_with_any_callable() -> None:
    net, pair = MLP().double(), draw_pair()
    fields = (net, lambda x, t, r=None: net(x, t, r), functools.partial(net), net.forward)
    losses = {MeanFlowLoss()(field, *pair, teacher=field, generator=seeded()).loss.item() for field in fields}
    assert len(losses) == 1


def test_a_generator_decides_the_times() -> None:
    pair = draw_pair()
    first, again, other = (MeanFlowLoss()(GAUSSIAN.field, *pair, generator=seeded(s)).t for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_errors_name_the_argument() -> None:
    x, noise = draw_pair()
    with pytest.raises(ValueError, match="noise must have x's shape"):
        MeanFlowLoss()(GAUSSIAN.field, x, noise[:3])
    with pytest.raises(ValueError, match="the teacher must return x's shape"):
        MeanFlowLoss()(GAUSSIAN.field, x, noise, teacher=lambda x, t: x[:, 0])
    with pytest.raises(ValueError, match="the student must return x's shape"):
        MeanFlowLoss(times=UniformTimes(interval_share=0.0))(lambda x, t, r: x[:, :1], x, noise)
    with pytest.raises(ValueError, match="derivative must have velocity's shape"):
        mean_velocity_target(x, x[:, :1], torch.rand(16), torch.rand(16))
    with pytest.raises(ValueError, match="0 <= r <= t <= 1"):
        mean_velocity_target(x, x, torch.full((16,), 0.2), torch.full((16,), 0.3))
