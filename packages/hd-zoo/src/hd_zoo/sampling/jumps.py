"""A student's samples by jumps along its mean velocity: one step, several, or with noise added between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field
from hd_zoo.sampling.noise import NoiseStreams
from hd_zoo.sampling.times import check_ends, full_times, wide


@torch.no_grad()
def sample_jumps(
    field: Field,
    noise: Tensor,
    times: Sequence[float] = (1.0, 0.0),
    *,
    seeds: Sequence[int] | None = None,
    **cond: Any,
) -> Tensor:
    """Jump along ``times`` with a mean velocity: x_r = x_t - (t - r) field(x_t, t, r) [arXiv 2505.13447].

    Where ``times`` rises, from s to t, noise is added in place of a jump, which costs no call:

        x_t = a x_s + sqrt(t^2 - (a s)^2) n,  a = (1 - t) / (1 - s)

    So (1, 0, 0.5, 0) is two-step sampling of a consistency model: :func:`hd_zoo.renoised_times` makes such times, and
    :func:`hd_zoo.restarted_times` those of restart sampling.

    Args:
        field: a mean velocity field (a student).
        noise: (B, ...) standard normal, the state at ``times[0]`` = 1; it is not changed.
        times: from 1 to 0; (1, 0) is one-step sampling, (1, 0.5, 0) two steps.
        seeds: one per sample, needed where times rise: what is added comes behind the seed's noise
            (:func:`hd_zoo.seeded_noise`) in its stream.
        cond: passed to every call.

    Returns:
        Samples of noise's shape and dtype, without gradient. The field sees noise's dtype; times and the
        state between the steps are in float32 or better.

    Raises:
        ValueError: if times do not run from 1 to 0 within [0, 1] or stand still, if they rise and there are no seeds,
            or for another number of seeds than samples.
    """
    check_ends(times)
    if not all(0 <= t <= 1 for t in times):
        raise ValueError(f"times must lie in [0, 1]; got {tuple(times)}")
    for earlier, later in itertools.pairwise(times):
        if earlier == later:
            raise ValueError(f"times must not stand still; got {tuple(times)}")
        if later > earlier and seeds is None:
            raise ValueError(f"times rise from {earlier} to {later}, where noise is added: seeds, one per sample")
    streams = None if seeds is None else NoiseStreams(noise, seeds)
    x = noise.to(wide(noise))
    for t, r in itertools.pairwise(times):
        if r < t:
            x = x - (t - r) * field(x.to(noise.dtype), full_times(t, noise), full_times(r, noise), **cond)
        else:
            assert streams is not None
            shrink = (1 - r) / (1 - t)
            x = shrink * x + (r**2 - (shrink * t) ** 2) ** 0.5 * streams.next(x)
    return x.to(noise.dtype)
