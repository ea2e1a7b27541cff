"""The five packages together, the way a user would join them: closed forms, both stages, and the traps between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hd_awd import Discriminator, FeatureTap, discriminator_loss, generator_loss
from hd_dmd import DistributionMatchingLoss, UniformLevels, fake_score_loss, noised
from hd_meanflow import LogitNormalTimes, MeanFlowLoss, total_derivative
from hd_zoo import create_model, sample_jumps, sample_ode, to_student

ANGLE, RADII = 0.6, (0.9, 0.15)
MEAN = (1.0, -0.5)


class GaussianTeacher:
    """The exact velocity field of a tilted 2-D Gaussian: a callable, not a module, that ignores r.

    On each principal axis, with s the standard deviation and y = x - (1 - t) m:
    v = (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2) y - m.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        c, s = math.cos(ANGLE), math.sin(ANGLE)
        self.axes = torch.tensor([[c, -s], [s, c]], dtype=dtype)
        self.mean, self.std = torch.tensor(MEAN, dtype=dtype), torch.tensor(RADII, dtype=dtype)

    @property
    def covariance(self) -> Tensor:
        return self.axes @ torch.diag(self.std**2) @ self.axes.T

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        return self.mean + (torch.randn(count, 2, generator=generator) * self.std) @ self.axes.T

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        t = t[:, None]
        slope = (t - (1 - t) * self.std**2) / ((1 - t) ** 2 * self.std**2 + t**2)
        return ((x - (1 - t) * self.mean) @ self.axes * slope) @ self.axes.T - self.mean


def moment_error(samples: Tensor, teacher: GaussianTeacher) -> float:
    """Squared 2-Wasserstein distance between Gaussians with the samples' moments and the teacher's."""
    covariance = samples.T.cov()
    values, vectors = torch.linalg.eigh(teacher.covariance)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    gap = (samples.mean(0) - teacher.mean).square().sum()
    return float(gap + covariance.trace() + teacher.covariance.trace() - 2 * cross)


def draw(student: nn.Module) -> Tensor:
    noise = torch.randn(4_000, 2, generator=torch.Generator().manual_seed(99))
    return sample_jumps(student, noise)


def train_stage_1(student: nn.Module, teacher: GaussianTeacher, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    loss = MeanFlowLoss(times=LogitNormalTimes(interval_share=0.75, endpoint_share=0.3))
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, noise = teacher.data(256, generator), torch.randn(256, 2, generator=generator)
        output = loss(student, x, noise, teacher=teacher, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()


def train_stage_2(student: nn.Module, teacher: GaussianTeacher, fake: nn.Module, eyes: nn.Module, steps: int) -> None:
    """Distribution matching against the callable teacher; the discriminator looks through a frozen network."""
    generator = torch.Generator().manual_seed(1)
    levels, matching = UniformLevels(), DistributionMatchingLoss()
    tap = FeatureTap(eyes.requires_grad_(False), ["blocks.1"])
    torch.manual_seed(2)
    discriminator = Discriminator([64], num_queries=2, head_width=16, hidden=32)
    turns = {
        "student": torch.optim.Adam(student.parameters(), lr=1e-3, betas=(0.5, 0.99)),
        "fake": torch.optim.Adam(fake.parameters(), lr=2e-3),
        "discriminator": torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99)),
    }
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(turns["student"], steps)
    student.requires_grad_(True)
    for step in range(steps):
        noise = torch.randn(256, 2, generator=generator)
        sample = noise - student(noise, torch.ones(256), torch.zeros(256))
        if step % 3 == 0:
            x_t, t, _ = noised(sample, levels, generator)
            loss = matching(sample, real=teacher, fake=fake, generator=generator).loss
            loss = loss + 3e-3 * generator_loss(discriminator(tap(x_t, t)))
            update(turns["student"], loss)
        rate.step()
        update(turns["fake"], fake_score_loss(fake, sample, noise_levels=levels, generator=generator).loss)
        seen = [noised(x, levels, generator)[:2] for x in (teacher.data(256, generator), sample.detach())]
        update(turns["discriminator"], discriminator_loss(*(discriminator(tap(x_t, t)) for x_t, t in seen)))


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A step along the loss's gradient in the optimiser's own parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@pytest.fixture(scope="module")
def teacher() -> GaussianTeacher:
    return GaussianTeacher()


