"""Noise-level samplers: range, shift, law, determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dmd_helpers import seeded
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hd_dmd import KarrasLevels, LevelSampler, LogitNormalLevels, UniformLevels, shift_levels

SAMPLERS = [UniformLevels, LogitNormalLevels]


@given(t=st.floats(0, 1), shift=st.floats(0.05, 20))
def test_shift_formula(t: float, shift: float) -> None:
    """The shift multiplies the odds t / (1 - t) by s: an independent way to write it."""
    shifted = shift_levels(torch.tensor(t, dtype=torch.float64), shift).item()
    odds = shift * t / (1 - t) if t < 1 else float("inf")
    assert shifted == pytest.approx(odds / (1 + odds) if t < 1 else 1.0, abs=1e-12)


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0])
def test_shift_keeps_ends_and_order_and_moves_the_right_way(shift: float) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_levels(t, shift)
    assert shifted[0] == 0
    assert shifted[-1] == pytest.approx(1, abs=1e-15)
    assert (shifted.diff() > 0).all()
    inner = (shifted - t)[1:-1]
    assert (inner > 0).all() if shift > 1 else (inner < 0).all() if shift < 1 else torch.equal(shifted, t)


def test_shift_undone_by_its_inverse() -> None:
    t = torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close(shift_levels(shift_levels(t, 4.0), 0.25), t)


@pytest.mark.parametrize("sampler", SAMPLERS)
@given(
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda ends: abs(ends[0] - ends[1]) > 1e-3),
    shift=st.floats(0.1, 10),
    batch=st.integers(1, 64),
)
def test_levels_lie_in_their_range(sampler: Any, ends: tuple[float, float], shift: float, batch: int) -> None:
    low, high = sorted(ends)
    t = sampler(low=low, high=high, shift=shift).sample(batch, seeded(batch))
    assert t.shape == (batch,)
    assert t.dtype == torch.float32
    assert (t >= low - 1e-6).all()
    assert (t <= high + 1e-6).all()


def test_uniform_law() -> None:
    t = UniformLevels().sample(20_000, seeded(1)).numpy()
    assert stats.kstest(t, stats.uniform(0.02, 0.96).cdf).pvalue > 1e-3


def test_uniform_law_under_shift() -> None:
    """P(t <= c) = the uniform share that the shift maps to c."""
    t = UniformLevels(low=0.1, high=0.9, shift=3.0).sample(20_000, seeded(2))
    share = ((t - 0.1) / 0.8).clamp(0, 1)
    assert stats.kstest(shift_levels(share, 1 / 3).numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(share.numpy(), "uniform").pvalue < 1e-6


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_logit_normal_law(shift: float) -> None:
    """The shift adds log s to the logit, so the law stays logit-normal."""
    t = LogitNormalLevels(mean=0.4, std=0.7, low=0.0, high=1.0, shift=shift).sample(20_000, seeded(3))
    law = stats.norm(0.4 + torch.tensor(shift).log().item(), 0.7)
    assert stats.kstest(torch.logit(t.double()).numpy(), law.cdf).pvalue > 1e-3


def test_logit_normal_range_is_squeezed_not_cut() -> None:
    t = LogitNormalLevels(low=0.2, high=0.6).sample(20_000, seeded(4))
    share = (t.double() - 0.2) / 0.4
    assert stats.kstest(torch.logit(share).numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("sampler", [*SAMPLERS, KarrasLevels])
def test_a_generator_decides_and_the_global_state_is_left_alone(sampler: Any) -> None:
    before = torch.get_rng_state()
    first, again, other = (sampler().sample(32, seeded(s)) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sampler().sample(4, seeded(), "meta").device.type == "meta"


def test_a_sampler_is_one_for_type_checkers_and_takes_an_empty_batch() -> None:
    for sampler in (UniformLevels(), LogitNormalLevels(), KarrasLevels()):
        noise_levels: LevelSampler = sampler
        assert noise_levels.sample(0).shape == (0,)
