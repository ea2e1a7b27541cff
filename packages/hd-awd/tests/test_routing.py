"""Who gets a gradient: the discriminator's loss must not reach the student, the student's only the sample."""

from __future__ import annotations

import pytest
import torch
from awd_helpers import TokenNet
from torch import nn

from hd_awd import Discriminator, FeatureTap, approximate_r1, discriminator_loss, generator_loss

KINDS = ("softplus", "hinge", "relativistic")


def make_parts() -> tuple[nn.Module, FeatureTap, Discriminator]:
    """A student, a tap into a frozen teacher, and a discriminator whose queries have moved."""
    token_net = TokenNet().requires_grad_(False)
    tap = FeatureTap(token_net, ["blocks.0", "blocks.1"])
    discriminator = Discriminator([8, 8], num_queries=2, head_width=4, hidden=6)
    with torch.no_grad():
        for head in discriminator.layer_heads:
            head.queries.normal_()
    return nn.Linear(3, 3), tap, discriminator


def untouched(module: nn.Module) -> bool:
    return all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_discriminators_loss(kind: str) -> None:
    student, tap, discriminator = make_parts()
    sample, real = student(torch.randn(4, 5, 3)), torch.randn(4, 5, 3)
    loss = discriminator_loss(discriminator(tap(real)), discriminator(tap(sample.detach())), kind)
    (loss + approximate_r1(lambda x: discriminator(tap(x)), real)).backward()
    assert untouched(student)
    assert untouched(tap.network)
    for name, parameter in discriminator.named_parameters():
        # Differences of logits say nothing about their common level, which the last bias sets.
        assert (parameter.grad.abs().sum() > 0) or name.endswith("mlp.2.bias"), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_students_loss(kind: str) -> None:
    student, tap, discriminator = make_parts()
    discriminator.requires_grad_(False)
    sample = student(torch.randn(4, 5, 3))
    sample.retain_grad()
    real = discriminator(tap(torch.randn(4, 5, 3)))
    generator_loss(discriminator(tap(sample)), real, kind).backward()
    assert untouched(discriminator)
    assert untouched(tap.network)
    assert torch.all(sample.grad.abs().sum(dim=(1, 2)) > 0)
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.parameters())


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_game_is_played_in_the_right_direction(pooling: str, kind: str) -> None:
    """A few discriminator steps part two shifted clouds; then a student that only shifts closes the gap."""
    token_net = TokenNet().requires_grad_(False)
    tap = FeatureTap(token_net, ["blocks.0"])
    discriminator = Discriminator([8], pooling, num_queries=1, head_width=8, hidden=16)
    real, noise = 0.3 * torch.randn(64, 4, 3) + 1, 0.3 * torch.randn(64, 4, 3)
    shift = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    for _ in range(40):
        loss = discriminator_loss(discriminator(tap(real)), discriminator(tap(noise)), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (discriminator(tap(real)) - discriminator(tap(noise))).mean() > 1
    discriminator.requires_grad_(False)
    before = discriminator(tap(noise + shift)).mean()
    loss = generator_loss(discriminator(tap(noise + shift)), discriminator(tap(real)), kind)
    (gradient,) = torch.autograd.grad(loss, shift)
    after = discriminator(tap(noise + shift - 0.3 * gradient / gradient.norm())).mean()
    assert after > before
    assert -gradient.sum() > 0  # towards the data, which lie at +1
