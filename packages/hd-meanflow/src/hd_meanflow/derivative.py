"""The total derivative of the mean velocity along the trajectory, by forward AD or by finite differences."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hd_meanflow.checks import is_finite
from hd_meanflow.field import Field, check_interval, check_output, expand_times, select

Method = Literal["jvp", "difference"]
METHODS: tuple[str, ...] = get_args(Method)


def total_derivative(
    field: Field,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    velocity: Tensor,
    *,
    method: Method = "jvp",
    step: float = 5e-3,
    **cond: Any,
) -> Tensor:
    """d/dt u(x_t, r, t) = (v . grad_x) u + du/dt with r fixed [MeanFlow, arXiv 2505.13447, eq. 8].

    The derivative along (v, 1, 0) on (x, t, r). No backward graph is built: the result is detached, and
    neither parameters nor inputs receive a gradient through it.

    Args:
        field: the mean velocity ``u``.
        x_t: state (B, ...).
        t, r: (B,) with 0 <= r <= t <= 1.
        velocity: dx_t/dt, of x_t's shape.
        method: "jvp" is exact, one forward pass with tangents. Inside it attention runs on PyTorch's math path,
            compiled modules run eagerly and GroupNorm gets contiguous inputs, as none of these has a forward
            derivative otherwise. "difference" is a finite difference of second order, two plain forward passes
            (three for samples near the ends of [r, 1]); it works with any operator and compiled modules stay
            compiled, but it divides the field's rounding error by ``step``: meant for float32, noisy in bfloat16.
        step: half width of the central difference, in units of time. Where [t - step, t + step] would leave
            [r, 1], a one-sided formula of the same order is used, with a step that fits.
        cond: passed to the field.

    Returns:
        Tensor of x_t's shape; under "jvp" of the field's output dtype, under "difference" promoted to t's.

    Raises:
        ValueError: for shapes that do not agree, r > t, an unknown method or a step outside (0, 0.25]; under "jvp"
            also for a field that runs on plain tensors alone (an operator without forward derivative), and for an
            output without a tangent (it ignores (x, t) or is cut off by a detach): a silent zero would train
            nothing.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if velocity.shape != x_t.shape:
        raise ValueError(f"velocity must have x_t's shape {tuple(x_t.shape)}; got {tuple(velocity.shape)}")
    expand_times(t, x_t)
    check_interval(t, r)
    with torch.no_grad():
        if method == "jvp":
            derivative = _jvp(field, x_t, t, r, velocity, cond)
        else:
            derivative = _difference(field, x_t, t, r, velocity, step, cond)
    if torch.is_autocast_enabled(x_t.device.type):
        # Casts cached while no graph was recorded could be reused, without one, by the forward that follows.
        torch.clear_autocast_cache()
    return derivative


def _jvp(field: Field, x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor, cond: dict[str, Any]) -> Tensor:
    x, start = x_t.detach(), r.detach()
    with sdpa_kernel(SDPBackend.MATH), _eager(), _ContiguousGroupNorm(), forward_ad.dual_level():
        x_dual = forward_ad.make_dual(x, velocity.detach().to(x.dtype))
        t_dual = forward_ad.make_dual(t.detach(), torch.ones_like(t))
        try:
            output = field(x_dual, t_dual, start, **cond)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Whose fault is it? What fails without tangents too has nothing to do with the derivative.
            field(x, t.detach(), start, **cond)
            cause = str(error).strip().partition("\n")[0]
            raise ValueError(
                f'the field has no forward derivative ({cause}). Use derivative="difference" (here: '
                'method="difference"), or replace the operator at fault'
            ) from error
        tangent: Tensor | None = forward_ad.unpack_dual(check_output(output, x, "the field")).tangent
    if tangent is None:
        raise ValueError(
            "the field's output carries no tangent: it does not depend on (x, t), is detached inside, or runs an "
            'operator without forward derivative. Use derivative="difference" (here: method="difference"), or '
            "replace that operator"
        )
    return tangent


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run whatever is compiled as the plain code behind it: compiled kernels drop tangents without a word."""
    if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
        yield  # nothing is compiled, and importing the compiler to say so would take seconds
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _ContiguousGroupNorm(TorchFunctionMode):
    """PyTorch's forward derivative of GroupNorm fails on inputs that are not contiguous: give it those that are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.functional.group_norm, torch.group_norm):
            args, kwargs = tuple(map(_contiguous, args)), {k: _contiguous(arg) for k, arg in kwargs.items()}
        return func(*args, **kwargs)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _difference(
    field: Field, x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor, step: float, cond: dict[str, Any]
) -> Tensor:
    check_step(step)
    below, above = t - r, 1 - t
    h = torch.minimum(torch.full_like(t, step), torch.maximum(below, above) / 2)
    central = (below >= h) & (above >= h)
    side = torch.where(above >= below, 1.0, -1.0).to(t.dtype)

    def evaluate(offset: Tensor, index: Tensor | None = None) -> Tensor:
        delta = offset * h
        x = (x_t + expand_times(delta, x_t) * velocity).to(x_t.dtype)
        # Where t - h = r but for rounding, t + delta may fall short of r in its last digit.
        times, start, chosen = torch.maximum(t + delta, r), r, cond
        if index is not None:
            x, times, start = x[index], times[index], r[index]
            chosen = select(cond, index, x_t.shape[0])
        return check_output(field(x, times, start, **chosen), x, "the field")

    # Second order in both cases, f' = (f(+h) - f(-h)) / 2h  or  +-(-3 f(0) + 4 f(+-h) - f(+-2h)) / 2h.
    first, second = torch.where(central, 1.0, side), torch.where(central, -1.0, 2 * side)
    first_weight, second_weight = torch.where(central, 0.5, 2 * side), torch.where(central, -0.5, -0.5 * side)
    derivative = expand_times(first_weight, x_t) * evaluate(first)
    derivative = derivative + expand_times(second_weight, x_t) * evaluate(second)
    ends = torch.nonzero(~central)[:, 0]
    if len(ends):
        here = evaluate(torch.zeros_like(t), ends)
        derivative[ends] -= (1.5 * expand_times(side[ends], here) * here).to(derivative.dtype)
    # h = 0 only at r = t = 1, where the identity multiplies the derivative by t - r = 0.
    return derivative / expand_times(h.clamp(min=1e-12), x_t)


def check_step(step: Any) -> None:
    """Raise ValueError unless 0 < step <= 0.25."""
    if not (is_finite(step) and 0 < step <= 0.25):
        raise ValueError(f"step must lie in (0, 0.25]; got {step!r}")
