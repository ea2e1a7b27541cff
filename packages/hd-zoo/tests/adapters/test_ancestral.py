"""Ancestral sampling of DiT against diffusers' DDPMScheduler, step by step on the same increments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hd_zoo import DiffusedNoise, Guidance, sample_ancestral, seeded_noise
from hd_zoo.adapters import DiTNoise, from_diffusers_dit

SEEDS, LABELS = [3, 11], torch.tensor([4, 7])
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}


def with_diffusers(diffusers: Any, model: Any, noise: Tensor, steps: int, variance: str, scale: float) -> Tensor:
    """Its scheduler's loop; guidance on all latent channels, the variance from the conditional half."""
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=2e-2, variance_type=VARIANCES[variance], clip_sample=False
    )
    scheduler.set_timesteps(timesteps=[round(i * 999 / (steps - 1)) for i in reversed(range(steps))])
    channels = noise.shape[1]
    z = noise
    for step in scheduler.timesteps:
        both = model(
            torch.cat([z, z]),
            timestep=step.expand(4).double(),
            class_labels=torch.cat([LABELS, torch.full_like(LABELS, 10)]),
            return_dict=False,
        )[0]
        conditional, unconditional = both.chunk(2)
        eps = unconditional[:, :channels] + scale * (conditional - unconditional)[:, :channels]
        answer = torch.cat([eps, conditional[:, channels:]], dim=1) if variance == "learned" else eps
        z = scheduler.step(answer, step, z).prev_sample
    return z


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [4, 25])
def test_as_diffusers_scheduler_does(
    variance: str, steps: int, make_dit: Any, diffusers: Any, all_double: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_dit().double()
    noise = seeded_noise((4, 8, 8), SEEDS).double()
    streams = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    for stream in streams:
        torch.randn(4, 8, 8, generator=stream)  # the noise at the start

    def increments(shape: Any, **options: Any) -> Tensor:
        return torch.stack([torch.randn(4, 8, 8, generator=stream) for stream in streams]).double()

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", increments)
    with torch.no_grad():
        expected = with_diffusers(diffusers, model, noise, steps, variance, 1.5)
    scale = expected.abs().max()
    for network in (DiTNoise(model), from_diffusers_dit(model)):
        guided = Guidance(DiffusedNoise(network), 1.5, null={"labels": 10})
        found = sample_ancestral(guided, noise, steps, seeds=SEEDS, variance=variance, labels=LABELS)
        torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=0)
