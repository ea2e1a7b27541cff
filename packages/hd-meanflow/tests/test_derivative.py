"""d/dt u along the trajectory: both methods against the closed form, and how they call the field."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meanflow_helpers import GAUSSIAN, MLP, Recorder, interior_points
from torch import Tensor

from hd_meanflow import mean_velocity_target, total_derivative


def by_identity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """(v - u) / (t - r): the MeanFlow identity solved for the derivative."""
    t, r = t[:, None], r[:, None]
    return (GAUSSIAN.velocity(x, t) - GAUSSIAN.mean_velocity(x, r, t)) / (t - r)


def by_reverse_mode(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """(v . grad_x) u + du/dt by reverse-mode autograd: regular at r = t, shares nothing with forward AD."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    u = GAUSSIAN.field(x, t, r)
    columns = []
    for i in range(x.shape[1]):
        du_dx, du_dt = torch.autograd.grad(u[:, i].sum(), (x, t), retain_graph=True)
        v = GAUSSIAN.velocity(x, t[:, None])
        columns.append((v * du_dx).sum(dim=1) + du_dt)
    return torch.stack(columns, dim=1).detach()


def derivative(x: Tensor, t: Tensor, r: Tensor, **options: Any) -> Tensor:
    return total_derivative(GAUSSIAN.field, x, t, r, GAUSSIAN.velocity(x, t[:, None]), **options)


def test_jvp_matches_the_closed_form() -> None:
    x, t, r = interior_points()
    got = derivative(x, t, r)
    torch.testing.assert_close(got, by_identity(x, t, r), atol=1e-10, rtol=0)
    torch.testing.assert_close(got, by_reverse_mode(x, t, r), atol=1e-10, rtol=0)


def test_identity_holds_with_the_package_s_own_pieces() -> None:
    """u = v - (t - r) du/dt: the exact field is the fixed point of the training target."""
    x, t, r = interior_points()
    target = mean_velocity_target(GAUSSIAN.velocity(x, t[:, None]), derivative(x, t, r), t, r)
    torch.testing.assert_close(target, GAUSSIAN.field(x, t, r), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("tangent", "holds"), [("v01", True), ("v00", False), ("v10", False), ("v11", False), ("x01", False)]
)
def test_identity_needs_the_tangent_v01(tangent: str, holds: bool) -> None:
    """The published ablation, as a property: only (v, 0, 1) on (x, r, t) satisfies the identity."""
    x, t, r = interior_points()
    v = GAUSSIAN.velocity(x, t[:, None])
    space = v if tangent[0] == "v" else torch.zeros_like(v)
    flow = (space, float(tangent[1]) * torch.ones_like(r), float(tangent[2]) * torch.ones_like(t))
    _, du = torch.func.jvp(lambda x, r, t: GAUSSIAN.field(x, t, r), (x, r, t), flow)
    residual = (GAUSSIAN.field(x, t, r) - v + (t - r)[:, None] * du).abs().max().item()
    assert (residual < 1e-10) is holds
    assert holds or residual > 0.1
    if holds:
        torch.testing.assert_close(total_derivative(GAUSSIAN.field, x, t, r, v), du, atol=1e-12, rtol=0)


ENDS = {
    "interior": (0.6, 0.2),
    "t = 1": (1.0, 0.3),
    "t = 1, r = 0": (1.0, 0.0),
    "t close to 1": (0.9995, 0.3),
    "r = t": (0.5, 0.5),
    "r = t = 0": (0.0, 0.0),
    "t - r tiny": (0.5, 0.4999),
    "t close to r": (0.5, 0.47),
}


@pytest.mark.parametrize("place", ENDS)
def test_difference_converges_to_second_order(place: str) -> None:
    """Halving the step divides the error by four, at the ends too."""
    x = torch.randn(16, 3, dtype=torch.float64)
    t, r = (torch.full((16,), value, dtype=torch.float64) for value in ENDS[place])
    exact = by_reverse_mode(x, t, r)
    errors = [
        (derivative(x, t, r, method="difference", step=step) - exact).abs().max().item() for step in (4e-3, 2e-3, 1e-3)
    ]
    assert errors[2] < 1e-4
    for wide, narrow in itertools.pairwise(errors):
        assert wide / narrow == pytest.approx(4, rel=0.25)


