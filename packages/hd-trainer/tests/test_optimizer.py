"""Rate, optimiser, turns and moving average against their formulas and against PyTorch's own AdamW."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from trainer_helpers import same, snapshot

from hd_trainer.engine.average import average_of, update_average
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings, Schedule, turn_of


def small(seed: int = 0) -> nn.Sequential:
    """A network of two layers; weights are a function of the seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def inputs(step: int) -> Tensor:
    """Inputs (8, 3) of a step."""
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
    for schedule in get_args(Schedule):
        rate = OptimizerSettings(lr=1e-3, warmup=warmup, schedule=schedule).rate(step, step + extra + 1)
        assert 0 < rate <= 1e-3


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_an_update_is_adamw_with_clipping_step_by_step(clip: float) -> None:
    chosen = OptimizerSettings(lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, warmup=3, clip=clip)
    ours, theirs = small(), small()
    optimizer = Optimizer(ours, chosen, steps=12)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1.0, betas=(0.8, 0.95), weight_decay=0.1)
    for step in range(12):
        norm = optimizer.update(ours(inputs(step)).square().mean(), step)
        reference.zero_grad()
        theirs(inputs(step)).square().mean().backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.param_groups[0]["lr"] = chosen.rate(step, 12)
        reference.step()
        # The norm it reports is the one before clipping.
        torch.testing.assert_close(norm, expected)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not torch.equal(ours[0].weight, small()[0].weight)


def test_an_update_within_its_turn_reaches_its_own_parameters_only() -> None:
    mine, other = small(0), small(1)
    before = snapshot(other)
    optimizer = Optimizer(mine, OptimizerSettings(lr=0.1, warmup=0), steps=10)
    with turn_of(mine, [other]):
        optimizer.update((mine(inputs(0)) * other(inputs(0))).sum(), 0)
    assert same(snapshot(other), before)
    assert all(parameter.grad is None for module in (mine, other) for parameter in module.parameters())
    assert not torch.equal(mine[0].weight, small(0)[0].weight)


def test_a_turn_leaves_every_switch_as_it_was_even_after_an_error() -> None:
    mine, other = small(0), small(1)
    mine[0].bias.requires_grad_(False)
    other[2].weight.requires_grad_(False)
    before = [parameter.requires_grad for module in (mine, other) for parameter in module.parameters()]

    def fail() -> None:
        with turn_of(mine, [other]):
            assert all(parameter.requires_grad for parameter in mine.parameters())
            assert not any(parameter.requires_grad for parameter in other.parameters())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [parameter.requires_grad for module in (mine, other) for parameter in module.parameters()] == before


def test_a_turn_lets_gradients_through_the_others_to_their_inputs() -> None:
    mine, judge = nn.Linear(3, 3), small(1)
    with turn_of(mine, [judge]):
        judge(mine(inputs(0))).sum().backward()
    assert mine.weight.grad is not None
    assert mine.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in judge.parameters())


def test_an_unused_parameter_stays_as_it_is() -> None:
    model = small()
    optimizer = Optimizer(model, OptimizerSettings(lr=0.1, warmup=0, weight_decay=0.5), steps=10)
    optimizer.update(model[0](inputs(0)).square().mean(), 0)
    assert torch.equal(model[2].weight, small()[2].weight)


def test_the_state_goes_through_flat_tensors_and_back() -> None:
    model = small()
    optimizer = Optimizer(model, OptimizerSettings(lr=0.05, warmup=0), steps=10)
    for step in range(3):
        optimizer.update(model(inputs(step)).square().mean(), step)
    copy = small()
    restored = Optimizer(copy, optimizer.settings, steps=10)
    # Whatever was there before is replaced.
    restored.update(copy(inputs(9)).sum(), 0)
    copy.load_state_dict(model.state_dict())
    tensors = {name: value.clone() for name, value in optimizer.tensors().items()}
    assert len(tensors) == 3 * len(list(model.parameters()))
    restored.load_tensors(tensors)
    for step in range(3, 6):
        for one, its in ((model, optimizer), (copy, restored)):
            its.update(one(inputs(step)).square().mean(), step)
        assert same(snapshot(model), snapshot(copy))


def test_what_is_expected_of_a_state_is_the_form_it_has() -> None:
    model = small()
    optimizer = Optimizer(model, OptimizerSettings(lr=0.05, warmup=0), steps=10)
    assert optimizer.expected(optimizer.tensors()) == {}
    optimizer.update(model[0](inputs(0)).square().mean(), 0)  # the second layer takes no part
    tensors = optimizer.tensors()
    assert len(tensors) == 3 * 2
    assert optimizer.expected(tensors) == {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def test_a_fresh_optimiser_has_no_tensors() -> None:
    assert Optimizer(small(), OptimizerSettings(lr=1.0), steps=1).tensors() == {}


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (1, 2 / 11), (90, 0.9), (10_000, 0.9)])
def test_the_moving_average_is_its_formula(step: int, decay: float) -> None:
    model, average = small(0), average_of(small(1))
    before = [parameter.clone() for parameter in average.parameters()]
    update_average(average, model, 0.9, step)
    for now, old, new in zip(average.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(now, decay * old + (1 - decay) * new)


def test_the_moving_average_is_a_frozen_copy() -> None:
    model = small().train()
    average = average_of(model)
    assert isinstance(average, nn.Sequential)
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model[0].weight.zero_()
    assert average[0].weight.abs().sum() > 0
