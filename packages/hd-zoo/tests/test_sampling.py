"""Samplers on the Gaussian's closed forms: measured orders, exact jumps, the calls they make, errors."""

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

from hd_zoo import create_model, sample_jumps, sample_ode, sample_sde, seeded_noise, uniform_times


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


def test_a_constant_velocity_is_integrated_exactly_by_one_step() -> None:
    noise = torch.randn(4, 2, dtype=torch.float64)
    for method in ("euler", "heun"):
        assert torch.equal(sample_ode(lambda x, t: torch.ones_like(x), noise, 1, method), noise - 1)


@pytest.mark.parametrize("times", [(1.0, 0.0), (1.0, 0.5, 0.0), (1, 0.93, 0.4, 0.05, 0), uniform_times(7)])
def test_exact_jumps_land_exactly(times: tuple[float, ...]) -> None:
    noise = torch.randn(16, 3, dtype=torch.float64)
    found = sample_jumps(GAUSSIAN.student, noise, times)
    torch.testing.assert_close(found, exact(noise), atol=1e-13, rtol=1e-12)


def test_one_jump_with_the_teacher_alone_does_not_land() -> None:
    noise = torch.randn(16, 3, dtype=torch.float64)
    assert (sample_jumps(GAUSSIAN.teacher, noise) - exact(noise)).abs().max() > 0.1


def test_jumps_through_a_teacher_are_euler_steps() -> None:
    noise = torch.randn(16, 3, dtype=torch.float64)
    jumps = sample_jumps(GAUSSIAN.teacher, noise, uniform_times(5))
    torch.testing.assert_close(jumps, sample_ode(GAUSSIAN.teacher, noise, 5), atol=1e-13, rtol=1e-13)


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


def test_jumps_pass_both_times_and_the_conditions() -> None:
    noise, labels, field = torch.randn(2, 3), torch.tensor([4, 5]), Recorder(GAUSSIAN.student)
    sample_jumps(field, noise, (1.0, 0.6, 0.25, 0.0), labels=labels)
    seen = [(call["t"].tolist(), call["r"].tolist()) for call in field.calls]
    for (t, r), (expected_t, expected_r) in zip(seen, [(1, 0.6), (0.6, 0.25), (0.25, 0)], strict=True):
        assert t == pytest.approx([expected_t] * 2)
        assert r == pytest.approx([expected_r] * 2)
    assert seen[-1][1] == [0.0, 0.0]
    assert all(call["cond"]["labels"] is labels and not call["grad"] for call in field.calls)


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
        (lambda f, n: sample_ode(f, n, 4, "rk4"), "method must be one of euler, heun; got 'rk4'"),
        (lambda f, n: sample_jumps(f, n, (1.0,)), "times must run from 1 to 0"),
        (lambda f, n: sample_jumps(f, n, (0.9, 0.0)), r"times must run from 1 to 0; got \(0.9, 0.0\)"),
        (lambda f, n: sample_jumps(f, n, (1.0, 0.1)), "times must run from 1 to 0"),
        (lambda f, n: sample_jumps(f, n, (1.0, 0.5, 0.5, 0.0)), "times must decrease strictly"),
        (lambda f, n: sample_jumps(f, n, (1.0, 0.2, 0.5, 0.0)), "times must decrease strictly"),
        (lambda f, n: uniform_times(0), "steps must be >= 1"),
    ],
)
def test_errors(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lambda x, t, r=None: x, torch.randn(2, 3))


@pytest.mark.parametrize("steps", [1, 2, 3, 49])
def test_uniform_times(steps: int) -> None:
    times = uniform_times(steps)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert all(a - b == pytest.approx(1 / steps) for a, b in itertools.pairwise(times))


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


SEEDS = range(3000)


def draw_sde(field: Any, steps: int, **settings: Any) -> Tensor:
    """3,000 independent numbers, float64."""
    return sample_sde(field, seeded_noise((1,), SEEDS).double(), steps, seeds=SEEDS, **settings)[:, 0]


def moments(steps: int, last_step: float, strength: Callable[[float], float]) -> tuple[float, float]:
    """Mean and variance that the scheme itself gives a Gaussian: its steps are affine in x and in the increment."""
    mean, variance = 0.0, 1.0
    grid = [1 - (1 - last_step) * j / (steps - 1) for j in range(steps)]
    one = torch.ones(1, 1, dtype=torch.float64)

    def drift(t: float, x: float) -> float:
        """v - w s / 2 with the score of N((1 - t) m, sigma(t)^2) in closed form."""
        time = torch.full((1,), t, dtype=torch.float64)
        score = -(x - (1 - t) * GAUSSIAN.mean) / GAUSSIAN.sigma(time).item() ** 2
        return GAUSSIAN.teacher(x * one, time).item() - strength(t) * score / 2

    for now, after in [*itertools.pairwise(grid), (last_step, 0.0)]:
        offset = drift(now, 0.0)
        gain = drift(now, 1.0) - offset
        mean = mean - (now - after) * (offset + gain * mean)
        noise = strength(now) * (now - after) if after else 0.0  # the last step is the mean alone
        variance = (1 - (now - after) * gain) ** 2 * variance + noise
    return mean, variance


@pytest.mark.parametrize("strength", [None, lambda t: t, lambda t: 1.0], ids=["default", "t", "constant"])
@pytest.mark.parametrize(("steps", "last_step"), [(12, 0.04), (30, 0.1)])
def test_the_stochastic_sampler_has_the_moments_of_its_scheme(
    steps: int, last_step: float, strength: Callable[[float], float] | None
) -> None:
    found = draw_sde(GAUSSIAN.teacher, steps, last_step=last_step, strength=strength)
    mean, variance = moments(steps, last_step, strength or (lambda t: 2 * t))
    count = len(found)
    assert abs(found.mean().item() - mean) < 4.5 * (variance / count) ** 0.5
    assert abs(found.var().item() / variance - 1) < 4.5 * (2 / count) ** 0.5


