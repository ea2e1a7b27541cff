"""A small network trained with MeanFlowLoss finds the mean velocity of Gaussian data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from meanflow_helpers import GAUSSIAN, MLP
from torch import nn

from hd_meanflow import MeanFlowLoss, UniformTimes, interpolate, jump


def trained(loss: MeanFlowLoss, teacher: Any, steps: int, batch: int) -> nn.Module:
    net = MLP(1, 48)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(batch, 1)
        output = loss(net, x, torch.randn_like(x), teacher=teacher)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def relative_error(net: nn.Module) -> float:
    """RMS error of u over intervals and states where the data lives, relative to the RMS of u."""
    t, r = UniformTimes(interval_share=1.0).sample(4096, torch.Generator().manual_seed(9))
    x0 = GAUSSIAN.mean + GAUSSIAN.std * torch.randn(4096, 1)
    x = interpolate(x0, torch.randn(4096, 1), t)
    exact = GAUSSIAN.field(x, t, r)
    return ((net(x, t, r) - exact).square().mean() / exact.square().mean()).sqrt().item()


CASES = {
    # name: (teacher?, settings, batch, tolerance)
    "teacher, jvp": (True, {}, 256, 0.04),
    "teacher, difference": (True, {"derivative": "difference", "step": 0.01}, 256, 0.04),
    # The regression target is noisy here, so the plain squared error is the one whose minimum is its mean.
    "from scratch": (False, {"p": 0.0}, 512, 0.06),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_recovers_the_mean_velocity(case: str) -> None:
    use_teacher, settings, batch, tolerance = CASES[case]
    loss = MeanFlowLoss(times=UniformTimes(interval_share=0.75), **settings)
    net = trained(loss, GAUSSIAN.teacher if use_teacher else None, 2000, batch)
    assert relative_error(net) < tolerance
    eps = torch.randn(20_000, 1)
    one, zero = torch.ones(20_000), torch.zeros(20_000)
    with torch.no_grad():
        x = jump(eps, net(eps, one, zero), one, zero)
    assert x.mean().item() == pytest.approx(GAUSSIAN.mean, abs=0.05)
    assert x.std().item() == pytest.approx(GAUSSIAN.std, abs=0.05)


@pytest.mark.slow
def test_flow_matching_alone_does_not_give_the_mean_velocity() -> None:
    """The tolerance means something: without intervals the same network misses u by far more."""
    loss = MeanFlowLoss(times=UniformTimes(interval_share=0.0))
    assert relative_error(trained(loss, GAUSSIAN.teacher, 300, 256)) > 0.15