@pytest.mark.slow
def test_both_stages_turn_any_callable_into_a_one_step_generator(teacher: GaussianTeacher) -> None:
    torch.manual_seed(0)
    student = create_model("mlp_2d", width=64, r_embedding="added")
    network = create_model("mlp_2d", width=64)
    untrained = moment_error(draw(student), teacher)
    # The same callable, one Euler step: the straight line that one-step sampling has to beat.
    straight = moment_error(sample_ode(teacher, torch.randn(4_000, 2), 1), teacher)
    train_stage_1(student, teacher, 350)
    first = moment_error(draw(student), teacher)
    # The fake score starts as a fit of the same data: here by flow matching, which r = t everywhere is.
    plain = MeanFlowLoss(times=LogitNormalTimes(interval_share=0.0), p=0.0)
    generator, optimizer = torch.Generator().manual_seed(3), torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(300):
        x, noise = teacher.data(256, generator), torch.randn(256, 2, generator=generator)
        optimizer.zero_grad()
        plain(network, x, noise, generator=generator).loss.backward()
        optimizer.step()
    fake, eyes = to_copy(network), to_copy(network)
    train_stage_2(student, teacher, fake, eyes, 750)
    second = moment_error(draw(student), teacher)
    print(
        f"moment error: untrained {untrained:.4f}, straight {straight:.4f}, stage 1 {first:.4f}, stage 2 {second:.4f}"
    )
    assert first < 0.1 * min(untrained, straight)
    assert second < 0.6 * first
    assert second < 0.01


def to_copy(network: nn.Module) -> nn.Module:
    copy = create_model("mlp_2d", width=64)
    copy.load_state_dict(network.state_dict())
    return copy


