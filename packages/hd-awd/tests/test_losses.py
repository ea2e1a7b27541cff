"""Adversarial losses against closed forms, the sign of their gradients, and approximate R1 against R1."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hd_awd import approximate_r1, discriminator_loss, generator_loss

KINDS = ("softplus", "hinge", "relativistic")


def log1pexp(x: float) -> float:
    return math.log1p(math.exp(x))


DISCRIMINATOR = {
    "softplus": lambda r, f: log1pexp(-r) + log1pexp(f),
    "hinge": lambda r, f: max(0.0, 1 - r) + max(0.0, 1 + f),
    "relativistic": lambda r, f: log1pexp(-(r - f)),
}
GENERATOR = {
    "softplus": lambda r, f: log1pexp(-f),
    "hinge": lambda r, f: -f,
    "relativistic": lambda r, f: log1pexp(-(f - r)),
}


def draw_logits() -> tuple[Tensor, Tensor]:
    """real and fake (5, 3), away from the hinge's corners."""
    return 2 * torch.randn(5, 3, dtype=torch.float64), 2 * torch.randn(5, 3, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str) -> None:
    logits = draw_logits()
    pairs = list(zip(*(tensor.flatten().tolist() for tensor in logits), strict=True))
    for loss, form in (
        (discriminator_loss(*logits, kind), DISCRIMINATOR),
        (generator_loss(logits[1], logits[0], kind), GENERATOR),
    ):
        assert loss.shape == ()
        assert loss.item() == pytest.approx(sum(form[kind](r, f) for r, f in pairs) / len(pairs), rel=1e-12)


def test_softplus_is_the_default_and_needs_no_real_logits() -> None:
    real, fake = draw_logits()
    assert discriminator_loss(real, fake) == discriminator_loss(real, fake, "softplus")
    assert generator_loss(fake) == generator_loss(fake, kind="softplus") == generator_loss(fake, real)
    assert generator_loss(fake, kind="hinge") == generator_loss(fake, real, "hinge")


def test_a_perfectly_undecided_discriminator_pays_two_log_two() -> None:
    zero = torch.zeros(4, 2)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert discriminator_loss(zero, zero, "relativistic").item() == pytest.approx(math.log(2))
    assert discriminator_loss(zero, zero, "hinge").item() == 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    arguments = tuple(tensor.requires_grad_() for tensor in draw_logits())
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(r, f, kind), arguments)
    real, fake = arguments if kind == "relativistic" else (None, arguments[1])
    wanting = (fake,) if real is None else (fake, real)
    assert torch.autograd.gradcheck(lambda f, r=real: generator_loss(f, r, kind), wanting)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_the_discriminator_separates_and_a_step_of_the_student_raises(kind: str) -> None:
    real, fake = torch.zeros(6, 2, requires_grad=True), torch.zeros(6, 2, requires_grad=True)
    to_real, to_fake = torch.autograd.grad(discriminator_loss(real, fake, kind), (real, fake))
    assert torch.all(to_real < 0)  # a step against the gradient raises D(real)
    assert torch.all(to_fake > 0)  # and lowers D(fake)
    assert torch.all(torch.autograd.grad(generator_loss(fake, real, kind), fake)[0] < 0)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_and_half_precision_logits(kind: str) -> None:
    real, fake = torch.full((3,), -80.0), torch.full((3,), 80.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loss = discriminator_loss(real.to(dtype), fake.to(dtype), kind)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx({"softplus": 160, "hinge": 162, "relativistic": 160}[kind])
        assert generator_loss(fake.to(dtype), real.to(dtype), kind).isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a, b: discriminator_loss(a, a, "wasserstein"),
            "softplus, hinge, relativistic; got 'wasserstein'",
        ),
        (lambda a, b: generator_loss(a, kind="wgan"), "kind must be one of"),
        (lambda a, b: discriminator_loss(a, b), r"one shape; got \(2, 3\) and \(3,\)"),
        (lambda a, b: generator_loss(a, b, "relativistic"), "one shape"),
        (lambda a, b: generator_loss(a, kind="relativistic"), "real logits are needed"),
        (lambda a, b: approximate_r1(lambda x: x, a, std=0.0), "std must be > 0; got 0.0"),
        (lambda a, b: approximate_r1(lambda x: x, a, std=float("nan")), "std must be > 0"),
        (lambda a, b: approximate_r1(lambda x: x, a, logits=b), r"of shape \(2, 3\); got \(3,\)"),
    ],
)
def test_errors(call: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3), torch.zeros(3))


def discriminator_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def test_r1_of_a_linear_discriminator_is_exact_in_expectation() -> None:
    """D = g . x gives (g . n)^2, whose mean is |g|^2 at every std."""
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    x = torch.randn(200_000, 3, dtype=torch.float64)
    for std in (1e-2, 3.0):
        found = approximate_r1(lambda x: x @ slope, x, std=std).item()
        standard_error = 5.25 * math.sqrt(2 / len(x))
        assert abs(found - 5.25) < 5 * standard_error


def test_r1_tends_to_the_squared_gradient() -> None:
    discriminator, x = discriminator_net(), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(discriminator(x)[:, i].sum(), x, create_graph=True)[0] for i in range(2)]
    exact = torch.stack([g.square().sum(dim=(1, 2)) for g in gradients], dim=1).mean()
    many = x.detach().repeat(20_000, 1, 1)
    found = approximate_r1(discriminator, many, std=1e-4)
    assert found.item() == pytest.approx(exact.item(), rel=0.03)

    # Its gradient in the discriminator's parameters tends to the double backward's.
    parameters = [p for p in discriminator.parameters() if p.ndim == 2]
    oracle = torch.autograd.grad(exact, parameters)
    for one, other in zip(torch.autograd.grad(found, parameters), oracle, strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.995
        assert one.norm().item() == pytest.approx(other.norm().item(), rel=0.05)


def test_r1_reuses_logits_and_follows_its_generator() -> None:
    discriminator, x, calls = discriminator_net(), torch.randn(3, 2, 3, dtype=torch.float64), []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return discriminator(x)

    def value(logits: Tensor | None, seed: int) -> Tensor:
        return approximate_r1(counted, x, logits=logits, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first = value(None, 1)
    assert len(calls) == 2
    assert value(discriminator(x), 1) == first
    assert len(calls) == 3
    assert value(None, 2) != first
    assert torch.equal(torch.get_rng_state(), state)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    torch.testing.assert_close(calls[1], x + 0.01 * noise)
    assert approximate_r1(discriminator.float(), x.float()).dtype == torch.float32
