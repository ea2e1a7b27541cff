"""Trajectory distillation: the MeanFlow loss against a teacher's velocity, or from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import torch
from torch import Tensor

from hd_meanflow.checks import check_positive, check_sampler, is_finite
from hd_meanflow.derivative import METHODS, Method, check_step, total_derivative
from hd_meanflow.field import Field, check_interval, check_output, expand_times, select
from hd_meanflow.guidance import MeanFlowGuidance, replace_by_null
from hd_meanflow.path import conditional_velocity, interpolate
from hd_meanflow.times import LogitNormalTimes, TimeSampler


def mean_velocity_target(velocity: Tensor, derivative: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u_tgt = v - (t - r) d/dt u, detached [MeanFlow, arXiv 2505.13447, eq. 10].

    Args:
        velocity: v(x_t, t), shape (B, ...).
        derivative: d/dt u(x_t, r, t) from :func:`total_derivative`, of velocity's shape.
        t, r: (B,) with 0 <= r <= t <= 1.

    Raises:
        ValueError: if the shapes do not agree or r > t.
    """
    if velocity.shape != derivative.shape:
        raise ValueError(
            f"derivative must have velocity's shape {tuple(velocity.shape)}; got {tuple(derivative.shape)}"
        )
    check_interval(t, r)
    return (velocity - expand_times(t - r, velocity) * derivative).detach()


def adaptive_weight(error: Tensor, p: float = 1.0, c: float = 1e-2) -> Tensor:
    """w = 1 / (stopgrad(error) + c)^p [MeanFlow, arXiv 2505.13447, section 4].

    Args:
        error: (B,) squared error, the SUM over each sample's elements - neither its mean nor its root, which
            would make ``p`` mean something else.
        p: 0 is the plain squared error, 1 (default) weighs every sample alike.
        c: > 0, keeps the weight of a fitted sample finite.

    Returns:
        (B,), detached.

    Raises:
        ValueError: if ``error`` has not one dimension or c <= 0.
    """
    if error.ndim != 1:
        raise ValueError(f"error must have shape (B,), the squared error summed per sample; got {tuple(error.shape)}")
    check_positive("c", c)
    return (error.detach() + c) ** -p


@dataclass(frozen=True, kw_only=True)
class MeanFlowOutput:
    """What :class:`MeanFlowLoss` returns. All but ``loss`` is detached."""

    loss: Tensor
    """scalar, at least float32, to call backward on: mean_b w_b ||u - u_tgt||^2_b"""
    squared_error: Tensor
    """(B,), ||u - u_tgt||^2 summed over the sample's elements, before weighting"""
    weight: Tensor
    """(B,), the adaptive weight"""
    derivative_rms: Tensor
    """scalar, root mean square of du/dt over the samples with r != t; 0 where there is none"""
    t: Tensor
    """(B,), the upper times"""
    r: Tensor
    """(B,), the lower times"""


