"""Grids of times from 1 to 0, and the tensors that samplers make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def uniform_times(steps: int) -> tuple[float, ...]:
    """(1, (steps - 1) / steps, ..., 0): ``steps`` equal steps, ``steps`` + 1 points."""
    if steps < 1:
        raise ValueError(f"steps must be >= 1; got {steps}")
    return tuple((steps - i) / steps for i in range(steps + 1))


def shift_times(times: Sequence[float], shift: float) -> tuple[float, ...]:
    """t -> shift t / (1 + (shift - 1) t), which multiplies the ratio of noise to data, t / (1 - t), by ``shift``.

    A shift > 1 puts more of a grid near noise (t = 1), a shift < 1 near data; 0 and 1 stay where they are
    (arXiv 2403.03206, equation 23). In a convention whose t = 0 is noise the same formula with 1 / shift does the same:
    LightningDiT's 0.3 is ``shift_times(times, 1 / 0.3)`` here.

    Raises:
        ValueError: for a shift that is not positive, or a time outside [0, 1].
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be > 0 and finite; got {shift}")
    if not all(0 <= t <= 1 for t in times):
        raise ValueError(f"times must lie in [0, 1]; got {tuple(times)}")
    # In this form 1 stays exactly 1.
    return tuple(shift * t / (shift * t + (1 - t)) for t in times)


def renoised_times(times: Sequence[float], gamma: float = 1.0) -> tuple[float, ...]:
    """For :func:`hd_zoo.sample_jumps`: jump below each inner time of ``times``, then add noise up to it.

    gamma = 1 jumps to 0 each time, as consistency models do (arXiv 2303.01469, algorithm 1); gamma = 0 adds no noise.
    Between them it is the gamma-sampling of arXiv 2310.02279 (algorithm 3): the jump ends where the ratio of noise to
    data, t / (1 - t), is sqrt(1 - gamma^2) times that of the grid's time.

        renoised_times((1, 0.6, 0.3, 0)) == (1, 0, 0.6, 0, 0.3, 0)

    Raises:
        ValueError: for times that do not decrease strictly from 1 to 0, or gamma outside [0, 1].
    """
    check_grid(times)
    check_ends(times)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1]; got {gamma}")
    found = [1.0]
    for t in times[1:-1]:
        ratio = math.sqrt(1 - gamma**2) * t / (1 - t)
        found += [t] if gamma == 0 else [ratio / (1 + ratio), t]
    return (*found, 0.0)


def restarted_times(times: Sequence[float], low: float, high: float, repeats: int = 1) -> tuple[float, ...]:
    """For :func:`hd_zoo.sample_jumps`: at ``low``, add noise up to ``high`` and come down again, ``repeats`` times.

    Restart sampling (arXiv 2306.14878). On the way down the times of ``times`` between ``high`` and ``low`` are visited
    again.

        restarted_times((1, 0.5, 0.2, 0), 0.2, 0.6) == (1, 0.5, 0.2, 0.6, 0.5, 0.2, 0)

    Raises:
        ValueError: for times that do not decrease strictly from 1 to 0, a ``low`` that is not one of them, ``high``
            outside (low, 1], or repeats < 1.
    """
    check_grid(times)
    check_ends(times)
    if low not in times:
        raise ValueError(f"low must be one of the times {tuple(times)}; got {low}")
    if not low < high <= 1:
        raise ValueError(f"high must lie in (low, 1]; got low {low}, high {high}")
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1; got {repeats}")
    before = [t for t in times if t >= low]
    again = [high, *(t for t in times if low <= t < high)]
    return (*before, *again * repeats, *(t for t in times if t < low))


def check_grid(times: Sequence[float]) -> None:
    """Raise ValueError unless there are two times or more, in [0, 1], that decrease strictly."""
    if len(times) < 2 or not all(0 <= t <= 1 for t in times):
        raise ValueError(f"times must be two or more in [0, 1]; got {tuple(times)}")
    if any(later >= earlier for earlier, later in itertools.pairwise(times)):
        raise ValueError(f"times must decrease strictly; got {tuple(times)}")


def check_ends(times: Sequence[float]) -> None:
    """Raise ValueError unless times run from 1 to 0."""
    if len(times) < 2 or times[0] != 1 or times[-1] != 0:
        raise ValueError(f"times must run from 1 to 0; got {tuple(times)}")


def wide(noise: Tensor) -> torch.dtype:
    """The dtype of the state and of the times: half precision cannot tell 250 times apart."""
    return torch.promote_types(noise.dtype, torch.float32)


def full_times(t: float, noise: Tensor) -> Tensor:
    """(B,) times, all t."""
    return torch.full(noise.shape[:1], t, dtype=wide(noise), device=noise.device)
