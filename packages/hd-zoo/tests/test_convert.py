"""The converters against the Gaussian's conditional means and against its own time-reversed flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hd_zoo import DataPrediction, NoisePrediction, ReversedTime, create_model


@pytest.fixture
def points() -> tuple[Tensor, Tensor, Tensor]:
    """x (32, 2, 3), t and r (32,) in the interior, float64."""
    t = 0.1 + 0.85 * torch.rand(32, dtype=torch.float64)
    return torch.randn(32, 2, 3, dtype=torch.float64), t, t * torch.rand(32, dtype=torch.float64)


def test_data_prediction_recovers_the_velocity(gaussian: Any, points: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, r = points
    field = DataPrediction(gaussian.data_prediction)
    torch.testing.assert_close(field(x, t), gaussian.teacher(x, t), atol=1e-12, rtol=1e-12)
    assert torch.equal(field(x, t, r), field(x, t))


def test_noise_prediction_recovers_the_velocity(gaussian: Any, points: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, r = points
    field = NoisePrediction(gaussian.noise_prediction)
    torch.testing.assert_close(field(x, t), gaussian.teacher(x, t), atol=1e-12, rtol=1e-12)
    assert torch.equal(field(x, t, r), field(x, t))


def test_the_quotients_are_bounded_at_their_bad_end(gaussian: Any) -> None:
    x, ends = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0.0, 0.005]).double()
    data = DataPrediction(lambda x, t: 0 * x, t_min=0.01)(x, ends)
    noise = NoisePrediction(lambda x, t: 0 * x, gap=0.01)(x, 1 - ends)
    torch.testing.assert_close(data, torch.full_like(x, 100.0))
    torch.testing.assert_close(noise, torch.full_like(x, -100.0))


def test_reversed_time_of_a_velocity(gaussian: Any, points: tuple[Tensor, Tensor, Tensor]) -> None:
    """The other convention's own closed form: y_s = s x + (1 - s) eps, noise at s = 0, w = dy/ds."""
    y, s, _ = points
    var = (s**2 * gaussian.std**2 + (1 - s) ** 2)[:, None, None]
    at = s[:, None, None]
    gain = (at * gaussian.std**2 - (1 - at)) / var
    w = gaussian.mean + gain * (y - at * gaussian.mean)  # E[x - eps | y_s]

    def other(x: Tensor, time: Tensor) -> Tensor:
        torch.testing.assert_close(time, s)
        return w

    torch.testing.assert_close(ReversedTime(other)(y, 1 - s), gaussian.teacher(y, 1 - s), atol=1e-12, rtol=1e-12)


def test_reversed_time_of_a_mean_velocity(gaussian: Any, points: tuple[Tensor, Tensor, Tensor]) -> None:
    """The other field averages over its [low, high]; the state stands at low, where noise is, and comes first."""
    x, t, r = points

    def other(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        assert torch.all((low >= 0) & (low <= high) & (high <= 1))
        low, high = (s[:, None, None] for s in (low, high))
        end = gaussian.position(y, 1 - low, 1 - high)  # our clock reads 1 - s
        return (end - y) / (high - low)

    torch.testing.assert_close(ReversedTime(other)(x, t, r), gaussian.student(x, t, r), atol=1e-11, rtol=1e-10)


def test_reversing_twice_changes_nothing(randomised: Any, batch: Any) -> None:
    network = randomised(create_model("mlp_2d", classes=3, interval="added").double())
    twice = ReversedTime(ReversedTime(network))
    x, t, r, labels = batch(network, dtype=torch.float64)
    for second in (None, r):
        torch.testing.assert_close(twice(x, t, second, labels=labels), network(x, t, second, labels=labels))
    assert {id(p) for p in twice.parameters()} == {id(p) for p in network.parameters()}


@pytest.mark.parametrize("wrapper", [ReversedTime, DataPrediction, NoisePrediction])
def test_conditions_are_passed_on(wrapper: type[nn.Module], recorder: Any) -> None:
    field = recorder(lambda x, t, r=None, **cond: x)
    labels = torch.arange(3)
    wrapper(field)(torch.randn(3, 2), torch.rand(3), labels=labels)
    assert field.calls[0]["cond"] == {"labels": labels}


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan")])
def test_impossible_clamps(value: float) -> None:
    with pytest.raises(ValueError, match=r"t_min must lie in \(0, 1\)"):
        DataPrediction(lambda x, t: x, t_min=value)
    with pytest.raises(ValueError, match=r"gap must lie in \(0, 1\)"):
        NoisePrediction(lambda x, t: x, gap=value)


def test_one_time_per_sample_is_needed() -> None:
    with pytest.raises(ValueError, match=r"times must have shape \(3,\), one per sample; got \(1,\)"):
        DataPrediction(lambda x, t: x)(torch.randn(3, 2), torch.rand(1))
