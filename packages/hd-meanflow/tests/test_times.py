"""Time samplers: exact counts, ranges, the law of each marginal, determinism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hd_meanflow import LogitNormalTimes, UniformTimes

SAMPLERS = [LogitNormalTimes, UniformTimes]
share = st.floats(0, 1, allow_nan=False)


@pytest.mark.parametrize("sampler", SAMPLERS)
@given(batch=st.integers(1, 64), interval_share=share, endpoint_share=share)
def test_counts_are_exact_and_times_lie_in_the_triangle(
    sampler: Any, batch: int, interval_share: float, endpoint_share: float
) -> None:
    times = sampler(interval_share=interval_share, endpoint_share=endpoint_share)
    t, r = times.sample(batch, torch.Generator().manual_seed(batch))
    assert t.shape == r.shape == (batch,)
    assert t.dtype == r.dtype == torch.float32
    assert ((r >= 0) & (r <= t) & (t <= 1)).all()
    intervals = round(interval_share * batch)
    assert (r != t).tolist() == [i < intervals for i in range(batch)]
    ends = (t == 1) & (r == 0)
    assert int(ends.sum()) == round(endpoint_share * intervals)


def cdf_of_one_draw(sampler: Any) -> Callable[[Any], Any]:
    if sampler is UniformTimes:
        return stats.uniform.cdf
    return lambda s: stats.norm.cdf(torch.logit(torch.as_tensor(s)).numpy(), loc=-0.4, scale=1.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_times_without_an_interval_follow_a_single_draw(sampler: Any) -> None:
    t, r = sampler(interval_share=0.0).sample(20_000, torch.Generator().manual_seed(1))
    assert torch.equal(t, r)
    assert stats.kstest(t.numpy(), cdf_of_one_draw(sampler)).pvalue > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_interval_ends_follow_maximum_and_minimum_of_two_draws(sampler: Any) -> None:
    t, r = sampler(interval_share=1.0).sample(20_000, torch.Generator().manual_seed(2))
    one = cdf_of_one_draw(sampler)
    assert stats.kstest(t.numpy(), lambda s: one(s) ** 2).pvalue > 1e-3
    assert stats.kstest(r.numpy(), lambda s: 1 - (1 - one(s)) ** 2).pvalue > 1e-3


def test_mean_and_std_are_those_of_the_logit() -> None:
    t, _ = LogitNormalTimes(mean=0.8, std=0.5, interval_share=0.0).sample(50_000, torch.Generator().manual_seed(3))
    logit = torch.logit(t)
    assert logit.mean().item() == pytest.approx(0.8, abs=0.02)
    assert logit.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_generator_decides_and_the_global_state_is_left_alone(sampler: Any) -> None:
    before = torch.get_rng_state()
    first = sampler().sample(32, torch.Generator().manual_seed(5))
    again = sampler().sample(32, torch.Generator().manual_seed(5))
    other = sampler().sample(32, torch.Generator().manual_seed(6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_a_generator_the_global_seed_decides(sampler: Any) -> None:
    torch.manual_seed(7)
    first = sampler().sample(8)[0]
    torch.manual_seed(7)
    assert torch.equal(sampler().sample(8)[0], first)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_drawn_on_the_generators_device_then_moved(sampler: Any) -> None:
    t, r = sampler().sample(4, torch.Generator(), "meta")
    assert t.device.type == r.device.type == "meta"


def test_at_r_equal_t_one_draw_or_the_larger_of_two() -> None:
    """P(t <= x) is the law's F(x) for one draw and F(x)^2 for the larger of two; intervals are the same either way."""
    quarter = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    one, r_one = LogitNormalTimes().sample(40_000, quarter[0])
    two, r_two = LogitNormalTimes(larger_at_r_equal_t=True).sample(40_000, quarter[1])
    assert torch.equal(one[:10_000], two[:10_000])
    assert torch.equal(r_one[:10_000], r_two[:10_000])
    assert torch.equal(two[10_000:], r_two[10_000:])
    median = torch.sigmoid(torch.tensor(-0.4))
    assert (one[10_000:] <= median).double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert (two[10_000:] <= median).double().mean().item() == pytest.approx(0.25, abs=0.01)
