"""Grids of times: shifts, and the ways that consistency and restart sampling take through them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hd_zoo import renoised_times, restarted_times, shift_times, uniform_times


@pytest.mark.parametrize("steps", [1, 2, 3, 49])
def test_uniform_times(steps: int) -> None:
    times = uniform_times(steps)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert all(a - b == pytest.approx(1 / steps) for a, b in itertools.pairwise(times))


def ratio(t: float) -> float:
    """Of noise to data on the linear path."""
    return t / (1 - t)


@given(st.floats(0.01, 0.99), st.floats(0.1, 10))
def test_a_shift_multiplies_the_ratio_of_noise_to_data(t: float, shift: float) -> None:
    (shifted,) = shift_times([t], shift)
    assert ratio(shifted) == pytest.approx(shift * ratio(t))
    assert shift_times([shifted], 1 / shift) == pytest.approx((t,))


@pytest.mark.parametrize("shift", [0.3, 1.0, 10 / 3])
def test_a_shift_keeps_the_ends_and_the_order(shift: float) -> None:
    times = shift_times(uniform_times(20), shift)
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(times))
    half = sum(t > 0.5 for t in times)
    assert half < 10 if shift < 1 else half > 10 if shift > 1 else half == 10


def test_lightningdits_shift_in_this_packages_time() -> None:
    """There t = 0 is noise: t -> 0.3 t / (1 - 0.7 t). Its grid, read from our side, is our grid shifted by 1 / 0.3."""
    theirs = [i / 40 for i in range(41)]
    shifted = [0.3 * t / (1 + (0.3 - 1) * t) for t in theirs]
    ours = shift_times(uniform_times(40), 1 / 0.3)
    assert ours == pytest.approx([1 - t for t in shifted])


def test_consistency_sampling_goes_to_data_and_back() -> None:
    assert renoised_times((1, 0.6, 0.3, 0)) == (1, 0, 0.6, 0, 0.3, 0)
    assert renoised_times((1, 0)) == (1, 0)
    assert renoised_times((1, 0.6, 0.3, 0), 0.0) == (1, 0.6, 0.3, 0)


def test_between_them_the_jump_ends_at_a_share_of_the_ratio() -> None:
    start, low, high, end = renoised_times((1, 0.6, 0), 0.8)
    assert (start, high, end) == (1, 0.6, 0)
    assert ratio(low) == pytest.approx(0.6 * ratio(high))


def test_restarts() -> None:
    times = (1, 0.7, 0.5, 0.2, 0.1, 0)
    assert restarted_times(times, 0.2, 0.6) == (1, 0.7, 0.5, 0.2, 0.6, 0.5, 0.2, 0.1, 0)
    assert restarted_times(times, 0.2, 0.5, 2) == (1, 0.7, 0.5, 0.2, 0.5, 0.2, 0.5, 0.2, 0.1, 0)
    assert restarted_times((1, 0), 0, 1) == (1, 0, 1, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_times(0), "steps must be >= 1; got 0"),
        (lambda: shift_times((1, 0), 0), "shift must be > 0 and finite; got 0"),
        (lambda: shift_times((1, 0), float("nan")), "shift must be > 0 and finite"),
        (lambda: shift_times((1.1, 0), 2), r"times must lie in \[0, 1\]; got \(1.1, 0\)"),
        (lambda: renoised_times((1, 0.5, 0), 1.5), r"gamma must lie in \[0, 1\]; got 1.5"),
        (lambda: renoised_times((1, 0.5, 0.5, 0)), "times must decrease strictly"),
        (lambda: renoised_times((0.9, 0)), "times must run from 1 to 0"),
        (lambda: restarted_times((1, 0.5, 0), 0.4, 0.6), r"low must be one of the times \(1, 0.5, 0\); got 0.4"),
        (lambda: restarted_times((1, 0.5, 0), 0.5, 0.5), r"high must lie in \(low, 1\]; got low 0.5, high 0.5"),
        (lambda: restarted_times((1, 0.5, 0), 0.5, 0.6, 0), "repeats must be >= 1; got 0"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
