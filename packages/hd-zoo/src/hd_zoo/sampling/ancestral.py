"""DDPM's ancestral sampling (arXiv 2006.11239) over respaced steps, as DiT's 250-step figures use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field
from hd_zoo.sampling.noise import NoiseStreams
from hd_zoo.sampling.times import full_times, wide
from hd_zoo.wrappers.wrapper import Wrapper

VARIANCES = ("learned", "small", "large")


@torch.no_grad()
def sample_ancestral(
    field: Field,
    noise: Tensor,
    steps: int = 250,
    *,
    seeds: Sequence[int],
    variance: str = "small",
    diffusion_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    **cond: Any,
) -> Tensor:
    """Sample a variance-preserving diffusion, z = sqrt(abar) x + sqrt(1 - abar) eps, by its own reverse steps.

    Any velocity field will do, also a guided one: at ratio t / (1 - t) = sqrt(1 - abar) / sqrt(abar) the two paths
    differ by a factor, and eps = x_t + (1 - t) v (:class:`hd_zoo.DiffusedNoise` is the way back). From step i to the
    one before, with abar' there, alpha = abar / abar', beta = 1 - alpha (equations 7 and 11, without clipping):

        z' = (z - beta / sqrt(1 - abar) eps) / sqrt(alpha) + sqrt(variance) n

    and no noise is added at the end. The steps are ``steps`` of the diffusion's own, evenly spread from its first to
    its last (arXiv 2102.09672, section 4).

    Args:
        field: an instantaneous velocity field (a teacher).
        noise: (B, ...) standard normal, the state at the last step; it is not changed.
        steps: number of steps and of calls, 2 to ``diffusion_steps``.
        seeds: one per sample: increments come behind the seed's noise (:func:`hd_zoo.seeded_noise`) in its stream.
        variance: "small" is beta (1 - abar') / (1 - abar), "large" is beta; "learned" lies between them, element by
            element, as the network says (arXiv 2102.09672, equation 15): DiT's own. It needs ``field.with_variance``,
            which :class:`hd_zoo.Guidance` and :class:`hd_zoo.DiffusedNoise` have around a network with
            ``learned_variance=True`` (and diffusers' DiT).
        diffusion_steps, beta_start, beta_end: the diffusion's linear schedule; DiT's are the defaults.
        cond: passed to every call.

    Returns:
        Samples of noise's shape and dtype, without gradient.

    Raises:
        ValueError: for an unknown variance, steps outside [2, diffusion_steps], betas outside
            0 < beta_start <= beta_end < 1, another number of seeds than samples, or "learned" and a field without
            ``with_variance``.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}; got {variance!r}")
    if not 2 <= steps <= diffusion_steps:
        raise ValueError(f"steps must lie in [2, diffusion_steps]; got {steps} of {diffusion_steps}")
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"0 < beta_start <= beta_end < 1 is needed; got {beta_start} and {beta_end}")
    if variance == "learned" and (lacking := _without_variance(field)):
        raise ValueError(f'variance "learned" needs with_variance, which a {lacking} does not have: take "small"')
    signals = respaced_signals(steps, diffusion_steps, beta_start, beta_end)
    streams = NoiseStreams(noise, seeds)
    z = noise.to(wide(noise))
    for i in reversed(range(steps)):
        signal, before = signals[i], signals[i - 1] if i else 1.0
        clean, level = math.sqrt(signal), math.sqrt(1 - signal)
        x, t = z / (clean + level), level / (clean + level)
        velocity, raw = _ask(field, x.to(noise.dtype), full_times(t, noise), variance, cond)
        eps = x + (1 - t) * velocity
        alpha = signal / before
        z = (z - (1 - alpha) / level * eps) / math.sqrt(alpha)
        if i:
            large, small = 1 - alpha, (1 - alpha) * (1 - before) / (1 - signal)
            if raw is None:
                spread: Tensor | float = math.sqrt(large if variance == "large" else small)
            else:
                share = (raw.to(z.dtype) + 1) / 2
                spread = (0.5 * (share * math.log(large) + (1 - share) * math.log(small))).exp()
            z = z + spread * streams.next(z)
    return z.to(noise.dtype)


def respaced_signals(steps: int, diffusion_steps: int, beta_start: float, beta_end: float) -> list[float]:
    """abar at ``steps`` of the diffusion's steps, evenly spread from the first to the last, in that order."""
    betas = torch.linspace(beta_start, beta_end, diffusion_steps, dtype=torch.float64)
    signals: list[float] = torch.cumprod(1 - betas, dim=0).tolist()
    return [signals[round(i * (diffusion_steps - 1) / (steps - 1))] for i in range(steps)]


def _without_variance(field: Any) -> str | None:
    """The class of the first in the chain of wrappers and network that has no ``with_variance``, or None."""
    while hasattr(field, "with_variance"):
        if not isinstance(field, Wrapper):
            return None
        field = getattr(field, field.inside)
    return type(field).__name__


def _ask(field: Any, x: Tensor, t: Tensor, variance: str, cond: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Velocity, and where the variance is learned what the network says of it, about [-1, 1]."""
    if variance == "learned":
        velocity, raw = field.with_variance(x, t, **cond)
        return velocity, raw
    return field(x, t, **cond), None
