"""Distribution matching: the gradient of reverse KL between the noised samples of student and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import torch
from torch import Tensor

from hd_dmd.checks import check_positive, check_sampler
from hd_dmd.field import Field, check_output, expand_times
from hd_dmd.levels import LevelSampler, UniformLevels


def distribution_matching_gradient(
    sample: Tensor, x_t: Tensor, t: Tensor, v_real: Tensor, v_fake: Tensor, *, floor: float = 1e-6
) -> Tensor:
    """g = (x_fake - x_real) / mean |x - x_real| = t (v_real - v_fake) / mean |x - x_real| [DMD2, 2405.14867].

    With x_real = x_t - t v_real and x_fake = x_t - t v_fake, the two networks' ideas of the clean sample. In
    terms of scores s = -(x_t + (1 - t) v) / t, s_real - s_fake = (1 - t) / t (v_fake - v_real): following -g
    moves the sample to where the real distribution is denser than the fake one. The mean runs over each
    sample's elements, so every sample pulls alike at every noise level.

    Args:
        sample: generated x (B, ...).
        x_t: (1 - t) x + t n, of x's shape.
        t: (B,) in (0, 1).
        v_real: the teacher's velocity at (x_t, t), guidance included; of x's shape.
        v_fake: the fake score's velocity at (x_t, t); of x's shape.
        floor: lower bound of the denominator, for a sample that equals x_real.

    Returns:
        Detached tensor of x's shape, in float32 or better: the direction to move AGAINST.

    Raises:
        ValueError: if the shapes do not agree.
    """
    for name, value in (("x_t", x_t), ("v_real", v_real), ("v_fake", v_fake)):
        if value.shape != sample.shape:
            raise ValueError(f"{name} must have sample's shape {tuple(sample.shape)}; got {tuple(value.shape)}")
    precise = torch.promote_types(sample.dtype, torch.float32)
    with torch.no_grad():
        times = expand_times(t, sample).to(precise)
        v_real, v_fake = v_real.to(precise), v_fake.to(precise)
        distance = (sample.to(precise) - (x_t.to(precise) - times * v_real)).abs()
        scale = expand_times(distance.flatten(1).mean(dim=1).clamp(min=floor), sample)
        return times * (v_real - v_fake) / scale


@dataclass(frozen=True, kw_only=True)
class DistributionMatchingOutput:
    """What :class:`DistributionMatchingLoss` returns. All but ``loss`` is detached."""

    loss: Tensor
    """scalar, at least float32; its gradient with respect to the sample is g / (number of elements)"""
    gradient: Tensor
    """g, of the sample's shape"""
    gradient_rms: Tensor
    """scalar, root mean square of g"""
    velocity_gap: Tensor
    """scalar, mean |v_real - v_fake| before normalisation: how far apart the two distributions still are"""
    t: Tensor
    """(B,), the noise levels"""


@dataclass(frozen=True, kw_only=True)
class DistributionMatchingLoss:
    """L_DM = 1/2 mse(x, stopgrad(x - g)); its gradient in x is g / (element count) [DMD2, 2405.14867]."""

    noise_levels: LevelSampler = dataclass_field(default_factory=UniformLevels)
    """draws the noise levels: UniformLevels [ours] by default, KarrasLevels as in DMD2"""
    floor: float = 1e-6
    """lower bound of the normaliser, > 0 and finite"""

    def __post_init__(self) -> None:
        check_sampler("noise_levels", self.noise_levels, "sample(batch, generator, device) -> t")
        check_positive("floor", self.floor)

    def __call__(
        self,
        sample: Tensor,
        *,
        real: Field,
        fake: Field,
        generator: torch.Generator | None = None,
        **cond: Any,
    ) -> DistributionMatchingOutput:
        """Noise the sample, ask both fields, return the loss.

        Args:
            sample: x (B, ...) with the student's graph; the loss's gradient flows into it and nowhere else:
                both fields are called without gradient.
            real: the teacher, guidance included (guidance belongs in the real velocity only [DMD2]).
            fake: the fake score, a velocity field fitted to the student's samples by :func:`fake_score_loss`.
            generator: for noise and levels; draws on its own device.
            cond: conditions, passed to both fields.

        Raises:
            ValueError: if a field returns another shape than the sample's.
        """
        x = sample.detach()
        x_t, t, _ = noised(x, self.noise_levels, generator)
        with torch.no_grad():
            v_real = check_output(real(x_t, t, **cond), x, "the real field")
            v_fake = check_output(fake(x_t, t, **cond), x, "the fake field")
        if torch.is_autocast_enabled(x.device.type):
            # Casts cached without a graph would be reused by the fake score's own training step.
            torch.clear_autocast_cache()
        gradient = distribution_matching_gradient(x, x_t, t, v_real, v_fake, floor=self.floor)
        wide = sample.to(gradient.dtype)
        return DistributionMatchingOutput(
            loss=0.5 * (wide - (wide - gradient).detach()).square().mean(),
            gradient=gradient,
            gradient_rms=gradient.square().mean().sqrt(),
            velocity_gap=(v_real - v_fake).abs().mean(dtype=gradient.dtype),
            t=t,
        )


def noised(
    x: Tensor, noise_levels: LevelSampler, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw levels and noise: (x_t, t, n) with x_t = (1 - t) x + t n.

    x_t has x's shape and dtype; t, of shape (B,), and n, of x's shape, are in float32 or better.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    t = noise_levels.sample(x.shape[0], generator, x.device).to(precise)
    where = x.device if generator is None else generator.device
    noise = torch.randn(x.shape, generator=generator, device=where, dtype=precise).to(x.device)
    times = expand_times(t, x)
    return ((1 - times) * x + times * noise).to(x.dtype), t, noise
