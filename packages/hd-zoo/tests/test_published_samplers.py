"""Samplers of published codes, written out in their own time, against the settings that docs/conventions.md gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hd_zoo import Guidance, ReversedTime, sample_ode, sample_sde, seeded_noise, shift_times, uniform_times

NULL, LABELS, SEEDS = 5, torch.tensor([0, 3, 4]), [2, 9, 4]


def forwards(x: Tensor, t: Tensor, *, labels: Tensor) -> Tensor:
    """A velocity in the time of SiT and LightningDiT, t = 0 noise; it mixes channels, time and label."""
    shift = torch.where(labels == NULL, -1.0, 0.3 * labels)[:, None, None, None]
    t = t[:, None, None, None]
    return (x.roll(1, dims=1) * t).sin() - 0.5 * x + shift * (1 + t)


def guided_forwards(x: Tensor, t: float, scale: float, start: float, channels: int) -> Tensor:
    """Conditional and null answers mixed in the first channels, for times from ``start`` on."""
    time = torch.full((len(x),), t, dtype=x.dtype)
    conditional = forwards(x, time, labels=LABELS)
    null = forwards(x, time, labels=torch.full_like(LABELS, NULL))
    mixed = conditional.clone()
    if t >= start:
        mixed[:, :channels] = (null + scale * (conditional - null))[:, :channels]
    return mixed


@pytest.fixture
def noise() -> Tensor:
    return seeded_noise((6, 2, 2), SEEDS).double()


@pytest.mark.parametrize("shift", [0.3, 1.0])
def test_lightningdits_euler(noise: Tensor, shift: float) -> None:
    """50 points of its time, shifted; guided from t = 0.125 on, three channels."""
    points = [i / 49 for i in range(50)]
    points = [shift * t / (1 + (shift - 1) * t) for t in points]
    x = noise
    for now, after in itertools.pairwise(points):
        x = x + (after - now) * guided_forwards(x, now, 6.7, 0.125, 3)
    guided = Guidance(ReversedTime(forwards), 6.7, (0.0, 0.875), null={"labels": NULL}, channels=3)
    found = sample_ode(guided, noise, times=shift_times(uniform_times(49), 1 / shift), labels=LABELS)
    torch.testing.assert_close(found, x, atol=1e-10, rtol=1e-10)


def test_sits_stochastic_sampler(noise: Tensor) -> None:
    """20 steps: 19 of Euler and Maruyama in its time from 0 to 0.96, with D = sigma_t, and a last one of the mean."""
    streams = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    for stream in streams:
        torch.randn(6, 2, 2, generator=stream)

    def drift(x: Tensor, t: float) -> Tensor:
        """v + D s, with the score of x_t = t x + (1 - t) eps."""
        v = guided_forwards(x, t, 1.5, 0.0, 3)
        score = (t * v - x) / (1 - t)
        return v + (1 - t) * score

    x, points = noise, torch.linspace(0, 0.96, 20, dtype=torch.float64).tolist()
    for now, after in itertools.pairwise(points):
        step = after - now
        increment = torch.stack([torch.randn(6, 2, 2, generator=stream) for stream in streams]).double()
        x = x + step * drift(x, now) + (2 * (1 - now)) ** 0.5 * step**0.5 * increment
    x = x + 0.04 * drift(x, points[-1])
    guided = Guidance(ReversedTime(forwards), 1.5, null={"labels": NULL}, channels=3)
    found = sample_sde(guided, noise, 20, seeds=SEEDS, labels=LABELS)
    torch.testing.assert_close(found, x, atol=1e-10, rtol=1e-10)


def test_repas_heun(noise: Tensor) -> None:
    """Its time is ours; all channels are guided; no correction in the last step."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return -guided_forwards(x, 1 - t, 1.8, 0.0, 6)

    x, points = noise, [1 - i / 10 for i in range(11)]
    for i, (now, after) in enumerate(itertools.pairwise(points)):
        first = velocity(x, now)
        ahead = x + (after - now) * first
        x = ahead if i == 9 else x + (after - now) * (first + velocity(ahead, after)) / 2
    guided: Any = Guidance(ReversedTime(forwards), 1.8, null={"labels": NULL})
    found = sample_ode(guided, noise, 10, "heun", last_euler=True, labels=LABELS)
    torch.testing.assert_close(found, x, atol=1e-10, rtol=1e-10)
