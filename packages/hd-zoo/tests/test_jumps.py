"""Jumps of a mean velocity on the Gaussian's closed forms: exact landings, noise added between jumps, restarts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor
from zoo_helpers import GAUSSIAN, Recorder

from hd_zoo import renoised_times, restarted_times, sample_jumps, sample_ode, seeded_noise, uniform_times


def exact(noise: Tensor) -> Tensor:
    """The trajectory's end at t = 0."""
    one = torch.ones((), dtype=noise.dtype)
    return GAUSSIAN.position(noise, one, 0 * one)


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


def test_jumps_pass_both_times_and_the_conditions() -> None:
    noise, labels, field = torch.randn(2, 3), torch.tensor([4, 5]), Recorder(GAUSSIAN.student)
    sample_jumps(field, noise, (1.0, 0.6, 0.25, 0.0), labels=labels)
    seen = [(call["t"].tolist(), call["r"].tolist()) for call in field.calls]
    for (t, r), (expected_t, expected_r) in zip(seen, [(1, 0.6), (0.6, 0.25), (0.25, 0)], strict=True):
        assert t == pytest.approx([expected_t] * 2)
        assert r == pytest.approx([expected_r] * 2)
    assert seen[-1][1] == [0.0, 0.0]
    assert all(call["cond"]["labels"] is labels and not call["grad"] for call in field.calls)


SEEDS = range(4000)
STOCHASTIC = {
    "consistency": renoised_times((1, 0.6, 0.3, 0)),
    "gamma": renoised_times((1, 0.6, 0.3, 0), 0.5),
    "restart": restarted_times((1, 0.5, 0.2, 0), 0.2, 0.7, repeats=2),
    "from data": (1, 0, 1, 0),
}


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_an_exact_student_keeps_the_datas_distribution(kind: str) -> None:
    """Jumps and noise both carry the marginals over: what comes out is N(m, s^2) again, and new."""
    noise = seeded_noise((1,), SEEDS).double()
    found = sample_jumps(GAUSSIAN.student, noise, STOCHASTIC[kind], seeds=SEEDS)
    assert kstest((found[:, 0].numpy() - GAUSSIAN.mean) / GAUSSIAN.std, "norm").pvalue > 1e-3
    assert (found - exact(noise)).abs().mean() > 0.1


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_the_states_between_have_their_marginals(kind: str) -> None:
    """At every call, x is N((1 - t) m, sigma(t)^2)."""
    noise = seeded_noise((1,), SEEDS).double()
    field = Recorder(GAUSSIAN.student)
    sample_jumps(field, noise, STOCHASTIC[kind], seeds=SEEDS)
    assert len(field.calls) == sum(b < a for a, b in zip(STOCHASTIC[kind], STOCHASTIC[kind][1:], strict=False))
    for call in field.calls:
        t = call["t"][0].double()
        z = (call["x"][:, 0] - (1 - t) * GAUSSIAN.mean) / GAUSSIAN.sigma(t)
        assert kstest(z.numpy(), "norm").pvalue > 1e-3


def test_added_noise_goes_on_in_each_samples_stream() -> None:
    """With u = 0 jumps do nothing, so what is added can be read off: it follows the noise of the same seed."""
    seeds = [0, 1502, 7]
    noise = seeded_noise((20,), seeds).double()
    found = sample_jumps(lambda x, t, r: torch.zeros_like(x), noise, (1, 0, 0.5, 0), seeds=seeds)
    for b, seed in enumerate(seeds):
        stream = torch.Generator().manual_seed(seed)
        torch.randn(20, generator=stream)
        torch.testing.assert_close(2 * found[b] - noise[b], torch.randn(20, generator=stream).double())
    order = [2, 0, 1]
    again = sample_jumps(
        lambda x, t, r: torch.zeros_like(x), noise[order], (1, 0, 0.5, 0), seeds=[seeds[i] for i in order]
    )
    assert torch.equal(again, found[order])


def test_without_a_rise_seeds_change_nothing() -> None:
    noise, state = torch.randn(2, 3), torch.get_rng_state()
    assert torch.equal(
        sample_jumps(GAUSSIAN.student, noise, (1, 0.5, 0), seeds=[1, 2]),
        sample_jumps(GAUSSIAN.student, noise, (1, 0.5, 0)),
    )
    sample_jumps(GAUSSIAN.student, noise, (1, 0, 0.5, 0), seeds=[1, 2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, n: sample_jumps(f, n, (1.0,)), "times must run from 1 to 0"),
        (lambda f, n: sample_jumps(f, n, (0.9, 0.0)), r"times must run from 1 to 0; got \(0.9, 0.0\)"),
        (lambda f, n: sample_jumps(f, n, (1.0, 0.1)), "times must run from 1 to 0"),
        (lambda f, n: sample_jumps(f, n, (1.0, 1.5, 0.0)), r"times must lie in \[0, 1\]"),
        (lambda f, n: sample_jumps(f, n, (1.0, 0.5, 0.5, 0.0)), "times must not stand still"),
        (
            lambda f, n: sample_jumps(f, n, (1.0, 0.2, 0.5, 0.0)),
            "times rise from 0.2 to 0.5, .*: seeds, one per sample",
        ),
        (lambda f, n: sample_jumps(f, n, (1, 0, 0.5, 0), seeds=[1]), "seeds must be one per sample, 2; got 1"),
    ],
)
def test_errors(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lambda x, t, r=None: x, torch.randn(2, 3))
