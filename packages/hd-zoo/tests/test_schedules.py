"""Diffusions with any schedule and any prediction, against a Gaussian's conditional means and DDIM written anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_helpers import GAUSSIAN, column, randomised

from hd_zoo import DiffusedNoise, create_model, from_pretrained, sample_ode, save_pretrained, to_student
from hd_zoo.wrappers.convert import alphas_cumprod

NAMED: dict[str, dict[str, Any]] = {
    "linear": {"steps": 100, "beta_end": 0.1},
    "scaled_linear": {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"schedule": "squaredcos_cap_v2", "steps": 200},
    "scaled_linear, zero": {"schedule": "scaled_linear", "steps": 500, "zero_terminal_snr": True},
    "cosine, zero": {"schedule": "squaredcos_cap_v2", "zero_terminal_snr": True},
    "any": {"alphas_cumprod": [0.99, 0.9, 0.5, 0.3, 0.05]},
}


def betas_anew(schedule: str, steps: int, start: float, end: float) -> list[float]:
    """The three definitions in plain floats."""
    if schedule == "linear":
        return [start + (end - start) * i / (steps - 1) for i in range(steps)]
    if schedule == "scaled_linear":
        low, high = math.sqrt(start), math.sqrt(end)
        return [(low + (high - low) * i / (steps - 1)) ** 2 for i in range(steps)]

    def left(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(0.999, 1 - left((i + 1) / steps) / left(i / steps)) for i in range(steps)]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_by_name(schedule: str, zero: bool) -> None:
    signals, product = [], 1.0
    for beta in betas_anew(schedule, 50, 1e-3, 0.1):
        product *= 1 - beta
        signals.append(product)
    if zero:  # arXiv 2305.08891, algorithm 1: sqrt(abar) - the last, times first / (first - the last)
        roots = [math.sqrt(signal) for signal in signals]
        signals = [((root - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for root in roots]
        assert signals[-1] == 0
    found = alphas_cumprod(schedule, 50, 1e-3, 0.1, zero_terminal_snr=zero)
    assert found == pytest.approx(signals, rel=1e-9, abs=1e-15)


class ExactAnswer:
    """What a perfect network of the Gaussian's diffusion says, at steps and linearly in log(t / (1 - t)) between."""

    def __init__(self, field: DiffusedNoise, prediction: str) -> None:
        self.field, self.prediction = field, prediction

    def __call__(self, z: Tensor, share: Tensor, **cond: Any) -> Tensor:
        a, s = (column(part, z) for part in self.amounts(share))
        gain = a * GAUSSIAN.std**2 / (a**2 * GAUSSIAN.std**2 + s**2)
        data = GAUSSIAN.mean + gain * (z - a * GAUSSIAN.mean)
        noise = s / (a**2 * GAUSSIAN.std**2 + s**2) * (z - a * GAUSSIAN.mean)
        return {"sample": data, "epsilon": noise, "v": a * noise - s * data}[self.prediction]

    def amounts(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) at steps alone."""
        whole = (share * self.field.steps).round().long()
        signal = torch.tensor(self.signals, dtype=torch.float64)[whole]
        return signal.sqrt(), (1 - signal).sqrt()

    signals: list[float]


def exact(settings: dict[str, Any], prediction: str) -> tuple[DiffusedNoise, Tensor, list[float]]:
    """(field of a perfect network, the t of its steps, abar)."""
    field: Any = DiffusedNoise(nn.Identity(), prediction=prediction, **settings)
    given = {name: value for name, value in settings.items() if name != "alphas_cumprod"}
    signals = settings.get("alphas_cumprod") or alphas_cumprod(**given)
    inner = ExactAnswer(field, prediction)
    inner.signals = signals
    field.network = None
    field._modules.pop("network", None)
    object.__setattr__(field, "network", inner)
    times = [math.sqrt(1 - a) / (math.sqrt(a) + math.sqrt(1 - a)) for a in signals]
    return field, torch.tensor(times, dtype=torch.float64), signals


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("name", NAMED)
def test_the_velocity_is_the_gaussians_at_every_step(name: str, prediction: str) -> None:
    field, times, _ = exact(NAMED[name], prediction)
    times = times[times <= field.t_end]
    x = torch.randn(len(times), 3, dtype=torch.float64)
    torch.testing.assert_close(field(x, times), GAUSSIAN.teacher(x, times), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("name", NAMED)
def test_an_euler_step_is_a_ddim_step(name: str, prediction: str) -> None:
    """z' = a' x_hat + s' eps_hat (arXiv 2010.02502, equation 12 without noise), and x_t = z / (a + s)."""
    field, times, signals = exact(NAMED[name], prediction)
    last = int((times <= field.t_end).sum()) - 1
    for i, j in ((last, last // 2), (last // 2, 0), (last - 1, last - 2)):
        a, s = math.sqrt(signals[i]), math.sqrt(1 - signals[i])
        a_next, s_next = math.sqrt(signals[j]), math.sqrt(1 - signals[j])
        z = torch.randn(4, 3, dtype=torch.float64)
        share = torch.full((4,), i / field.steps, dtype=torch.float64)
        answer = field.network(z, share)
        if prediction == "epsilon":
            noise, data = answer, (z - s * answer) / a
        elif prediction == "sample":
            noise, data = (z - a * answer) / s, answer
        else:
            noise, data = s * z + a * answer, a * z - s * answer
        t = times[i].expand(4)
        stepped = z / (a + s) + (times[j] - times[i]) * field(z / (a + s), t)
        torch.testing.assert_close(stepped * (a_next + s_next), a_next * data + s_next * noise, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", NAMED)
def test_the_index_is_the_step_and_rises_between(name: str) -> None:
    field, times, signals = exact(NAMED[name], "v")
    whole = torch.arange(len(signals), dtype=torch.float64)
    torch.testing.assert_close(field.index(times), whole, atol=1e-5, rtol=0)
    inside = torch.linspace(times[0].item(), times[-1].item(), 997, dtype=torch.float64)
    assert (field.index(inside).diff() > 0).all()
    assert field.index(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [0, len(signals) - 1]
    t = (times[:-1] + times[1:]) / 2
    _, slope = torch.func.jvp(field.index, (t,), (torch.ones_like(t),))
    h = 1e-9
    torch.testing.assert_close(slope, (field.index(t + h) - field.index(t - h)) / (2 * h), atol=1e-1, rtol=1e-3)


def test_where_the_field_ends() -> None:
    """Noise: t_max at the latest; the others: where the schedule does, 1 without terminal signal."""
    cosine = {"schedule": "squaredcos_cap_v2"}
    assert DiffusedNoise(nn.Identity(), **cosine).t_end == 0.995
    assert DiffusedNoise(nn.Identity(), **cosine, t_max=0.9).t_end == 0.9
    assert DiffusedNoise(nn.Identity(), **cosine, prediction="v").t_end == pytest.approx(0.99995, abs=2e-5)
    assert DiffusedNoise(nn.Identity(), **cosine, prediction="v", zero_terminal_snr=True).t_end == 1
    assert DiffusedNoise(nn.Identity()).t_end == pytest.approx(0.9937, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("name", NAMED)
def test_the_ends_of_time_are_finite(name: str, prediction: str, dtype: torch.dtype) -> None:
    network = randomised(create_model("mlp_2d", width=8, r_embedding="added").to(dtype))
    field = DiffusedNoise(network, prediction=prediction, **NAMED[name])
    x, t = torch.randn(2, 2, dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)
    for r in (None, t, torch.zeros_like(t)):
        assert field(x, t, r).isfinite().all()
        assert field(x, t, r).dtype == dtype
        assert field(x, t, r).abs().max() < 1e3


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_sampling_a_cosine_diffusion_gives_the_data(prediction: str) -> None:
    """From noise at t = 1 to the Gaussian's mean and spread: also where the schedule ends far above any use."""
    field, _, _ = exact({"schedule": "squaredcos_cap_v2"}, prediction)
    noise = torch.randn(4000, 1, dtype=torch.float64)
    found = sample_ode(field, noise, steps=50, method="heun")
    assert found.mean().item() == pytest.approx(GAUSSIAN.mean, abs=0.03)
    assert found.std().item() == pytest.approx(GAUSSIAN.std, rel=0.05)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("name", NAMED)
def test_a_folder_keeps_schedule_and_prediction(name: str, prediction: str, tmp_path: Path) -> None:
    network = randomised(create_model("mlp_2d", width=8).double())
    field = DiffusedNoise(network, prediction=prediction, **NAMED[name]).eval()
    again: Any = from_pretrained(save_pretrained(field, tmp_path))
    x, t = torch.randn(5, 2, dtype=torch.float64), torch.linspace(0.01, 0.99, 5, dtype=torch.float64)
    assert torch.equal(again(x, t), field(x, t))
    assert again.prediction == prediction
    student = to_student(field)
    torch.testing.assert_close(student(x, t, t / 2), field(x, t))


def test_the_arguments_of_before_are_written_as_before() -> None:
    field = DiffusedNoise(nn.Identity(), 100, 1e-3, 0.1)
    assert field.arguments == {"steps": 100, "beta_start": 1e-3, "beta_end": 0.1}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"schedule": "cosine"}, "schedule must be one of linear, scaled_linear, squaredcos_cap_v2; got 'cosine'"),
        ({"prediction": "noise"}, "prediction must be one of epsilon, v, sample; got 'noise'"),
        ({"t_max": 1.5}, r"t_max must lie in \(0, 1\]; got 1\.5"),
        ({"alphas_cumprod": [0.5]}, r"alphas_cumprod must be at least two numbers that fall.*got shape \(1,\)"),
        ({"alphas_cumprod": [0.5, 0.6]}, r"got 0\.5 \.\. 0\.6"),
        ({"alphas_cumprod": [1.0, 0.5]}, r"got 1 \.\. 0\.5"),
        ({"alphas_cumprod": [0.5, -0.1]}, r"got 0\.5 \.\. -0\.1"),
        ({"alphas_cumprod": [0.5, math.nan]}, r"got 0\.5 \.\. nan"),
        ({"alphas_cumprod": "cosine"}, "got a str"),
    ],
)
def test_impossible_settings(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusedNoise(nn.Identity(), **keywords)
