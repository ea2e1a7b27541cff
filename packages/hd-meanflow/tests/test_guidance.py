"""MeanFlow's guidance from scratch: the mixture, its fixed point, which passes it costs, the dropout of conditions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meanflow_helpers import Gaussian, Recorder, column, seeded
from torch import Tensor, nn

from hd_meanflow import (
    MeanFlowGuidance,
    MeanFlowLoss,
    UniformTimes,
    conditional_velocity,
    guidance_mixture,
    interpolate,
)
from hd_meanflow.guidance import replace_by_null

CLASSES = (Gaussian(-0.8, 0.4), Gaussian(0.9, 0.3))
NULL = 2


def class_velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """v(x, t | c) of two Gaussian classes, in closed form."""
    both = torch.stack([data.velocity(x, column(t, x)) for data in CLASSES])
    return torch.where(column(labels, x) == 0, both[0], both[1])


def null_velocity(x: Tensor, t: Tensor) -> Tensor:
    """v(x, t) of their equal mixture, for x (B, 1): the classes' velocities weighed by their posterior shares."""
    t = column(t, x)
    laws = [torch.distributions.Normal((1 - t) * data.mean, data.sigma(t)) for data in CLASSES]
    shares = torch.softmax(torch.stack([law.log_prob(x) for law in laws]), dim=0)
    return sum(share * data.velocity(x, t) for share, data in zip(shares, CLASSES, strict=True))


