"""The linear path between data (t = 0) and noise (t = 1), and the jump along it."""

from __future__ import annotations

from torch import Tensor

from hd_meanflow.field import check_interval, expand_times


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t eps [MeanFlow, arXiv 2505.13447].

    Args:
        x: data (B, ...).
        noise: standard normal of x's shape.
        t: (B,) in [0, 1].

    Raises:
        ValueError: if the shapes do not agree.
    """
    _check_pair(x, noise)
    t = expand_times(t, x)
    return (1 - t) * x + t * noise


def conditional_velocity(x: Tensor, noise: Tensor) -> Tensor:
    """dx_t/dt = eps - x, of x's shape: the velocity of the one straight line from x to eps."""
    _check_pair(x, noise)
    return noise - x


def jump(x_t: Tensor, u: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r = x_t - (t - r) u(x_t, r, t); with t = 1, r = 0 this is one-step sampling.

    Args:
        x_t: state (B, ...) at time t.
        u: mean velocity over [r, t], of x_t's shape.
        t, r: (B,) with 0 <= r <= t <= 1.

    Raises:
        ValueError: if the shapes do not agree or r > t.
    """
    if x_t.shape != u.shape:
        raise ValueError(f"u must have x_t's shape {tuple(x_t.shape)}; got {tuple(u.shape)}")
    check_interval(t, r)
    return x_t - expand_times(t - r, x_t) * u


def _check_pair(x: Tensor, noise: Tensor) -> None:
    if x.shape != noise.shape:
        raise ValueError(f"noise must have x's shape {tuple(x.shape)}; got {tuple(noise.shape)}")
