"""The embedded Runge-Kutta pair 5(4) of Dormand and Prince (1980), with a step size for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field, expand_times
from hd_zoo.sampling.times import full_times, wide

#: Nodes, stages and error weights of the pair. The last stage is the solution of order five, and the next step's first.
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
#: Order five less order four.
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

#: Step control, as usual (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4).
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0


@torch.no_grad()
def integrate_dopri5(
    field: Field, noise: Tensor, *, rtol: float = 1e-3, atol: float = 1e-6, max_calls: int = 10_000, **cond: Any
) -> tuple[Tensor, int]:
    """Integrate dx/dt = field(x, t) from t = 1 to t = 0; each sample takes the steps that its own error asks for.

    A step is kept where the root mean square over the sample's elements of error / (atol + rtol |x|) is below 1. So a
    sample does not depend on the others of its batch (an integrator that takes the batch for one state does not have
    that). The batch is called as a whole until its slowest sample has arrived.

    Args:
        field: an instantaneous velocity field (a teacher).
        noise: (B, ...) the state at t = 1; it is not changed.
        rtol, atol: relative and absolute tolerance.
        max_calls: when to give up.
        cond: passed to every call.

    Returns:
        (samples, calls): samples of noise's shape and dtype, without gradient, and how often the field was called:
        2 + 6 per step, rejected steps included, of the slowest sample.

    Raises:
        ValueError: for tolerances that are not positive, a field that is not finite, or tolerances that cannot be met
            in this dtype or with so many calls.
    """
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol and atol must be > 0; got {rtol} and {atol}")
    calls = 0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return field(x.to(noise.dtype), t, **cond).to(x.dtype)

    x, t = noise.to(wide(noise)), full_times(1.0, noise)
    first = velocity(x, t)
    step = _first_step(velocity, x, t, first, rtol, atol)
    rejected = torch.zeros_like(t, dtype=torch.bool)
    smallest = 10 * torch.finfo(t.dtype).eps
    while (active := t > 0).any():
        step = torch.minimum(step, t)
        ahead, last, error = _step(velocity, x, t, step, first)
        size = _rms(error / (atol + rtol * torch.maximum(x.abs(), ahead.abs())))
        if not torch.isfinite(size[active]).all():
            raise ValueError(f"the field is not finite between t = {t[active].max().item():.4g} and 0")
        kept = active & (size < 1)
        factor = SAFETY * size.clamp(min=1e-12) ** -0.2
        x, first = (torch.where(expand_times(kept, x), new, old) for new, old in ((ahead, x), (last, first)))
        t = torch.where(kept, t - step, t)
        # After a rejection the step does not grow at once.
        step = step * torch.where(
            kept, factor.clamp(max=GROW).where(~rejected, factor.clamp(max=1)), factor.clamp(SHRINK)
        )
        rejected = active & ~kept
        if (step < smallest)[rejected].any() or (calls > max_calls - 6 and (t > 0).any()):
            raise ValueError(
                f"dopri5 cannot meet rtol {rtol} and atol {atol} in {noise.dtype} with {max_calls} calls; "
                f"it stands at t = {t.max().item():.4g}: take larger tolerances, or Heun's method"
            )
    return x.to(noise.dtype), calls


def _step(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, step: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(state after the step, velocity there, error) of one step from t to t - step."""
    slopes, size, ahead = [first], expand_times(step, x), x
    for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
        ahead = x - size * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        slopes.append(velocity(ahead, (t - node * step).clamp(min=0)))
    error: Tensor = size * sum(weight * slope for weight, slope in zip(ERROR, slopes, strict=True))
    return ahead, slopes[-1], error


def _first_step(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, first: Tensor, rtol: float, atol: float
) -> Tensor:
    """(B,) a first step from the sizes of state, velocity and its change over a trial step; one call."""
    scale = atol + rtol * x.abs()
    state, slope = _rms(x / scale), _rms(first / scale)
    trial = torch.where((state < 1e-5) | (slope < 1e-5), torch.full_like(t, 1e-6), 0.01 * state / slope).clamp(max=1)
    change = _rms((velocity(x - expand_times(trial, x) * first, t - trial) - first) / scale) / trial
    largest = torch.maximum(slope, change)
    steady = (1e-3 * trial).clamp(min=1e-6)
    step = torch.where(largest <= 1e-15, steady, (0.01 / largest.clamp(min=1e-15)) ** 0.2)
    return torch.minimum(100 * trial, step).clamp(max=1)


def _rms(x: Tensor) -> Tensor:
    """(B,) root mean square over each sample's elements."""
    return x.flatten(1).square().mean(dim=1).sqrt()
