"""UNets with attention in both losses."""

from __future__ import annotations

import pytest
import torch
from dmd_helpers import UNETS, seeded

from hd_dmd import DistributionMatchingLoss, fake_score_loss


@pytest.mark.parametrize("unet", UNETS)
def test_distribution_matching_sends_its_gradient_into_a_unet_student(unet: str) -> None:
    student, real, fake = (UNETS[unet]() for _ in range(3))
    real.requires_grad_(False)
    fake.requires_grad_(False)
    noise = torch.randn(2, 3, 8, 8)
    sample = noise - student(noise, torch.ones(2), torch.zeros(2))
    output = DistributionMatchingLoss()(sample, real=real, fake=fake, generator=seeded())
    output.loss.backward()
    assert output.gradient_rms > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert sum(p.grad.abs().sum() for p in student.parameters()) > 0
    assert all(p.grad is None for net in (real, fake) for p in net.parameters())


@pytest.mark.parametrize("unet", UNETS)
def test_a_unet_fake_score_trains_on_the_samples_of_a_unet_student(unet: str) -> None:
    student, fake = UNETS[unet](), UNETS[unet]()
    student.requires_grad_(False)
    noise = torch.randn(2, 3, 8, 8)
    sample = noise - student(noise, torch.ones(2), torch.zeros(2))
    output = fake_score_loss(fake, sample, generator=seeded())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fake.parameters())
    assert sum(p.grad.abs().sum() for p in fake.parameters()) > 0
    assert all(p.grad is None for p in student.parameters())
