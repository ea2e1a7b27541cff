"""DistributionMatchingLoss: the gradient it sends, where it goes, how the fields are called."""

from __future__ import annotations

import functools

import pytest
import torch
from dmd_helpers import MLP, Gaussian, Recorder, seeded
from torch import Tensor

from hd_dmd import (
    DistributionMatchingLoss,
    Field,
    LogitNormalLevels,
    UniformLevels,
    distribution_matching_gradient,
    fake_score_loss,
    noised,
)


def draw_sample() -> torch.Tensor:
    """x (8, 2), float64, as a student's output: it requires a gradient."""
    return torch.randn(8, 2, dtype=torch.float64, requires_grad=True)


def test_noised_is_the_path_with_the_noise_it_returns() -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    x_t, t, n = noised(x, LogitNormalLevels(), seeded())
    torch.testing.assert_close(x_t, (1 - t)[:, None, None] * x + t[:, None, None] * n)
    assert torch.equal(t, LogitNormalLevels().sample(6, seeded()).double())
    _, _, many = noised(torch.zeros(100_000, 1), UniformLevels(), seeded())
    assert many.mean().abs() < 0.02
    assert many.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("shape", [(8, 1), (8, 2), (4, 3, 5, 5)])
def test_autograd_gradient_is_g_over_the_number_of_elements(shape: tuple[int, ...]) -> None:
    real, fake = Gaussian(0.7, 0.4), Gaussian(1.0, 0.5)
    x = fake.draw(*shape).requires_grad_()
    output = DistributionMatchingLoss()(x, real=real, fake=fake, generator=seeded())
    output.loss.backward()
    torch.testing.assert_close(x.grad, output.gradient / x.numel(), atol=1e-14, rtol=1e-9)
    x_t, t, _ = noised(x.detach(), UniformLevels(), seeded())
    g = distribution_matching_gradient(x.detach(), x_t, t, real(x_t, t), fake(x_t, t))
    torch.testing.assert_close(output.gradient, g)
    torch.testing.assert_close(output.loss.detach(), 0.5 * g.square().mean())


def test_diagnostics_say_what_they_say() -> None:
    sample = draw_sample()
    output = DistributionMatchingLoss()(
        sample, real=lambda x, t: 0 * x + 2, fake=lambda x, t: 0 * x + 0.5, generator=seeded()
    )
    assert output.velocity_gap.item() == pytest.approx(1.5)
    torch.testing.assert_close(output.gradient_rms, output.gradient.square().mean().sqrt())
    assert torch.equal(output.t, UniformLevels().sample(8, seeded()).double())
    assert output.loss.requires_grad
    for name in ("gradient", "gradient_rms", "velocity_gap", "t"):
        assert not getattr(output, name).requires_grad, name


def test_zero_where_the_distributions_agree() -> None:
    sample = draw_sample()
    output = DistributionMatchingLoss()(sample, real=Gaussian(0.7, 0.4), fake=Gaussian(0.7, 0.4))
    output.loss.backward()
    assert output.loss.item() == 0
    assert sample.grad.abs().max() == 0


def test_gradient_reaches_the_students_graph_alone() -> None:
    student, real, fake = (MLP().double() for _ in range(3))
    x = student(torch.randn(8, 2, dtype=torch.float64), torch.ones(8))
    DistributionMatchingLoss()(x, real=real, fake=fake).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for net in (real, fake) for p in net.parameters())


def test_fields_are_asked_once_without_gradient_at_the_same_point() -> None:
    real, fake = Recorder(Gaussian(0.7, 0.4)), Recorder(Gaussian(0.9, 0.4))
    label = torch.arange(8)
    output = DistributionMatchingLoss()(draw_sample(), real=real, fake=fake, label=label, scale=2.0)
    (a,), (b,) = real.calls, fake.calls
    assert torch.equal(a["x"], b["x"])
    for call in (a, b):
        assert not call["grad"]
        assert not call["x"].requires_grad
        assert call["r"] is None
        assert torch.equal(call["t"], output.t)
        assert torch.equal(call["cond"]["label"], label)
        assert call["cond"]["scale"] == 2.0
    assert torch.is_grad_enabled()


def test_levels_and_floor_are_used() -> None:
    real = Recorder(Gaussian(0.7, 0.4))
    settings = DistributionMatchingLoss(noise_levels=UniformLevels(low=0.5, high=0.51), floor=1e3)
    output = settings(draw_sample(), real=real, fake=Gaussian(0.9, 0.4))
    assert ((output.t >= 0.5) & (output.t <= 0.51)).all()
    assert output.gradient.abs().max() < 1e-3


