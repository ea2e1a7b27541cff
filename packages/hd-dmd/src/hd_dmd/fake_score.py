"""The fake score: a velocity field that follows the student's own distribution while that moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hd_dmd.field import Field, check_output
from hd_dmd.levels import LevelSampler, UniformLevels
from hd_dmd.matching import noised


@dataclass(frozen=True, kw_only=True)
class FakeScoreOutput:
    """What :func:`fake_score_loss` returns. All but ``loss`` is detached."""

    loss: Tensor
    """scalar, at least float32: the mean squared error over all elements"""
    squared_error: Tensor
    """(B,), mean over each sample's elements"""
    t: Tensor
    """(B,), the noise levels"""


def fake_score_loss(
    fake: Field,
    sample: Tensor,
    *,
    noise_levels: LevelSampler | None = None,
    generator: torch.Generator | None = None,
    **cond: Any,
) -> FakeScoreOutput:
    """L_psi = mean (v_psi(x_t, t) - (n - x))^2: flow matching on student samples [DMD2, arXiv 2405.14867].

    Args:
        fake: velocity field v_psi; it alone receives gradients.
        sample: generated x (B, ...); detached here, so the student receives none.
        noise_levels: sampler of t; None: ``UniformLevels()`` [ours]. Cover at least those at which scores are
            compared; DMD2 trains its fake score on ALL levels.
        generator: for noise and levels; draws on its own device.
        cond: conditions, passed to the field.

    Raises:
        ValueError: if the field returns another shape than the sample's.
    """
    x = sample.detach()
    x_t, t, noise = noised(x, noise_levels or UniformLevels(), generator)
    velocity = check_output(fake(x_t, t, **cond), x, "the fake field")
    error = (velocity.to(noise.dtype) - (noise - x)).square().flatten(1).mean(dim=1)
    return FakeScoreOutput(loss=error.mean(), squared_error=error.detach(), t=t)
