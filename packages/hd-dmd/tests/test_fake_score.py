"""The fake score's loss: its value, its minimum, and the one network it reaches."""

from __future__ import annotations

import pytest
import torch
from dmd_helpers import MLP, Gaussian, Recorder, seeded
from torch import Tensor

from hd_dmd import LogitNormalLevels, UniformLevels, fake_score_loss, noised


def test_value_is_flow_matching_on_the_sample() -> None:
    fake, x = MLP().double(), torch.randn(8, 2, dtype=torch.float64)
    output = fake_score_loss(fake, x, noise_levels=LogitNormalLevels(), generator=seeded())
    x_t, t, n = noised(x, LogitNormalLevels(), seeded())
    error = (fake(x_t, t) - (n - x)) ** 2
    torch.testing.assert_close(output.loss, error.mean())
    torch.testing.assert_close(output.squared_error, error.mean(dim=1).detach())
    assert torch.equal(output.t, t)
    assert not output.squared_error.requires_grad


def test_a_field_that_knows_the_sample_has_no_loss() -> None:
    """v = (x_t - x) / t on the line from x: the target is exactly n - x, with this sign."""
    x = torch.randn(16, 3, dtype=torch.float64)
    assert fake_score_loss(lambda x_t, t: (x_t - x) / t[:, None], x).loss < 1e-20


def test_gradient_reaches_the_fake_score_and_never_the_student() -> None:
    student, fake = MLP().double(), MLP().double()
    x = student(torch.randn(8, 2, dtype=torch.float64), torch.ones(8))
    fake_score_loss(fake, x).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fake.parameters())
    assert all(p.grad is None for p in student.parameters())


def test_exact_velocity_is_a_stationary_point() -> None:
    """For student samples N(m, s^2) the loss is least at the closed form: any change raises it."""
    data = Gaussian(0.7, 0.4)
    x = data.draw(200_000, 1)

    def loss(offset: float, slope: float) -> float:
        return fake_score_loss(
            lambda x_t, t: data(x_t, t) + offset + slope * x_t, x, generator=seeded(), noise_levels=UniformLevels()
        ).loss.item()

    least = loss(0.0, 0.0)
    for change in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        assert loss(*change) > least + 1e-3


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_affine_fake_score_recovers_the_closed_form(t: float) -> None:
    """At one noise level the minimum over affine fields is E[n - x | x_t]; found by Newton's method."""
    data = Gaussian(0.7, 0.4)
    x = data.draw(400_000, 1)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def loss(weights: Tensor) -> Tensor:
        return fake_score_loss(
            lambda x_t, _: weights[0] + weights[1] * x_t,
            x,
            noise_levels=UniformLevels(low=t - 5e-4, high=t + 5e-4),
            generator=seeded(),
        ).loss

    gradient = torch.autograd.grad(loss(weights), weights)[0]
    hessian = torch.autograd.functional.hessian(loss, weights)
    fitted = -torch.linalg.solve(hessian, gradient)
    grid = torch.linspace(-1, 2, 7, dtype=torch.float64)
    exact = data.velocity(grid, torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(fitted[0] + fitted[1] * grid, exact, atol=0.03, rtol=0)


@pytest.mark.slow
def test_mlp_fake_score_recovers_the_closed_form() -> None:
    """Trained over all levels: within 10 % (RMS) of the velocity of the student's distribution."""
    data, fake = Gaussian(0.7, 0.4), MLP(1, 32)
    optimiser = torch.optim.Adam(fake.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 800)
    for _ in range(800):
        loss = fake_score_loss(fake, data.draw(1024, 1, dtype=torch.float32)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    x_t, t, _ = noised(data.draw(4096, 1, dtype=torch.float32), UniformLevels())
    exact = data(x_t, t)
    assert (fake(x_t, t) - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()


def test_conditions_and_generator_reach_the_field() -> None:
    fake = Recorder(Gaussian(0.7, 0.4))
    x, label = torch.randn(4, 2), torch.arange(4)
    before = torch.get_rng_state()
    for seed in (1, 1, 2):
        fake_score_loss(fake, x, generator=seeded(seed), label=label)
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = fake.calls
    assert torch.equal(first["x"], again["x"])
    assert torch.equal(first["t"], again["t"])
    assert not torch.equal(first["x"], other["x"])
    assert torch.equal(first["cond"]["label"], label)
    assert first["r"] is None
    assert first["grad"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    fake, seen = MLP().to(dtype), []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return fake(x, t)

    output = fake_score_loss(field, torch.randn(4, 2, dtype=dtype))
    output.loss.backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert seen == [dtype]
    assert output.loss.dtype == output.squared_error.dtype == output.t.dtype == wide
    assert all(p.grad.dtype == dtype for p in fake.parameters())


def test_default_levels_are_those_of_the_matching_loss() -> None:
    output = fake_score_loss(lambda x, t: x, torch.randn(16, 1), generator=seeded())
    assert torch.equal(output.t, UniformLevels().sample(16, seeded()))


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"the fake field must return x's shape \(4, 2\); got \(4,\)"):
        fake_score_loss(lambda x, t: x[:, 0], torch.randn(4, 2))