def test_a_generator_decides() -> None:
    sample, fields = draw_sample(), {"real": Gaussian(0.7, 0.4), "fake": Gaussian(1.0, 0.5)}
    before = torch.get_rng_state()
    first, again, other = (
        DistributionMatchingLoss()(sample, generator=seeded(s), **fields).gradient for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_works_with_any_callable() -> None:
    net, real, sample = MLP().double(), MLP().double(), draw_sample()
    fields = (net, lambda x, t: net(x, t), functools.partial(net), net.forward)
    losses = {DistributionMatchingLoss()(sample, real=real, fake=f, generator=seeded()).loss.item() for f in fields}
    assert len(losses) == 1
    assert all(isinstance(f, Field) for f in fields)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    """The fields see the sample's type; the loss and its diagnostics are float32 or better."""
    real, fake = MLP().to(dtype), MLP().to(dtype)
    x = torch.randn(8, 2, dtype=dtype, requires_grad=True)
    output = DistributionMatchingLoss()(x, real=real, fake=fake)
    output.loss.backward()
    wide = torch.promote_types(dtype, torch.float32)
    for name in ("loss", "gradient", "gradient_rms", "velocity_gap", "t"):
        assert getattr(output, name).dtype == wide, name
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, (output.gradient / 16).to(dtype))


def test_under_autocast_fake_score_still_gets_its_gradient() -> None:
    """Both fields run without gradient, then the fake score trains inside the same autocast region."""
    real, fake, student = MLP(), MLP(), MLP()
    with torch.autocast("cpu", torch.bfloat16):
        x = student(torch.randn(8, 2), torch.ones(8))
        loss = DistributionMatchingLoss()(x, real=real, fake=fake).loss
        fake_loss = fake_score_loss(fake, x).loss
    assert loss.dtype == fake_loss.dtype == torch.float32
    (loss + fake_loss).backward()
    for net in (student, fake):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(p.grad is None for p in real.parameters())


def test_autocast_cache_is_cleared_after_the_passes_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older torch releases reuse casts made under no_grad, and lose the gradient: none may be left over."""
    events, clear = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (events.append("clear"), clear()))

    def field(x: Tensor, t: Tensor) -> Tensor:
        events.append("field")
        return x

    with torch.autocast("cpu", torch.bfloat16):
        DistributionMatchingLoss()(draw_sample(), real=field, fake=field)
        assert events == ["field", "field", "clear"]


def test_errors_name_the_argument() -> None:
    sample = draw_sample()
    good, bad = Gaussian(0.7, 0.4), lambda x, t: x[:, :1]
    with pytest.raises(ValueError, match=r"the real field must return x's shape \(8, 2\); got \(8, 1\)"):
        DistributionMatchingLoss()(sample, real=bad, fake=good)
    with pytest.raises(ValueError, match="the fake field must return x's shape"):
        DistributionMatchingLoss()(sample, real=good, fake=bad)
    with pytest.raises(ValueError, match="the fake field must return a tensor"):
        DistributionMatchingLoss()(sample, real=good, fake=lambda x, t: None)


def gradients(*networks: torch.nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for network in networks for p in network.parameters()]


def test_a_turn_that_freezes_the_others_has_the_same_gradient() -> None:
    """Each optimiser's turn: freeze what is not its own, then backward. Its owner alone has a gradient."""
    student, real, fake = (MLP().double() for _ in range(3))
    noise = torch.randn(8, 2, dtype=torch.float64)

    def student_turn() -> torch.Tensor:
        sample = student(noise, torch.ones(8))
        return DistributionMatchingLoss()(sample, real=real, fake=fake, generator=seeded()).loss

    def fake_score_turn() -> torch.Tensor:
        return fake_score_loss(fake, student(noise, torch.ones(8)), generator=seeded()).loss

    for turn, owner, others in ((student_turn, student, (real, fake)), (fake_score_turn, fake, (real, student))):
        turn().backward()
        want = gradients(owner)
        assert all(grad is not None and grad.abs().sum() > 0 for grad in want)
        for network in (owner, *others):
            network.zero_grad()
        for other in others:
            other.requires_grad_(False)
        turn().backward()
        torch.testing.assert_close(gradients(owner), want, atol=0, rtol=0)
        assert all(grad is None for grad in gradients(*others))
        for network in (owner, *others):
            network.zero_grad()
            network.requires_grad_(True)
