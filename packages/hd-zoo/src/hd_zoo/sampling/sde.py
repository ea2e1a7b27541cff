"""A teacher's samples by the stochastic process that has the flow's marginals (SiT)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field
from hd_zoo.sampling.noise import NoiseStreams
from hd_zoo.sampling.times import full_times, wide


@torch.no_grad()
def sample_sde(
    field: Field,
    noise: Tensor,
    steps: int,
    *,
    seeds: Sequence[int],
    last_step: float = 0.04,
    strength: Callable[[float], float] | None = None,
    **cond: Any,
) -> Tensor:
    """Integrate the stochastic process with the field's marginals from t = 1 to t = 0 (SiT, arXiv 2401.08740).

    With the score s = -(x + (1 - t) v) / t of the linear path and a diffusion coefficient w(t) >= 0,

        dx = (v - w s / 2) dt + sqrt(w) dW, backwards in time

    by Euler and Maruyama with equal steps from 1 to ``last_step``, and from there one step of the mean alone to 0.
    SiT's 250-step figures are of this kind, with w(t) = 2 t, ``last_step`` 0.04.

    Args:
        field: an instantaneous velocity field (a teacher).
        noise: (B, ...) standard normal, the state at t = 1; it is not changed.
        steps: number of steps >= 2, the last one included.
        seeds: one per sample: each sample's increments follow from its own, so that a picture does not depend on the
            others of its batch. They come behind the seed's noise (:func:`hd_zoo.seeded_noise`) in its stream.
        last_step: size of the last step, in (0, 1): w s grows as 1 / t.
        strength: w(t); None is 2 t.
        cond: passed to every call.

    Returns:
        Samples of noise's shape and dtype, without gradient.

    Raises:
        ValueError: for steps < 2, a last_step outside (0, 1), or another number of seeds than samples.
    """
    if steps < 2:
        raise ValueError(f"steps must be >= 2; got {steps}")
    if not 0 < last_step < 1:
        raise ValueError(f"last_step must lie in (0, 1); got {last_step}")
    streams = NoiseStreams(noise, seeds)
    x = noise.to(wide(noise))
    count = steps - 1
    for i in range(count):
        now, after = (1 - (1 - last_step) * j / count for j in (i, i + 1))
        drift, spread = _sde_terms(field, x, now, noise, strength, cond)
        x = x - (now - after) * drift + (spread * (now - after)) ** 0.5 * streams.next(x)
    drift, _ = _sde_terms(field, x, last_step, noise, strength, cond)
    return (x - last_step * drift).to(noise.dtype)


def _sde_terms(
    field: Field, x: Tensor, t: float, noise: Tensor, strength: Callable[[float], float] | None, cond: dict[str, Any]
) -> tuple[Tensor, float]:
    """(v - w s / 2, w) at t; going backwards in time the score's term has this sign."""
    velocity = field(x.to(noise.dtype), full_times(t, noise), **cond)
    spread = 2 * t if strength is None else strength(t)
    score = -(x + (1 - t) * velocity) / t
    return velocity - spread * score / 2, spread