def guided(x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
    """v_null + w (v_c - v_null)."""
    return null_velocity(x, t) + scale * (class_velocity(x, t, labels) - null_velocity(x, t))


def draw_labelled(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and noise (batch, 1) in float64, labels (batch,)."""
    labels = torch.randint(0, 2, (batch,))
    means, stds = (torch.tensor([getattr(data, name) for data in CLASSES]).double() for name in ("mean", "std"))
    x = means[labels] + stds[labels] * torch.randn(batch, dtype=torch.float64)
    return x[:, None], torch.randn(batch, 1, dtype=torch.float64), labels


class Labelled(nn.Module):
    """(x, t, t - r, label) -> velocity, for x (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.net = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        return self.net(torch.cat([x, t[:, None], (t - r)[:, None], self.embed(labels)], dim=1))


@settings(deadline=None)
@given(omega=st.floats(0.1, 3), kappa=st.floats(0, 0.95))
def test_the_guided_velocity_is_the_fixed_point(omega: float, kappa: float) -> None:
    """With v_c for eps - x (its mean) and v_cfg for u(c), the mixture gives v_cfg again, w = omega / (1 - kappa)."""
    x, noise, labels = draw_labelled(8)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    x_t = interpolate(x, noise, t)
    want = guided(x_t, t, labels, omega / (1 - kappa))
    got = guidance_mixture(class_velocity(x_t, t, labels), want, null_velocity(x_t, t), omega, kappa)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    assert MeanFlowGuidance(omega=omega, kappa=kappa).scale == pytest.approx(omega / (1 - kappa))


@pytest.mark.parametrize(("omega", "kappa"), [(2.0, 0.0), (1.0, 0.5), (0.2, 0.92)])
def test_the_guided_field_is_a_minimum_of_the_loss(omega: float, kappa: float) -> None:
    """On samples of two Gaussian classes: the loss's slope at the guided field is zero but for noise.

    The field is u_theta = u + a + b x_t, once for the classes (with opposite signs) and once for the null condition,
    and the slopes are those in a and b at zero. With a guidance scale that is off by 0.5 there is a slope.
    """
    scale = omega / (1 - kappa)
    x, noise, labels = draw_labelled(200_000)

    def slopes(claimed_scale: float) -> Tensor:
        change = torch.zeros(4, dtype=torch.float64, requires_grad=True)

        def student(x_t: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
            null = column(labels, x_t) == NULL
            u = torch.where(null, null_velocity(x_t, t), guided(x_t, t, labels.clamp(max=1), claimed_scale))
            sign = column(2.0 * labels - 1, x_t)  # a change alike for both classes would cancel out
            return u + torch.where(null, change[0] + change[1] * x_t, sign * (change[2] + change[3] * x_t))

        loss = MeanFlowLoss(
            times=UniformTimes(interval_share=0.0),
            p=0.0,
            guidance=MeanFlowGuidance(omega=omega, kappa=kappa, dropout=0.3),
        )
        output = loss(student, x, noise, null={"labels": NULL}, labels=labels, generator=seeded())
        output.loss.backward()
        assert change.grad is not None
        return change.grad.abs()

    # Twice the mean of 200,000 residuals of order 1: a standard error of about 0.003.
    assert slopes(scale).max() < 0.01
    assert slopes(scale + 0.5)[2:].max() > 0.03


@pytest.mark.parametrize(("omega", "kappa"), [(1.0, 0.5), (2.0, 0.0)])
@pytest.mark.parametrize("guidance_interval", [(0.0, 1.0), (0.3, 0.7)])
def test_value_and_gradient_equal_the_loss_by_hand(
    omega: float, kappa: float, guidance_interval: tuple[float, float]
) -> None:
    """The target written out with a frozen copy, functorch for the derivative, and the coins drawn again."""
    x, noise, labels = draw_labelled(32)
    student = Labelled().double()
    times = UniformTimes(interval_share=0.5)
    loss = MeanFlowLoss(
        times=times,
        guidance=MeanFlowGuidance(omega=omega, kappa=kappa, dropout=0.3, guidance_interval=guidance_interval),
    )
    output = loss(student, x, noise, null={"labels": NULL}, labels=labels, generator=seeded())
    output.loss.backward()

    generator = seeded()
    t, r = (time.double() for time in times.sample(32, generator))
    dropped = torch.rand(32, generator=generator) < 0.3
    assert 0 < dropped.sum() < 32
    twin, frozen = copy.deepcopy(student), copy.deepcopy(student).requires_grad_(False)
    twin.zero_grad()
    x_t, v = interpolate(x, noise, t), conditional_velocity(x, noise)
    u_cond, u_null = frozen(x_t, t, t, labels), frozen(x_t, t, t, torch.full_like(labels, NULL))
    mixed = omega * v + kappa * u_cond + (1 - omega - kappa) * u_null
    on = ~dropped & (t >= guidance_interval[0]) & (t <= guidance_interval[1])
    v = torch.where(on[:, None], mixed, v)
    labels = torch.where(dropped, NULL, labels)
    _, du = torch.func.jvp(lambda x, t: frozen(x, t, r, labels), (x_t, t), (v, torch.ones_like(t)))
    error = (twin(x_t, t, r, labels) - (v - (t - r)[:, None] * du)).square().sum(dim=1)
    want = (error / (error.detach() + 1e-2)).mean()
    want.backward()
    torch.testing.assert_close(output.loss, want)
    for got, expected in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-12, rtol=1e-9)


def test_scale_one_without_dropout_is_no_guidance() -> None:
    x, noise, labels = draw_labelled(16)
    student = Labelled().double()
    plain = MeanFlowLoss()(student, x, noise, labels=labels, generator=seeded())
    guidance = MeanFlowGuidance(omega=1.0, kappa=0.0, dropout=0.0)
    output = MeanFlowLoss(guidance=guidance)(
        student, x, noise, null={"labels": NULL}, labels=labels, generator=seeded()
    )
    assert torch.equal(output.loss, plain.loss)
    assert torch.equal(output.t, plain.t)


@pytest.mark.parametrize(
    ("weights", "passes"),
    [
        ({"omega": 1.0, "kappa": 0.5}, 2),
        ({"omega": 2.0, "kappa": 0.0}, 1),  # the condition is not asked for
        ({"omega": 0.3, "kappa": 0.7}, 1),  # the null condition has no weight
        ({"omega": 1.0, "kappa": 0.0}, 0),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_forward_passes(weights: dict[str, float], passes: int, share: float) -> None:
    """Whole batches without gradient at r = t, then the derivative (where r < t), then the one with gradient."""
    x, noise, labels = draw_labelled(8)
    student = Recorder(Labelled().double())
    loss = MeanFlowLoss(times=UniformTimes(interval_share=share), guidance=MeanFlowGuidance(**weights))
    loss(student, x, noise, null={"labels": NULL}, labels=labels)
    assert len(student.calls) == passes + (2 if share else 1)
    for call in student.calls[:passes]:
        assert not call["grad"]
        assert not call["tangent"]
        assert torch.equal(call["r"], call["t"])
        assert len(call["x"]) == 8
    if passes == 2:
        asked, empty = student.calls[:2]
        assert torch.equal(asked["cond"]["labels"], labels)
        assert (empty["cond"]["labels"] == NULL).all()
    assert [call["tangent"] for call in student.calls[passes:]] == ([True, False] if share else [False])
    assert student.calls[-1]["grad"]


def test_a_dropped_sample_loses_its_condition_in_every_pass_that_trains() -> None:
    x, noise, labels = draw_labelled(64)
    student = Recorder(Labelled().double())
    loss = MeanFlowLoss(times=UniformTimes(interval_share=1.0), guidance=MeanFlowGuidance(dropout=0.5))
    loss(student, x, noise, null={"labels": NULL}, labels=labels, generator=seeded())
    derivative, forward = student.calls[-2:]
    seen = forward["cond"]["labels"]
    assert torch.equal(derivative["cond"]["labels"], seen)
    dropped = seen == NULL
    assert 16 < dropped.sum() < 48
    assert torch.equal(seen[~dropped], labels[~dropped])


def test_the_share_of_dropped_samples() -> None:
    dropped = MeanFlowGuidance(dropout=0.1).drop(100_000, seeded(), torch.device("cpu"))
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=0.004)
    assert not MeanFlowGuidance(dropout=0.0).drop(1000, None, torch.device("cpu")).any()


def test_null_may_be_a_tensor_and_other_conditions_stay() -> None:
    """A text of 2 tokens with its mask; a scale that no null names."""
    cond = {"text": torch.randn(3, 2, 4), "mask": torch.ones(3, 2, dtype=torch.bool), "scale": 2.0}
    empty = torch.randn(2, 4)
    null = {"text": empty, "mask": torch.tensor([True, False])}
    some = replace_by_null(cond, null, torch.tensor([False, True, False]))
    assert torch.equal(some["text"][1], empty)
    assert torch.equal(some["text"][[0, 2]], cond["text"][[0, 2]])
    assert some["mask"].tolist() == [[True, True], [True, False], [True, True]]
    assert some["scale"] == 2.0
    everywhere = replace_by_null(cond, null)
    assert torch.equal(everywhere["text"], empty.expand(3, 2, 4))


def test_under_autocast_the_gradient_arrives() -> None:
    student = Labelled()
    x, noise, labels = draw_labelled(16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = MeanFlowLoss(times=UniformTimes(interval_share=0.5), guidance=MeanFlowGuidance(dropout=0.5))
        output = loss(student, x.float(), noise.float(), null={"labels": NULL}, labels=labels, generator=seeded())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.net.parameters())


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (MeanFlowLoss(guidance=MeanFlowGuidance()), {}, "guidance needs null"),
        (MeanFlowLoss(), {"null": {"labels": NULL}}, "null is read with guidance only"),
        (
            MeanFlowLoss(guidance=MeanFlowGuidance()),
            {"null": {"labels": NULL}, "teacher": lambda x, t, **cond: x},
            "guidance trains from scratch: leave teacher out",
        ),
        (
            MeanFlowLoss(guidance=MeanFlowGuidance()),
            {"null": {"text": 0}},
            "null names 'text', which must be a tensor among the conditions; got labels",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(loss: MeanFlowLoss, options: dict[str, Any], message: str) -> None:
    x, noise, labels = draw_labelled(4)
    with pytest.raises(ValueError, match=message):
        loss(Labelled().double(), x, noise, labels=labels, **options)


def test_the_mixture_names_a_wrong_shape() -> None:
    v = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"u_null must have velocity's shape \(4, 2\); got \(4, 1\)"):
        guidance_mixture(v, v, v[:, :1], 1.0, 0.5)
