"""The path, the jump, and the closed forms that all other tests lean on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meanflow_helpers import GAUSSIAN
from scipy.integrate import quad, solve_ivp

from hd_meanflow import conditional_velocity, interpolate, jump

unit = st.floats(0, 1, allow_nan=False)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_mean_velocity_number_of_the_method_page() -> None:
    u = GAUSSIAN.mean_velocity(scalar(1.3), scalar(0.2), scalar(0.8))
    assert u.item() == pytest.approx(0.3259076658, abs=5e-11)


def test_closed_form_position_solves_the_flow() -> None:
    """The oracle itself against an ODE solver that knows the velocity alone."""
    flow = solve_ivp(
        lambda s, x: GAUSSIAN.velocity(torch.from_numpy(x), scalar(s)).numpy(),
        (0.8, 0.2),
        [1.3],
        rtol=1e-11,
        atol=1e-12,
    )
    assert GAUSSIAN.position(scalar(1.3), scalar(0.8), scalar(0.2)).item() == pytest.approx(flow.y[0, -1], abs=1e-9)


@pytest.mark.parametrize(("r", "t"), [(0.0, 1.0), (0.2, 0.8), (0.5, 0.51), (0.0, 0.3)])
def test_mean_velocity_is_the_mean_of_the_velocity(r: float, t: float) -> None:
    x = scalar(1.3)

    def along(s: float) -> float:
        return GAUSSIAN.velocity(GAUSSIAN.position(x, scalar(t), scalar(s)), scalar(s)).item()

    integral, _ = quad(along, r, t, epsabs=1e-12)
    assert GAUSSIAN.mean_velocity(x, scalar(r), scalar(t)).item() == pytest.approx(integral / (t - r), abs=1e-9)


def test_velocity_is_the_conditional_expectation() -> None:
    """v(x, t) = E[eps - x_0 | x_t]: the slope of a linear regression on samples, as all is Gaussian."""
    x0 = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(400_000, dtype=torch.float64)
    eps = torch.randn_like(x0)
    t = torch.full_like(x0, 0.6)
    x_t, v = interpolate(x0, eps, t), conditional_velocity(x0, eps)
    slope = ((x_t - x_t.mean()) * v).mean() / x_t.var()
    grid = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    fitted = v.mean() + slope * (grid - x_t.mean())
    torch.testing.assert_close(fitted, GAUSSIAN.velocity(grid, scalar(0.6)), atol=0.02, rtol=0)


def test_interpolate_runs_from_data_to_noise() -> None:
    x, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    x_t = interpolate(x, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t[0], x[0])
    assert torch.equal(x_t[1], noise[1])
    torch.testing.assert_close(x_t[2], 0.75 * x[2] + 0.25 * noise[2])


def test_conditional_velocity_is_the_slope_of_the_path() -> None:
    x, noise = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    slope = torch.func.jvp(lambda s: interpolate(x, noise, s), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(conditional_velocity(x, noise), slope)


@given(r=unit, t=unit, x=st.floats(-4, 4))
def test_jump_lands_on_the_trajectory(r: float, t: float, x: float) -> None:
    r, t = min(r, t), max(r, t)
    x_t, start, end = (torch.tensor([value], dtype=torch.float64) for value in (x, t, r))
    landed = jump(x_t, GAUSSIAN.mean_velocity(x_t, end, start), start, end)
    torch.testing.assert_close(landed, GAUSSIAN.position(x_t, start, end), atol=1e-12, rtol=0)


def test_one_jump_from_noise_gives_the_data_distribution() -> None:
    eps = torch.randn(200_000, 1, dtype=torch.float64)
    one, zero = torch.ones(len(eps), dtype=torch.float64), torch.zeros(len(eps), dtype=torch.float64)
    x = jump(eps, GAUSSIAN.field(eps, one, zero), one, zero)
    assert x.mean().item() == pytest.approx(GAUSSIAN.mean, abs=0.005)
    assert x.std().item() == pytest.approx(GAUSSIAN.std, abs=0.005)


def test_euler_steps_miss_the_jump_by_order_one_over_n() -> None:
    """Why a mean velocity is wanted at all: the N-step Euler average misses u(x, 0, 1) by about 0.85 / N."""

    def miss(steps: int) -> float:
        x = scalar(1.3)
        for i in range(steps, 0, -1):
            x = x - GAUSSIAN.velocity(x, scalar(i / steps)) / steps
        return (x - GAUSSIAN.position(scalar(1.3), scalar(1.0), scalar(0.0))).abs().item()

    assert miss(64) / miss(128) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_pass_through(dtype: torch.dtype) -> None:
    x, noise = torch.randn(4, 2, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    t = torch.rand(4, dtype=dtype)
    assert interpolate(x, noise, t).dtype == dtype
    assert conditional_velocity(x, noise).dtype == dtype
    assert jump(x, noise, t, t / 2).dtype == dtype


def test_shape_errors_name_the_argument() -> None:
    x, t = torch.randn(4, 2), torch.rand(4)
    with pytest.raises(ValueError, match=r"noise must have x's shape \(4, 2\); got \(4,\)"):
        interpolate(x, torch.randn(4), t)
    with pytest.raises(ValueError, match="noise must have"):
        conditional_velocity(x, torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"times must have shape \(4,\)"):
        interpolate(x, x, torch.rand(4, 1))
    with pytest.raises(ValueError, match="u must have x_t's shape"):
        jump(x, torch.randn(4, 1), t, t)
    with pytest.raises(ValueError, match="t and r must have the same shape"):
        jump(x, x, t, torch.rand(3))


@pytest.mark.parametrize(("t", "r"), [(0.2, 0.3), (1.1, 0.5), (0.5, -0.1), (float("nan"), 0.1)])
def test_jump_refuses_impossible_intervals(t: float, r: float) -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="0 <= r <= t <= 1"):
        jump(x, x, torch.tensor([0.5, t]), torch.tensor([0.1, r]))
