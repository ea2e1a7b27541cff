"""The two losses together: a student's distribution moves onto the teacher's."""

from __future__ import annotations

import pytest
import torch
from dmd_helpers import MLP, Gaussian
from torch import Tensor, nn

from hd_dmd import DistributionMatchingLoss, UniformLevels, fake_score_loss


class Affine(nn.Module):
    """Student: x = a + b z."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))

    def forward(self, z: Tensor) -> Tensor:
        return self.mean + self.std * z


def test_with_an_exact_fake_score_the_student_lands_on_the_teacher() -> None:
    real, student = Gaussian(0.7, 0.4), Affine(1.5, 1.0)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(300):
        fake = Gaussian(student.mean.item(), student.std.item())
        output = DistributionMatchingLoss()(student(torch.randn(512, 16)), real=real, fake=fake)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
    assert student.mean.item() == pytest.approx(0.7, abs=0.01)
    assert student.std.item() == pytest.approx(0.4, abs=0.01)


@pytest.mark.slow
def test_with_a_learnt_fake_score_the_student_lands_on_the_teacher() -> None:
    """Two time scales: five fake-score steps per student step."""
    real, student, fake = Gaussian(0.7, 0.4), Affine(1.2, 0.8), MLP(1, 32)
    student_optimiser = torch.optim.Adam(student.parameters(), lr=1e-2, betas=(0.5, 0.9))
    fake_optimiser = torch.optim.Adam(fake.parameters(), lr=3e-3)
    levels = UniformLevels(low=0.1, high=0.9)
    matching = DistributionMatchingLoss(noise_levels=levels)
    means, stds = [], []
    for step in range(1500):
        fake_loss = fake_score_loss(fake, student(torch.randn(256, 1)), noise_levels=levels).loss
        fake_optimiser.zero_grad()
        fake_loss.backward()
        fake_optimiser.step()
        if step >= 250 and step % 5 == 0:
            loss = matching(student(torch.randn(256, 1)), real=real, fake=fake).loss
            student_optimiser.zero_grad()
            loss.backward()
            student_optimiser.step()
            means.append(student.mean.item())
            stds.append(student.std.item())
    assert sum(means[-50:]) / 50 == pytest.approx(0.7, abs=0.1)
    assert sum(stds[-50:]) / 50 == pytest.approx(0.4, abs=0.1)