def random_transformer(**changes: Any) -> nn.Module:
    """A small transformer in float64 in which nothing is zero."""
    torch.manual_seed(0)
    settings = {"width": 16, "depth": 2, "classes": 3, "r_embedding": "added", **changes}
    model = create_model("dit_nano_2", **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def point() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    real = {"generator": generator, "dtype": torch.float64}
    t = torch.tensor([0.3, 0.55, 0.8, 0.95, 1.0], dtype=torch.float64)
    return {
        "x": torch.randn(5, 1, 8, 8, **real),
        "velocity": torch.randn(5, 1, 8, 8, **real),
        "t": t,
        "r": t * torch.tensor([0.0, 0.5, 0.9, 0.2, 0.0], dtype=torch.float64),
        "labels": torch.tensor([0, 1, 2, 3, 0]),
    }


@pytest.mark.parametrize(("method", "tolerance"), [("jvp", 1e-7), ("difference", 2e-3)])
def test_the_derivative_through_the_transformer_is_the_finite_difference(
    method: str, tolerance: float, point: dict[str, Tensor]
) -> None:
    model = random_transformer()
    x, velocity, t, r, labels = (point[name] for name in ("x", "velocity", "t", "r", "labels"))

    def at(offset: float) -> Tensor:
        # Beyond t = 1 as well: the network does not mind, and this oracle is of fourth order.
        return model(x + offset * velocity, t + offset, r, labels=labels).detach()

    h = 1e-3
    expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    found = total_derivative(model, x, t, r, velocity, method=method, step=1e-3, labels=labels)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not found.requires_grad
    assert all(p.grad is None for p in model.parameters())
    # The interval matters: with r moving along, the derivative is another.
    with_r = (model(x + h * velocity, t + h, r + h, labels=labels) - model(x, t, r, labels=labels)) / h
    assert (with_r - expected).abs().mean() > 0.01


@pytest.mark.parametrize("network", ["transformer", "mlp"])
def test_the_student_is_the_teacher_at_step_0_of_the_loss(network: str) -> None:
    torch.manual_seed(0)
    if network == "transformer":
        teacher, shape = random_transformer(r_embedding=None), (1, 8, 8)
    else:
        teacher, shape = create_model("mlp_2d", classes=3).double(), (2,)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    student = to_student(teacher.requires_grad_(False))
    x, noise = torch.randn(2, 16, *shape, dtype=torch.float64).unbind()
    labels = torch.arange(16) % 4

    def errors(share: float, with_teacher: bool = True) -> Tensor:
        loss = MeanFlowLoss(times=LogitNormalTimes(interval_share=share))
        generator = torch.Generator().manual_seed(5)
        field = teacher if with_teacher else None
        return loss(student, x, noise, teacher=field, generator=generator, labels=labels).squared_error

    # r = t: nothing to learn. r < t: u - (v - (t - r) du/dt) = (t - r) du/dt, by the oracle of differences.
    assert errors(0.0).max() < 1e-20
    assert errors(0.0, with_teacher=False).min() > 0
    t, r = LogitNormalTimes(interval_share=1.0).sample(16, torch.Generator().manual_seed(5))
    column = t.double().reshape(-1, *(1,) * len(shape))
    x_t = (1 - column) * x + column * noise
    velocity, h = teacher(x_t, t.double(), labels=labels), 1e-4

    def at(offset: float) -> Tensor:
        return teacher(x_t + offset * velocity, t.double() + offset, labels=labels)

    slope = (at(h) - at(-h)) / (2 * h)
    expected = ((t - r).double() * slope.flatten(1).norm(dim=1)).square()
    torch.testing.assert_close(errors(1.0), expected, rtol=1e-5, atol=1e-9)


def test_the_teacher_may_be_any_callable(teacher: GaussianTeacher) -> None:
    calls: list[tuple[torch.Size, bool]] = []

    def field(x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        assert r is None
        assert cond["hint"] == "kept"
        calls.append((x.shape, torch.is_grad_enabled()))
        return teacher(x, t)

    def student(x: Tensor, t: Tensor, r: Tensor | None = None, *, hint: str) -> Tensor:
        return weight * x + t[:, None]

    weight = torch.ones((), requires_grad=True)
    x, noise = torch.randn(2, 8, 2).unbind()
    MeanFlowLoss()(student, x, noise, teacher=field, hint="kept").loss.backward()
    assert calls == [(torch.Size([8, 2]), False)]
    assert weight.grad is not None
    sample = x.clone().requires_grad_()
    match = DistributionMatchingLoss()(sample, real=field, fake=lambda x, t, **_: teacher(x, t), hint="kept")
    # Fake and real are one: nothing to move.
    assert torch.autograd.grad(match.loss, sample)[0].abs().max() == 0


def test_the_exact_mean_velocity_is_a_fixed_point_of_stage_1() -> None:
    """u in closed form through the loss: its target is itself, whatever t and r."""
    teacher = GaussianTeacher(torch.float64)

    def sigma(t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * teacher.std**2 + t**2).sqrt()

    def exact(x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        velocity = teacher(x, t)
        t, r = t[:, None], (t if r is None else r)[:, None]
        y = (x - (1 - t) * teacher.mean) @ teacher.axes
        x_r = (1 - r) * teacher.mean + (sigma(r) / sigma(t) * y) @ teacher.axes.T
        gap = torch.where(t > r, t - r, torch.ones_like(t))
        return torch.where(t > r, (x - x_r) / gap, velocity)

    x, noise = torch.randn(2, 64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    loss = MeanFlowLoss(times=LogitNormalTimes(interval_share=0.75, endpoint_share=0.2))
    output = loss(exact, x, noise, teacher=teacher, generator=torch.Generator().manual_seed(0))
    assert output.squared_error.max() < 1e-20
    assert output.derivative_rms > 0.1


class Reversed:
    """Times that a careless sampler could draw."""

    def sample(self, batch: int, generator: Any = None, device: Any = None) -> tuple[Tensor, Tensor]:
        return torch.full((batch,), 0.2), torch.full((batch,), 0.6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model, x, labels: MeanFlowLoss(times=Reversed())(model, x, x, labels=labels),
        lambda model, x, labels: total_derivative(model, x, torch.full((4,), 0.2), torch.ones(4), x, labels=labels),
        lambda model, x, labels: model(x[:, :, :4], torch.ones(4), labels=labels),
        lambda model, x, labels: model(x, torch.ones(3), labels=labels),
        lambda model, x, labels: model(x, torch.ones(4), labels=labels[:2]),
        lambda model, x, labels: MeanFlowLoss()(model, x, x[:2], labels=labels),
        lambda model, x, labels: Discriminator([8])([torch.zeros(4, 16, 16)]),
        lambda model, x, labels: FeatureTap(model, ["blocks.5"]),
        lambda model, x, labels: sample_jumps(model, x, (0.0, 1.0), labels=labels),
    ],
)
def test_wrong_shapes_and_times_are_one_line(wrong: Callable[..., Any]) -> None:
    model, labels = create_model("dit_nano_2", width=16, depth=1, classes=3, r_embedding="added"), torch.zeros(4).long()
    with pytest.raises(ValueError, match=r"must|no module") as caught:
        wrong(model, torch.randn(4, 1, 8, 8), labels)
    assert "\n" not in str(caught.value)
