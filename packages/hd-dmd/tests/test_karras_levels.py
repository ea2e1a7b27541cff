"""DMD2's law on ImageNet, against EDM's schedule written out in numpy and against the published settings' quantiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dmd_helpers import seeded
from scipy import stats

from hd_dmd import KarrasLevels, UniformLevels

# DMD2's ImageNet settings: 1000 steps, sigma 0.002 to 80, rho 7, the student on steps 20 to 980, the fake score on all.
STUDENT = KarrasLevels()
ALL_STEPS = KarrasLevels(min_step_share=0.0, max_step_share=1.0)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def edm_times(first: int, last: int) -> np.ndarray:
    """t of steps first to last of EDM's 1000 (arXiv 2206.00364, eq. 5), from data to noise, in float64."""
    sigma = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 1000) ** 7
    return (sigma / (1 + sigma))[first : last + 1]


CASES = [
    (STUDENT, 20, 980, (0.009, 0.163, 0.716, 0.943, 0.982)),
    (ALL_STEPS, 0, 999, (0.006, 0.145, 0.716, 0.946, 0.984)),
]


@pytest.mark.parametrize(("levels", "first", "last", "quantiles"), CASES, ids=["student", "all"])
def test_the_levels_are_those_of_the_schedule(
    levels: KarrasLevels, first: int, last: int, quantiles: tuple[float, ...]
) -> None:
    """Every step of the range comes, no other does, and each as often: then the quantiles are exact."""
    t = levels.sample(400_000, seeded(1)).double().numpy()
    steps, counts = np.unique(t, return_counts=True)
    np.testing.assert_allclose(steps, edm_times(first, last), rtol=1e-5)
    assert stats.chisquare(counts).pvalue > 1e-3
    np.testing.assert_allclose(np.quantile(steps, QUANTILES), quantiles, atol=6e-4)
    np.testing.assert_allclose(np.quantile(t, QUANTILES), quantiles, atol=6e-3)


def test_the_law_is_far_from_uniform_in_t() -> None:
    """A quarter of the student's levels lies above 0.943, where U[0.02, 0.98] has 4 %."""
    karras, uniform = (levels.sample(100_000, seeded(2)) for levels in (STUDENT, UniformLevels()))
    assert (karras > 0.943).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert (uniform > 0.943).double().mean().item() == pytest.approx(0.04, abs=0.01)


def test_a_sample_noised_as_edm_does_lies_on_the_linear_path_at_t() -> None:
    """(x + sigma n) / (1 + sigma) = (1 - t) x + t n."""
    x, n, sigma = torch.randn(3, 64, dtype=torch.float64)
    sigma = sigma.exp()
    t = sigma / (1 + sigma)
    torch.testing.assert_close((x + sigma * n) / (1 + sigma), (1 - t) * x + t * n)


@pytest.mark.parametrize("std", [0.5, 1.0, 0.25])
def test_the_shift_keeps_the_signal_to_noise_ratio(std: float) -> None:
    """std (1 - t) / t of data scaled to `std` is that of EDM's data, 0.5 / sigma, at every step."""
    t = KarrasLevels(shift=std / 0.5).sample(1000, seeded()).double()
    usual = KarrasLevels().sample(1000, seeded()).double()
    torch.testing.assert_close(std * (1 - t) / t, 0.5 * (1 - usual) / usual, rtol=1e-4, atol=0)


def test_other_schedules() -> None:
    """rho = 1 spaces sigma evenly; two steps are the two ends; a narrow share is a single step."""
    even = KarrasLevels(
        min_step_share=0.0, max_step_share=1.0, num_steps=5, sigma_min=1.0, sigma_max=5.0, rho=1.0
    ).sample(500, seeded())
    torch.testing.assert_close(even.unique(), torch.tensor([1 / 2, 2 / 3, 3 / 4, 4 / 5, 5 / 6]))
    ends = KarrasLevels(min_step_share=0.0, max_step_share=1.0, num_steps=2, sigma_min=1.0, sigma_max=3.0)
    torch.testing.assert_close(ends.sample(100, seeded()).unique(), torch.tensor([0.5, 0.75]))
    one = KarrasLevels(min_step_share=0.5, max_step_share=0.5001, sigma_min=1.0, sigma_max=3.0)
    assert len(one.sample(100, seeded()).unique()) == 1
