"""The stochastic sampler: the moments of its scheme, its limits, independence of seeds, the calls it makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor
from zoo_helpers import GAUSSIAN, Recorder

from hd_zoo import sample_ode, sample_sde, seeded_noise

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


def test_no_sample_meets_the_noise_of_another_seed() -> None:
    """0 and 0 ^ 0x5DE: at first, increments came from the stream of another seed, whose noise they then were."""
    seeds = [0, 0x5DE, 3, 3 ^ 0x5DE]
    noise = seeded_noise((50,), seeds).double()
    found = sample_sde(lambda x, t: torch.zeros_like(x), noise, 2, seeds=seeds, last_step=0.5, strength=lambda t: 1.0)
    increments = (2 * found - 0.75 * noise) * 2**0.5
    cross = torch.corrcoef(torch.cat([noise, increments]))
    assert (cross - torch.eye(8)).abs().max() < 0.6
    # A stream goes on where its noise ended.
    stream = torch.Generator().manual_seed(0)
    assert torch.equal(torch.randn(50, generator=stream), noise[0].float())
    torch.testing.assert_close(increments[0], torch.randn(50, generator=stream).double())


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