def test_difference_with_a_short_interval_at_the_upper_end() -> None:
    """At t = 1 the step is bound by t - r, so there it is the interval that sets the error, squared."""
    x = torch.randn(16, 3, dtype=torch.float64)
    errors = []
    for gap in (4e-3, 2e-3, 1e-3):
        t, r = torch.ones(16, dtype=torch.float64), torch.full((16,), 1 - gap, dtype=torch.float64)
        error = derivative(x, t, r, method="difference", step=0.1) - by_reverse_mode(x, t, r)
        errors.append(error.abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


def test_difference_is_finite_where_no_step_fits() -> None:
    x, one = torch.randn(4, 3), torch.ones(4)
    assert derivative(x, one, one, method="difference").isfinite().all()


unit = st.floats(0, 1, width=32)


@given(
    times=st.lists(st.tuples(unit, unit, st.floats(0, 0.03125, width=32), st.booleans()), min_size=1, max_size=8),
    step=st.sampled_from([5e-3, 0.05, 0.25]),
)
def test_difference_stays_inside_r_and_one(times: list[tuple[float, float, float, bool]], step: float) -> None:
    """Random intervals, short ones, and ones that end at 1; float32, where rounding could step over."""
    start, end, gap, short = (torch.tensor(column) for column in zip(*times, strict=True))
    t = torch.maximum(start, end)
    r = torch.where(short, (t - gap).clamp(min=0), torch.minimum(start, end))
    assert_stays_inside(t, r, step)


def test_difference_does_not_step_over_r_by_rounding() -> None:
    """t - r = step up to rounding: t - step then falls below r in the last digit for a good part of r."""
    r = torch.rand(10_000) * 6e-3
    assert_stays_inside(r + 5e-3, r, 5e-3)


def assert_stays_inside(t: Tensor, r: Tensor, step: float) -> None:
    field = Recorder(GAUSSIAN.field)
    total_derivative(field, torch.zeros(len(t), 2), t, r, torch.ones(len(t), 2), method="difference", step=step)
    assert len(field.calls) in (2, 3)
    for call in field.calls:
        assert (call["r"] <= call["t"]).all()
        assert (call["t"] <= 1).all()
        assert (call["r"] >= 0).all()


def test_difference_takes_a_third_pass_for_the_ends_alone() -> None:
    field = Recorder(GAUSSIAN.field)
    t = torch.tensor([0.5, 1.0, 0.6, 0.5])
    r = torch.tensor([0.1, 0.0, 0.2, 0.499])
    label = torch.arange(4)
    total_derivative(field, torch.randn(4, 2), t, r, torch.randn(4, 2), method="difference", label=label, scale=3)
    assert [len(call["x"]) for call in field.calls] == [4, 4, 2]
    assert field.calls[2]["cond"]["label"].tolist() == [1, 3]
    assert torch.equal(field.calls[2]["r"], r[[1, 3]])
    assert all(call["cond"]["scale"] == 3 for call in field.calls)


def test_jvp_is_one_pass_without_a_graph() -> None:
    net = MLP(3).double()
    field = Recorder(net)
    x, t = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    v = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for method, passes in (("jvp", 1), ("difference", 2)):
        field.calls.clear()
        got = total_derivative(field, x, t * 0.5 + 0.4, t * 0.3, v, method=method)
        assert not got.requires_grad
        assert len(field.calls) == passes
        assert not any(call["grad"] for call in field.calls)
        assert all(call["tangent"] == (method == "jvp") for call in field.calls)
    assert torch.is_grad_enabled()


def test_works_with_any_callable() -> None:
    x, t, r = interior_points()
    v = GAUSSIAN.velocity(x, t[:, None])
    net = MLP(3).double()
    reference = total_derivative(net, x, t, r, v)
    for field in (lambda x, t, r: net(x, t, r), functools.partial(net), net.forward):
        assert torch.equal(total_derivative(field, x, t, r, v), reference)


@pytest.mark.parametrize(
    "field", [lambda x, t, r: torch.ones_like(x), lambda x, t, r: x.detach() * t.detach()[:, None]]
)
def test_a_field_without_a_tangent_is_loud(field: Any) -> None:
    x, t = torch.randn(3, 1), torch.rand(3)
    with pytest.raises(ValueError, match=r"carries no tangent.*derivative=\"difference\""):
        total_derivative(field, x, t, t / 2, x)


def test_bad_arguments_are_named() -> None:
    x, t = torch.randn(3, 2), torch.rand(3)
    with pytest.raises(ValueError, match="method must be one of jvp, difference; got 'exact'"):
        total_derivative(GAUSSIAN.field, x, t, t, x, method="exact")
    with pytest.raises(ValueError, match="velocity must have x_t's shape"):
        total_derivative(GAUSSIAN.field, x, t, t, x[:, :1])
    with pytest.raises(ValueError, match=r"times must have shape \(3,\)"):
        total_derivative(GAUSSIAN.field, x, t[:2], t[:2], x)
    with pytest.raises(ValueError, match="0 <= r <= t <= 1"):
        total_derivative(GAUSSIAN.field, x, t / 2, t, x)
    for step in (0.0, 0.3):
        with pytest.raises(ValueError, match="step must lie in"):
            total_derivative(GAUSSIAN.field, x, t, t / 2, x, method="difference", step=step)
    for method in ("jvp", "difference"):
        with pytest.raises(ValueError, match="the field must return x's shape"):
            total_derivative(lambda x, t, r: x[:, :1], x, t, t / 2, x, method=method)
