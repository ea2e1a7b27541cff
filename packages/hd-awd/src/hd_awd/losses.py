"""Adversarial losses on logits, and R1 without a double backward. Large logits mean real."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("softplus", "hinge", "relativistic")


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "softplus") -> Tensor:
    """The discriminator's loss, a scalar: mean over all logits.

        softplus       softplus(-real) + softplus(fake)             (non-saturating GAN, arXiv 1406.2661)
        hinge          relu(1 - real) + relu(1 + fake)              (arXiv 1705.02894)
        relativistic   softplus(-(real - fake)), entries paired     (arXiv 1807.00734)

    Args:
        real, fake: logits of one shape, e.g. (B, L). Compute ``fake`` from DETACHED samples: this function
            cannot know the student, and its gradient must not reach it.

    Returns:
        Scalar in float32 or better; nothing is detached here.

    Raises:
        ValueError: for an unknown kind or shapes that differ.
    """
    _check(kind, real, fake)
    real, fake = _wide(real), _wide(fake)
    if kind == "softplus":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(fake - real).mean()


def generator_loss(fake: Tensor, real: Tensor | None = None, kind: str = "softplus") -> Tensor:
    """The student's adversarial loss, a scalar: mean over all logits.

        softplus       softplus(-fake)
        hinge          -fake
        relativistic   softplus(-(fake - real)), entries paired

    Args:
        fake: logits of the student's samples, with their graph; e.g. (B, L).
        real: logits of real samples, of fake's shape; needed by "relativistic" alone.

    Returns:
        Scalar in float32 or better; nothing is detached here. Freeze the discriminator's parameters around
        the backward pass (``requires_grad_(False)``), or drop what they gathered.

    Raises:
        ValueError: for an unknown kind, a missing ``real`` or shapes that differ.
    """
    _check(kind, real, fake)
    fake = _wide(fake)
    if kind == "softplus":
        return F.softplus(-fake).mean()
    if kind == "hinge":
        return -fake.mean()
    if real is None:
        raise ValueError('kind="relativistic" compares pairs: real logits are needed')
    return F.softplus(_wide(real) - fake).mean()


def approximate_r1(
    discriminator: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    std: float = 0.01,
    logits: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mean (D(x) - D(x + a n))^2 / a^2, n standard normal; tends to E |grad D|^2, the R1 penalty, as a -> 0.

    The finite-difference form (arXiv 2501.08316) needs no double backward, so it works through fused
    attention. Divided by a^2 here [ours], so that the weight in front does not depend on ``std``. The
    difference is divided by a small number: logits computed in bfloat16 drown it in rounding, so call this
    outside autocast or take a larger ``std``.

    Args:
        discriminator: x -> logits, feature network included.
        x: real inputs (B, ...).
        std: a > 0.
        logits: discriminator(x), with its graph, if it is at hand; saves a call.
        generator: for n; draws on its own device.

    Returns:
        Scalar in float32 or better, differentiable in the discriminator's parameters.

    Raises:
        ValueError: if std <= 0, or ``logits`` have another shape than the discriminator's.
    """
    if not std > 0:
        raise ValueError(f"std must be > 0; got {std}")
    where = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=where, dtype=x.dtype).to(x.device)
    if logits is None:
        logits = discriminator(x)
    moved = discriminator(x + std * noise)
    if moved.shape != logits.shape:
        raise ValueError(f"logits must be discriminator(x), of shape {tuple(moved.shape)}; got {tuple(logits.shape)}")
    return ((_wide(moved) - _wide(logits)) / std).square().mean()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check(kind: str, real: Tensor | None, fake: Tensor) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if real is not None and real.shape != fake.shape:
        raise ValueError(f"real and fake logits must have one shape; got {tuple(real.shape)} and {tuple(fake.shape)}")
