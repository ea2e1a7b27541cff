"""Samplers as plain functions: they go from noise at t = 1 to data at t = 0 and know nothing of networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field

METHODS = ("euler", "heun")


@torch.no_grad()
def sample_ode(field: Field, noise: Tensor, steps: int, method: str = "euler", **cond: Any) -> Tensor:
    """Integrate dx/dt = field(x, t) from t = 1 to t = 0 with equal steps.

    Args:
        field: an instantaneous velocity field (a teacher).
        noise: (B, ...) standard normal, the state at t = 1; it is not changed.
        steps: number of steps >= 1.
        method: "euler" (first order, one call a step) or "heun" (second order, two calls a step).
        cond: passed to every call.

    Returns:
        Samples of noise's shape and dtype, without gradient. The field sees noise's dtype; times and the
        state between the steps are in float32 or better.

    Raises:
        ValueError: for an unknown method or steps < 1.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1; got {steps}")
    x = noise.to(_wide(noise))
    for i in range(steps):
        # Times are computed from the index, not accumulated, so that the last one is exactly 0.
        now, after = 1 - i / steps, 1 - (i + 1) / steps
        velocity = field(x.to(noise.dtype), _times(now, noise), **cond)
        if method == "heun":
            ahead = x - (now - after) * velocity
            velocity = (velocity + field(ahead.to(noise.dtype), _times(after, noise), **cond)) / 2
        x = x - (now - after) * velocity
    return x.to(noise.dtype)


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
            others of its batch.
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
    if len(seeds) != len(noise):
        raise ValueError(f"seeds must be one per sample, {len(noise)}; got {len(seeds)}")
    # A seed's first numbers are its noise at t = 1 (seeded_noise), so the increments come from a stream beside it.
    generators = [torch.Generator().manual_seed(int(seed) ^ 0x5DE) for seed in seeds]
    x = noise.to(_wide(noise))
    count = steps - 1
    for i in range(count):
        now, after = (1 - (1 - last_step) * j / count for j in (i, i + 1))
        drift, spread = _sde_terms(field, x, now, noise, strength, cond)
        increment = torch.stack([torch.randn(noise.shape[1:], generator=one) for one in generators]).to(x)
        x = x - (now - after) * drift + (spread * (now - after)) ** 0.5 * increment
    drift, _ = _sde_terms(field, x, last_step, noise, strength, cond)
    return (x - last_step * drift).to(noise.dtype)


def _sde_terms(
    field: Field, x: Tensor, t: float, noise: Tensor, strength: Callable[[float], float] | None, cond: dict[str, Any]
) -> tuple[Tensor, float]:
    """(v - w s / 2, w) at t; going backwards in time the score's term has this sign."""
    velocity = field(x.to(noise.dtype), _times(t, noise), **cond)
    spread = 2 * t if strength is None else strength(t)
    score = -(x + (1 - t) * velocity) / t
    return velocity - spread * score / 2, spread


@torch.no_grad()
def sample_jumps(field: Field, noise: Tensor, times: Sequence[float] = (1.0, 0.0), **cond: Any) -> Tensor:
    """Jump along ``times`` with a mean velocity: x_r = x_t - (t - r) field(x_t, t, r) [arXiv 2505.13447].

    Args:
        field: a mean velocity field (a student).
        noise: (B, ...) standard normal, the state at ``times[0]`` = 1; it is not changed.
        times: decreasing, from 1 to 0; (1, 0) is one-step sampling, (1, 0.5, 0) two steps.
        cond: passed to every call.

    Returns:
        Samples of noise's shape and dtype, without gradient. The field sees noise's dtype; times and the
        state between the steps are in float32 or better.

    Raises:
        ValueError: if times do not decrease strictly from 1 to 0.
    """
    if len(times) < 2 or times[0] != 1 or times[-1] != 0:
        raise ValueError(f"times must run from 1 to 0; got {tuple(times)}")
    if any(later >= earlier for earlier, later in itertools.pairwise(times)):
        raise ValueError(f"times must decrease strictly; got {tuple(times)}")
    x = noise.to(_wide(noise))
    for t, r in itertools.pairwise(times):
        x = x - (t - r) * field(x.to(noise.dtype), _times(t, noise), _times(r, noise), **cond)
    return x.to(noise.dtype)


def _wide(noise: Tensor) -> torch.dtype:
    """The dtype of the state and of the times: half precision cannot tell 250 times apart."""
    return torch.promote_types(noise.dtype, torch.float32)


def _times(t: float, noise: Tensor) -> Tensor:
    return torch.full(noise.shape[:1], t, dtype=_wide(noise), device=noise.device)


def uniform_times(steps: int) -> tuple[float, ...]:
    """(1, (steps - 1) / steps, ..., 0): equal jumps for :func:`sample_jumps`."""
    if steps < 1:
        raise ValueError(f"steps must be >= 1; got {steps}")
    return tuple((steps - i) / steps for i in range(steps + 1))


def seeded_noise(shape: Sequence[int], seeds: Sequence[int], *, device: str | torch.device = "cpu") -> Tensor:
    """Standard normal noise (len(seeds), *shape), float32, row i a function of ``seeds[i]`` alone.

    It is drawn on the CPU, so that a seed means the same picture on every device and at every batch size.
    """
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(device)