def test_the_stochastic_sampler_reaches_the_data_with_more_steps() -> None:
    """The variance's bias falls; what is left of both biases at many steps is within the draw's error."""
    few, many = draw_sde(GAUSSIAN.teacher, 4, last_step=0.25), draw_sde(GAUSSIAN.teacher, 100, last_step=0.01)
    assert abs(many.var() - GAUSSIAN.std**2) < 0.3 * abs(few.var() - GAUSSIAN.std**2)
    count = len(many)
    assert abs(many.mean().item() - GAUSSIAN.mean) < 4.5 * GAUSSIAN.std / count**0.5
    assert abs(many.var().item() / GAUSSIAN.std**2 - 1) < 4.5 * (2 / count) ** 0.5
    assert kstest(((many - many.mean()) / many.std()).numpy(), "norm").pvalue > 1e-3


def test_without_strength_the_stochastic_sampler_is_eulers() -> None:
    noise, last = torch.randn(5, 3, dtype=torch.float64), 0.04
    found = sample_sde(GAUSSIAN.teacher, noise, 8, seeds=range(5), last_step=last, strength=lambda t: 0.0)
    x, grid = noise, [1 - (1 - last) * j / 7 for j in range(8)] + [0.0]
    for now, after in itertools.pairwise(grid):
        x = x - (now - after) * GAUSSIAN.teacher(x, torch.full((5,), now, dtype=torch.float64))
    torch.testing.assert_close(found, x, atol=1e-14, rtol=1e-14)
    # Equal steps to the end: those of sample_ode.
    found = sample_sde(GAUSSIAN.teacher, noise, 10, seeds=range(5), last_step=0.1, strength=lambda t: 0.0)
    torch.testing.assert_close(found, sample_ode(GAUSSIAN.teacher, noise, 10), atol=1e-13, rtol=1e-13)


def test_a_stochastic_sample_is_a_function_of_its_seed_alone() -> None:
    seeds = [3, 8, 3, 11]
    noise = seeded_noise((2, 2), seeds)
    state = torch.get_rng_state()
    together = sample_sde(GAUSSIAN.teacher, noise, 6, seeds=seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample_sde(GAUSSIAN.teacher, noise, 6, seeds=seeds), together)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    for b, seed in enumerate(seeds):
        assert torch.equal(sample_sde(GAUSSIAN.teacher, noise[b : b + 1], 6, seeds=[seed])[0], together[b])
    order = [2, 0, 3, 1]
    assert torch.equal(sample_sde(GAUSSIAN.teacher, noise[order], 6, seeds=[seeds[i] for i in order]), together[order])
    other = sample_sde(GAUSSIAN.teacher, noise, 6, seeds=[4, 5, 6, 7])
    assert not torch.isclose(other, together).any()


def test_increments_are_independent_of_the_noise_of_the_same_seed() -> None:
    """With v = 0 both steps are known multiples of x, so that the only increment can be read off the sample."""
    noise = seeded_noise((1,), SEEDS).double()
    found = sample_sde(lambda x, t: torch.zeros_like(x), noise, 2, seeds=SEEDS, last_step=0.5, strength=lambda t: 1.0)
    # x_0.5 = x - (1/2)(x / 2) + sqrt(1/2) dW; then x_0 = x_0.5 - (1/2)(x_0.5 / 0.5 / 2) = x_0.5 / 2
    increments = (2 * found - 0.75 * noise) * 2**0.5
    assert kstest(increments[:, 0].numpy(), "norm").pvalue > 1e-3
    assert torch.corrcoef(torch.stack([increments[:, 0], noise[:, 0]]))[0, 1].abs() < 0.08
    assert torch.corrcoef(torch.stack([increments[1:, 0], increments[:-1, 0]]))[0, 1].abs() < 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stochastic_calls_times_and_conditions(dtype: torch.dtype) -> None:
    noise, labels, field = (
        torch.randn(2, 3).to(dtype).requires_grad_(),
        torch.tensor([4, 5]),
        Recorder(GAUSSIAN.teacher),
    )
    before = noise.detach().clone()
    out = sample_sde(field, noise, 25, seeds=[0, 1], labels=labels)
    assert (out.shape, out.dtype, out.requires_grad) == (noise.shape, dtype, False)
    assert torch.equal(noise.detach(), before)
    expected = [1 - 0.96 * j / 24 for j in range(25)]
    assert expected[-1] == pytest.approx(0.04)
    assert len(field.calls) == 25
    for call, t in zip(field.calls, expected, strict=True):
        torch.testing.assert_close(call["t"], torch.full((2,), t), atol=1e-6, rtol=0)
        assert call["x"].dtype == dtype
        assert call["r"] is None
        assert call["cond"]["labels"] is labels
        assert not call["grad"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps must be >= 2; got 1"),
        ({"steps": 0}, "steps must be >= 2; got 0"),
        ({"last_step": 0.0}, r"last_step must lie in \(0, 1\); got 0.0"),
        ({"last_step": 1.0}, "last_step must lie in"),
        ({"last_step": float("nan")}, "last_step must lie in"),
        ({"seeds": [1]}, "seeds must be one per sample, 2; got 1"),
        ({"seeds": range(3)}, "seeds must be one per sample, 2; got 3"),
    ],
)
def test_errors_of_the_stochastic_sampler(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_sde(lambda x, t: x, torch.randn(2, 3), **{"steps": 4, "seeds": [0, 1], **arguments})
