"""A teacher's samples by the probability-flow ODE: Euler, Heun, and an adaptive Runge-Kutta method."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field
from hd_zoo.sampling.dopri5 import integrate_dopri5
from hd_zoo.sampling.times import check_grid, full_times, uniform_times, wide

METHODS = ("euler", "heun", "dopri5")


@torch.no_grad()
def sample_ode(
    field: Field,
    noise: Tensor,
    steps: int | None = None,
    method: str = "euler",
    *,
    times: Sequence[float] | None = None,
    last_euler: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    **cond: Any,
) -> Tensor:
    """Integrate dx/dt = field(x, t) from t = 1 to t = 0, or along ``times``.

    Args:
        field: an instantaneous velocity field (a teacher).
        noise: (B, ...) standard normal, the state at t = 1 (at ``times[0]``); it is not changed.
        steps: number of equal steps >= 1, for "euler" and "heun".
        method: "euler" (first order, one call a step), "heun" (second order, two calls a step) or "dopri5" (fifth
            order, steps chosen for each sample by ``rtol`` and ``atol``; SiT's default).
        times: in place of ``steps``: two or more decreasing times in [0, 1], such as ``shift_times(uniform_times(50),
            1 / 0.3)``. What it returns is the state at the last of them.
        last_euler: for "heun": the last step is Euler's, so that the field is never asked at t = 0 (EDM, REPA). Of
            N steps, 2 N - 1 calls instead of 2 N.
        rtol, atol: relative and absolute tolerance of "dopri5"; the defaults are SiT's. How many calls it took:
            :func:`hd_zoo.integrate_dopri5`.
        cond: passed to every call.

    Returns:
        Samples of noise's shape and dtype, without gradient. The field sees noise's dtype; times and the
        state between the steps are in float32 or better.

    Raises:
        ValueError: for an unknown method, steps < 1, times that do not decrease strictly in [0, 1], an argument that
            the method does not take, or (dopri5) a field that is not finite or needs steps too small for the dtype.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if last_euler and method != "heun":
        raise ValueError(f"last_euler is for heun; got method {method!r}")
    if method == "dopri5":
        if steps is not None or times is not None:
            raise ValueError(f"dopri5 chooses its own steps: leave out steps and times; got {steps} and {times}")
        return integrate_dopri5(field, noise, rtol=rtol, atol=atol, **cond)[0]
    if (steps is None) == (times is None):
        raise ValueError(f"one of steps and times is needed; got {steps} and {times}")
    if times is None:
        # Times are computed from the index, not accumulated, so that the last one is exactly 0.
        times = uniform_times(steps)  # type: ignore[arg-type]
    check_grid(times)
    x = noise.to(wide(noise))
    for i, (now, after) in enumerate(itertools.pairwise(times)):
        velocity = field(x.to(noise.dtype), full_times(now, noise), **cond)
        if method == "heun" and not (last_euler and i == len(times) - 2):
            ahead = x - (now - after) * velocity
            velocity = (velocity + field(ahead.to(noise.dtype), full_times(after, noise), **cond)) / 2
        x = x - (now - after) * velocity
    return x.to(noise.dtype)
