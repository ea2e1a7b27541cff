"""Rate, optimiser and moving average against their formulas and against PyTorch's own AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hd_trainer.optim import Optimizer, OptimizerSettings, moving_average, update_average


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def data(step: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))


def test_the_rate_warms_up_linearly_and_then_stays() -> None:
    schedule = OptimizerSettings(lr=0.6, warmup=5, schedule="constant")
    rates = [schedule.rate(step, 100) for step in range(8)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    assert OptimizerSettings(lr=0.6, warmup=0, schedule="constant").rate(0, 100) == 0.6


def test_the_cosine_goes_from_the_peak_to_zero() -> None:
    schedule = OptimizerSettings(lr=2.0, warmup=0, schedule="cosine")
    rates = [schedule.rate(step, 40) for step in range(41)]
    assert rates[0] == 2.0
    assert rates[20] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1 + math.sqrt(0.5))
    assert rates[40] == pytest.approx(0, abs=1e-12)
    assert rates == sorted(rates, reverse=True)


@settings(deadline=None)
@given(step=st.integers(0, 500), extra=st.integers(0, 500), warmup=st.integers(0, 100))
def test_the_rate_stays_between_zero_and_the_peak(step: int, extra: int, warmup: int) -> None:
    for schedule in ("constant", "cosine"):
        rate = OptimizerSettings(lr=1e-3, warmup=warmup, schedule=schedule).rate(step, step + extra + 1)
        assert 0 < rate <= 1e-3


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_an_update_is_adamw_with_clipping_step_by_step(clip: float) -> None:
    chosen = OptimizerSettings(lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, warmup=3, clip=clip)
    ours, theirs = small(), small()
    optimizer = Optimizer(ours.parameters(), chosen)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1.0, betas=(0.8, 0.95), weight_decay=0.1)
    for step in range(12):
        norm = optimizer.update(ours(data(step)).square().mean(), step, 12)
        reference.zero_grad()
        theirs(data(step)).square().mean().backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.param_groups[0]["lr"] = chosen.rate(step, 12)
        reference.step()
        # The norm it reports is the one before clipping.
        torch.testing.assert_close(norm, expected)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not torch.equal(ours[0].weight, small()[0].weight)


def test_an_update_reaches_its_own_parameters_only() -> None:
    mine, other = small(0), small(1)
    before = [p.clone() for p in other.parameters()]
    optimizer = Optimizer(mine.parameters(), OptimizerSettings(lr=0.1, warmup=0))
    optimizer.update((mine(data(0)) * other(data(0))).sum(), 0, 10)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
    assert all(p.grad is None for module in (mine, other) for p in module.parameters())
    assert not torch.equal(mine[0].weight, small(0)[0].weight)


def test_an_unused_parameter_stays_as_it_is() -> None:
    model = small()
    optimizer = Optimizer(model.parameters(), OptimizerSettings(lr=0.1, warmup=0, weight_decay=0.5))
    optimizer.update(model[0](data(0)).square().mean(), 0, 10)
    assert torch.equal(model[2].weight, small()[2].weight)


def test_the_state_goes_through_flat_tensors_and_back() -> None:
    model = small()
    optimizer = Optimizer(model.parameters(), OptimizerSettings(lr=0.05, warmup=0))
    for step in range(3):
        optimizer.update(model(data(step)).square().mean(), step, 10)
    copy = small()
    copy.load_state_dict(model.state_dict())
    restored = Optimizer(copy.parameters(), optimizer.settings)
    # Whatever was there before is replaced.
    restored.update(copy(data(9)).sum(), 0, 10)
    copy.load_state_dict(model.state_dict())
    tensors = {name: value.clone() for name, value in optimizer.tensors().items()}
    assert len(tensors) == 3 * len(list(model.parameters()))
    restored.load_tensors(tensors)
    for step in range(3, 6):
        for one, opt in ((model, optimizer), (copy, restored)):
            opt.update(one(data(step)).square().mean(), step, 10)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copy.parameters(), strict=True))


def test_a_fresh_optimiser_has_no_tensors() -> None:
    assert Optimizer(small().parameters(), OptimizerSettings(lr=1.0)).tensors() == {}


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (1, 2 / 11), (90, 0.9), (10_000, 0.9)])
def test_the_moving_average_is_its_formula(step: int, decay: float) -> None:
    model, average = small(0), moving_average(small(1))
    before = [p.clone() for p in average.parameters()]
    update_average(average, model, 0.9, step)
    for now, old, new in zip(average.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(now, decay * old + (1 - decay) * new)


def test_the_moving_average_is_a_frozen_copy() -> None:
    model = small().train()
    average = moving_average(model)
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model[0].weight.zero_()
    assert average[0].weight.abs().sum() > 0
