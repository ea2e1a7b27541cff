"""The ODE's samplers on the Gaussian's closed forms: measured orders, grids, the calls they make, errors; noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import kstest, linregress
from torch import Tensor
from zoo_helpers import GAUSSIAN, Recorder, randomised

from hd_zoo import create_model, sample_jumps, sample_ode, seeded_noise, shift_times, uniform_times


def exact(noise: Tensor) -> Tensor:
    """The trajectory's end at t = 0."""
    one = torch.ones((), dtype=noise.dtype)
    return GAUSSIAN.position(noise, one, 0 * one)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_convergence_order(method: str, order: int) -> None:
    noise = torch.randn(64, 3, dtype=torch.float64)
    steps = [32, 64, 128, 256, 512]
    errors = [(sample_ode(GAUSSIAN.teacher, noise, n, method) - exact(noise)).square().mean().sqrt() for n in steps]
    fit = linregress(torch.tensor(steps).log2().numpy(), torch.stack(errors).log2().numpy())
    assert -fit.slope == pytest.approx(order, abs=0.08)
    assert errors[-1] < (2e-3 if order == 1 else 2e-5)


def test_heun_that_ends_with_euler() -> None:
    """REPA's: N steps, 2 N - 1 calls, none of them at t = 0."""
    noise, field = torch.randn(5, 3, dtype=torch.float64), Recorder(GAUSSIAN.teacher)
    found = sample_ode(field, noise, 4, "heun", last_euler=True)
    assert [call["t"][0].item() for call in field.calls] == [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    start = sample_ode(GAUSSIAN.teacher, noise, method="heun", times=(1, 0.75, 0.5, 0.25))
    quarter = torch.full((5,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(found, start - 0.25 * GAUSSIAN.teacher(start, quarter), atol=1e-14, rtol=1e-14)
    assert not torch.allclose(found, sample_ode(GAUSSIAN.teacher, noise, 4, "heun"))
    assert torch.equal(
        sample_ode(GAUSSIAN.teacher, noise, 1, "heun", last_euler=True), sample_ode(GAUSSIAN.teacher, noise, 1)
    )


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_grid_of_ones_own(method: str) -> None:
    noise, field = torch.randn(5, 3, dtype=torch.float64), Recorder(GAUSSIAN.teacher)
    times = shift_times(uniform_times(6), 1 / 0.3)
    found = sample_ode(field, noise, method=method, times=times)
    starts = [call["t"][0].item() for call in field.calls[:: 1 if method == "euler" else 2]]
    assert starts == pytest.approx(times[:-1])
    x = noise
    for now, after in itertools.pairwise(times):  # one grid is as good as its parts
        x = sample_ode(GAUSSIAN.teacher, x, method=method, times=(now, after))
    torch.testing.assert_close(found, x, atol=1e-15, rtol=1e-15)
    assert torch.equal(
        sample_ode(GAUSSIAN.teacher, noise, 6, method),
        sample_ode(GAUSSIAN.teacher, noise, method=method, times=uniform_times(6)),
    )


@pytest.mark.parametrize("shift", [0.3, 1 / 0.3])
def test_order_on_a_shifted_grid(shift: float) -> None:
    noise = torch.randn(64, 3, dtype=torch.float64)
    errors = [
        (sample_ode(GAUSSIAN.teacher, noise, method="heun", times=shift_times(uniform_times(n), shift)) - exact(noise))
        .square()
        .mean()
        .sqrt()
        for n in (256, 512)
    ]
    assert (errors[0] / errors[1]).log2() == pytest.approx(2, abs=0.15)


def test_a_constant_velocity_is_integrated_exactly_by_one_step() -> None:
    noise = torch.randn(4, 2, dtype=torch.float64)
    for method in ("euler", "heun"):
        assert torch.equal(sample_ode(lambda x, t: torch.ones_like(x), noise, 1, method), noise - 1)


@pytest.mark.parametrize("steps", [1, 3, 49, 250])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_times_and_conditions(steps: int, dtype: torch.dtype) -> None:
    noise, labels = torch.randn(2, 3).to(dtype), torch.tensor([4, 5])
    grid = [1 - i / steps for i in range(steps + 1)]
    visited = {"euler": grid[:-1], "heun": [t for i in range(steps) for t in (grid[i], grid[i + 1])]}
    for method, expected in visited.items():
        field = Recorder(GAUSSIAN.teacher)
        out = sample_ode(field, noise, steps, method, labels=labels)
        assert len(field.calls) == len(expected)
        for call, t in zip(field.calls, expected, strict=True):
            # Times stay apart although the samples are in half precision.
            torch.testing.assert_close(call["t"], torch.full((2,), t), atol=1e-7, rtol=0)
            assert call["x"].dtype == dtype
            assert call["r"] is None
            assert call["cond"]["labels"] is labels
            assert not call["grad"]
        assert (out.shape, out.dtype) == (noise.shape, dtype)
    assert field.calls[-1]["t"].tolist() == [0.0, 0.0]  # exactly


def test_half_precision_samples_keep_their_small_steps() -> None:
    """250 steps of size 1/250 from 4: in bfloat16 each alone would round away and leave the noise."""
    noise = torch.full((2, 3), 4.0).bfloat16()
    out = sample_ode(lambda x, t: torch.ones_like(x), noise, 250)
    assert out.dtype == torch.bfloat16
    assert torch.all(out == 3)
    assert torch.all(sample_jumps(lambda x, t, r: torch.ones_like(x), noise, uniform_times(250)) == 3)


@pytest.mark.parametrize("sample", [lambda f, n: sample_ode(f, n, 2, "heun"), sample_jumps], ids=["ode", "jumps"])
def test_no_graph_and_the_noise_is_left_alone(sample: Callable[..., Tensor]) -> None:
    network = randomised(create_model("mlp_2d", r_embedding="added", width=8))
    noise = torch.randn(5, 2, requires_grad=True)
    before = noise.detach().clone()
    out = sample(network, noise)
    assert not out.requires_grad
    assert torch.equal(noise.detach(), before)
    assert not torch.equal(out, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, n: sample_ode(f, n, 0), "steps must be >= 1; got 0"),
        (lambda f, n: sample_ode(f, n), "one of steps and times is needed; got None and None"),
        (lambda f, n: sample_ode(f, n, 2, times=(1, 0)), r"one of steps and times is needed; got 2 and \(1, 0\)"),
        (lambda f, n: sample_ode(f, n, times=(1,)), r"times must be two or more in \[0, 1\]; got \(1,\)"),
        (lambda f, n: sample_ode(f, n, times=(1.2, 0)), "times must be two or more in"),
        (lambda f, n: sample_ode(f, n, times=(1, 0.5, 0.6)), "times must decrease strictly"),
        (lambda f, n: sample_ode(f, n, 2, last_euler=True), "last_euler is for heun; got method 'euler'"),
        (lambda f, n: sample_ode(f, n, 4, "rk4"), "method must be one of euler, heun, dopri5; got 'rk4'"),
        (
            lambda f, n: sample_jumps(f, n, (1.0, 0.2, 0.5, 0.0)),
            "times rise from 0.2 to 0.5, where noise is added: seeds",
        ),
    ],
)
def test_errors(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lambda x, t, r=None: x, torch.randn(2, 3))


def test_seeded_noise_is_a_function_of_each_seed_alone() -> None:
    together = seeded_noise((1, 8, 8), range(10))
    assert together.shape == (10, 1, 8, 8)
    assert together.dtype == torch.float32
    for seed in range(10):
        assert torch.equal(seeded_noise((1, 8, 8), [seed])[0], together[seed])
    assert torch.equal(seeded_noise((1, 8, 8), [7, 3, 7]), together[[7, 3, 7]])
    assert not torch.equal(together[0], together[1])


def test_seeded_noise_is_standard_normal_and_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    noise = seeded_noise((4,), range(2000))
    assert torch.equal(torch.get_rng_state(), state)
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert (torch.corrcoef(noise.T) - torch.eye(4)).abs().max() < 0.1
    assert torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]))[0, 1].abs() < 0.1


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_convergence_order_on_a_nonlinear_field(method: str, order: int) -> None:
    """Against an adaptive integrator of another library, on a field that mixes coordinates and time."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        a, b = x.unbind(1)
        return torch.stack([(b * t).sin() + a * b, a.cos() - t * a * b], dim=1)

    def slope(t: float, state: Any) -> list[float]:
        a, b = state
        return [math.sin(b * t) + a * b, math.cos(a) - t * a * b]

    starts = [[0.3, -0.5], [-0.8, 0.4], [0.1, 0.9]]
    ends = [solve_ivp(slope, (1, 0), start, rtol=1e-12, atol=1e-12).y[:, -1].tolist() for start in starts]
    noise, expected = torch.tensor(starts, dtype=torch.float64), torch.tensor(ends, dtype=torch.float64)
    steps = [16, 32, 64, 128, 256]
    errors = torch.stack([(sample_ode(field, noise, n, method) - expected).norm() for n in steps])
    fit = linregress(torch.tensor(steps).log2().numpy(), errors.log2().numpy())
    assert -fit.slope == pytest.approx(order, abs=0.1)
    assert errors[-1] < (2e-2 if order == 1 else 1e-4)