@dataclass(frozen=True, kw_only=True)
class MeanFlowLoss:
    """L_TD = mean_b w_b ||u_theta(x_t, r, t) - u_tgt||^2_b [HD, arXiv 2511.08930; MF, arXiv 2505.13447].

    u_tgt = v - (t - r) d/dt u_theta, detached. With a teacher, v is its velocity at (x_t, t), guidance
    included if the field carries it; without one, v = eps - x and the student is trained from scratch. The
    same v is the derivative's tangent. Samples with r = t are flow matching and need no derivative: it is
    computed for the others alone, without a backward graph; the student's one ordinary forward pass carries
    the gradient (so DDP and FSDP wrappers synchronise as they always do).
    """

    times: TimeSampler = dataclass_field(default_factory=LogitNormalTimes)
    """draws (t, r)"""
    p: float = 1.0
    """power of the adaptive weight, >= 0 and finite"""
    c: float = 1e-2
    """offset of the adaptive weight, > 0 and finite"""
    derivative: Method = "jvp"
    """"jvp" or "difference", see :func:`total_derivative`"""
    step: float = 5e-3
    """half width of the difference, in (0, 0.25]; unused by "jvp\""""

    guidance: MeanFlowGuidance | None = None
    """guidance learnt from scratch, with its dropout of conditions; None: none. Not with a teacher"""

    def __post_init__(self) -> None:
        check_sampler("times", self.times, "sample(batch, generator, device) -> (t, r)")
        if not (is_finite(self.p) and self.p >= 0):
            raise ValueError(f"p must be >= 0 and finite; got {self.p!r}")
        check_positive("c", self.c)
        if self.derivative not in METHODS:
            raise ValueError(f"derivative must be one of {', '.join(METHODS)}; got {self.derivative!r}")
        check_step(self.step)
        if not isinstance(self.guidance, MeanFlowGuidance | None):
            raise ValueError(f"guidance must be a MeanFlowGuidance or None; got {self.guidance!r}")

    def __call__(
        self,
        student: Field,
        x: Tensor,
        noise: Tensor,
        *,
        teacher: Field | None = None,
        null: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        **cond: Any,
    ) -> MeanFlowOutput:
        """Loss and diagnostics of one batch.

        Args:
            student: the mean velocity u_theta; gradients flow through its one ordinary forward pass alone.
            x: data (B, ...).
            noise: standard normal of x's shape.
            teacher: frozen velocity field; called without gradient. None: from scratch.
            null: with ``guidance``: for each condition that guides, what stands for "none" in it, a number or a
                tensor that broadcasts to the condition: ``null={"labels": 10}``.
            generator: for the times, then for the dropout of conditions; draws on its own device.
            cond: conditions, passed to both fields (one entry per sample where the first dimension is B).

        Raises:
            ValueError: if shapes do not agree, a field returns another shape than x's, or ``guidance`` meets a
                teacher or no ``null``.
        """
        batch = x.shape[0]
        self._check_null(teacher, null)
        t, r = self.times.sample(batch, generator, x.device)
        # Times and errors stay in float32 or better, whatever the data is in.
        precise = torch.promote_types(x.dtype, torch.float32)
        t, r = t.to(precise), r.to(precise)
        x_t = interpolate(x, noise, t).to(x.dtype)
        if teacher is None:
            velocity = conditional_velocity(x.to(precise), noise.to(precise))
            if self.guidance is not None and null is not None:
                dropped = self.guidance.drop(batch, generator, x.device)
                nothing = replace_by_null(cond, null)
                guided = self.guidance.velocity(student, x_t, t, velocity, cond, nothing)
                velocity = torch.where(expand_times(dropped, x), velocity, guided)
                cond = replace_by_null(cond, null, dropped)
        else:
            with torch.no_grad():
                velocity = check_output(teacher(x_t, t, **cond), x, "the teacher")
            if torch.is_autocast_enabled(x.device.type):
                # The teacher may share weights with the student: see the note in derivative.py.
                torch.clear_autocast_cache()
        velocity = velocity.to(precise)
        target, derivative_rms = velocity, velocity.new_zeros(())
        r_below_t = torch.nonzero(r != t)[:, 0]
        if len(r_below_t):
            derivative = total_derivative(
                student,
                x_t[r_below_t],
                t[r_below_t],
                r[r_below_t],
                velocity[r_below_t],
                method=self.derivative,
                step=self.step,
                **select(cond, r_below_t, batch),
            ).to(precise)
            derivative_rms = derivative.square().mean().sqrt()
            target = target.index_copy(
                0, r_below_t, mean_velocity_target(velocity[r_below_t], derivative, t[r_below_t], r[r_below_t])
            )
        u = check_output(student(x_t, t, r, **cond), x, "the student")
        error = (u.to(precise) - target.detach()).square().flatten(1).sum(dim=1)
        weight = adaptive_weight(error, self.p, self.c)
        return MeanFlowOutput(
            loss=(weight * error).mean(),
            squared_error=error.detach(),
            weight=weight,
            derivative_rms=derivative_rms,
            t=t,
            r=r,
        )

    def _check_null(self, teacher: Field | None, null: Mapping[str, Any] | None) -> None:
        if self.guidance is None:
            if null is not None:
                raise ValueError("null is read with guidance only: set MeanFlowLoss(guidance=), or leave null out")
        elif teacher is not None:
            raise ValueError("guidance trains from scratch: leave teacher out, or guide the teacher itself instead")
        elif not null:
            raise ValueError('guidance needs null, what stands for "no condition": e.g. null={"labels": 10}')
