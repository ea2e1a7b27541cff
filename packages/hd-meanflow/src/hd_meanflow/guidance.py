"""Guidance for training from scratch: MeanFlow's mixture (omega, kappa) and the dropout of conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hd_meanflow.checks import check_positive, is_finite
from hd_meanflow.field import Field, check_output, expand_times


def guidance_mixture(velocity: Tensor, u_cond: Tensor, u_null: Tensor, omega: float, kappa: float) -> Tensor:
    """omega (eps - x) + kappa u(x_t, t, t | c) + (1 - omega - kappa) u(x_t, t, t | null), detached.

    [MeanFlow, arXiv 2505.13447, appendix on improved guidance; kappa = 0 is the mixture of its section 4.2.]
    Where u has learnt it, the mean of this target is v_null + w (v_c - v_null) with w = omega / (1 - kappa).

    Args:
        velocity: eps - x, shape (B, ...).
        u_cond, u_null: the student's own velocities with and without its condition, of velocity's shape.
        omega: weight of eps - x.
        kappa: weight of u_cond.

    Raises:
        ValueError: if the shapes do not agree.
    """
    for name, value in (("u_cond", u_cond), ("u_null", u_null)):
        if value.shape != velocity.shape:
            raise ValueError(f"{name} must have velocity's shape {tuple(velocity.shape)}; got {tuple(value.shape)}")
    return (omega * velocity + kappa * u_cond + (1 - omega - kappa) * u_null).detach()


@dataclass(frozen=True, kw_only=True)
class MeanFlowGuidance:
    """Guidance learnt by the student itself, while it trains from scratch [MeanFlow, arXiv 2505.13447].

    Its one-step samples are then guided at the price of one call. The mixture needs eps - x, so it cannot be written
    as a teacher; with a teacher, guide the teacher instead. Samples without a condition (dropped), and those with
    t outside ``guidance_interval``, keep eps - x [ours].

    It costs up to two forward passes of the student over the whole batch, without gradient: one with the condition
    (none if kappa = 0) and one without it (none if omega + kappa = 1).
    """

    omega: float = 1.0
    """weight of eps - x, > 0 and finite"""
    kappa: float = 0.5
    """weight of the student's own conditional velocity, in [0, 1); the guidance scale is omega / (1 - kappa)"""
    dropout: float = 0.1
    """probability that a sample loses its condition, in [0, 1): how the student learns the field without it"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """(low, high) with 0 <= low <= high <= 1: times t at which guidance is on"""

    def __post_init__(self) -> None:
        check_positive("omega", self.omega)
        for name in ("kappa", "dropout"):
            value = getattr(self, name)
            if not (is_finite(value) and 0 <= value < 1):
                raise ValueError(f"{name} must lie in [0, 1); got {value!r}")
        ends = self.guidance_interval
        pair = isinstance(ends, tuple | list) and len(ends) == 2 and all(map(is_finite, ends))
        if not pair or not 0 <= ends[0] <= ends[1] <= 1:
            raise ValueError(f"guidance_interval must be (low, high) with 0 <= low <= high <= 1; got {ends!r}")

    @property
    def scale(self) -> float:
        """The guidance scale w = omega / (1 - kappa) that the student learns."""
        return self.omega / (1 - self.kappa)

    def drop(self, batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Which samples lose their condition: bool (batch,), a coin for each, drawn on the generator's device."""
        where = device if generator is None else generator.device
        return (torch.rand(batch, generator=generator, device=where) < self.dropout).to(device)

    def velocity(
        self, student: Field, x_t: Tensor, t: Tensor, velocity: Tensor, cond: dict[str, Any], null: dict[str, Any]
    ) -> Tensor:
        """The mixture inside ``guidance_interval`` and ``velocity`` outside it, detached, of velocity's shape.

        Args:
            student: asked at r = t, without gradient.
            x_t: state (B, ...), in the student's dtype.
            t: (B,).
            velocity: eps - x; the result has its dtype.
            cond: the conditions.
            null: all conditions with nothing in place of those that guide, from :func:`replace_by_null`.
        """

        def ask(conditions: dict[str, Any]) -> Tensor:
            return check_output(student(x_t, t, t, **conditions), x_t, "the student").to(velocity.dtype)

        with torch.no_grad():
            u_cond = ask(cond) if self.kappa else velocity
            u_null = velocity if math.isclose(self.omega + self.kappa, 1) else ask(null)
        if torch.is_autocast_enabled(x_t.device.type):
            # Casts cached without a graph would be reused by the student's own forward pass.
            torch.clear_autocast_cache()
        low, high = self.guidance_interval
        inside = expand_times((t >= low) & (t <= high), velocity)
        return torch.where(inside, guidance_mixture(velocity, u_cond, u_null, self.omega, self.kappa), velocity)


def replace_by_null(cond: dict[str, Any], null: Mapping[str, Any], where: Tensor | None = None) -> dict[str, Any]:
    """``cond`` with ``null[name]`` in place of each condition it names: for all samples, or those of a mask (B,).

    Args:
        cond: the conditions of a call, a tensor with the batch first under each name of ``null``.
        null: what stands for "none": a number, or a tensor that broadcasts to the condition.
        where: bool (B,); None: everywhere.

    Raises:
        ValueError: for a name in ``null`` that ``cond`` lacks, or a condition that is no tensor.
    """
    replaced = dict(cond)
    for name, nothing in null.items():
        value = cond.get(name)
        if not isinstance(value, Tensor):
            given = ", ".join(cond) or "none"
            raise ValueError(f"null names {name!r}, which must be a tensor among the conditions; got {given}")
        empty = nothing.to(value).expand_as(value) if isinstance(nothing, Tensor) else torch.full_like(value, nothing)
        replaced[name] = empty if where is None else torch.where(expand_times(where, value), empty, value)
    return replaced
