"""Classifier-free guidance (arXiv 2207.12598) as a field around a field."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hd_zoo.field import Field, expand_times


class Guidance(nn.Module):
    """``v_u + scale (v_c - v_u)`` for times inside ``guidance_interval``, ``v_c`` outside it.

    Args:
        field: the conditional field. Where it is a module, its parameters are this module's too.
        scale: guidance scale w >= 0; 1 is the conditional field itself and costs one call instead of two.
        guidance_interval: (low, high) in [0, 1] of the times at which guidance is on (arXiv 2404.07724).
        null: for each condition the value that stands for "none": ``null={"labels": 10}``, or a tensor that
            broadcasts to the condition (an empty text's embedding). Other conditions go unchanged to both
            calls.

    Raises:
        ValueError: for a negative scale, a guidance_interval outside [0, 1], or (when called) a null condition that
            the call did not pass.
    """

    def __init__(
        self,
        field: Field,
        scale: float,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        *,
        null: dict[str, Any],
    ) -> None:
        super().__init__()
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale must be >= 0 and finite; got {scale}")
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must satisfy 0 <= low <= high <= 1; got {guidance_interval}")
        if not null:
            raise ValueError('null must name at least one condition and its empty value, e.g. {"labels": 10}')
        self.field = field
        self.scale, self.null = float(scale), dict(null)
        self.guidance_interval = (float(low), float(high))

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        """Shapes as in :class:`hd_zoo.Field`. Conditional and unconditional parts run as one batch of 2 B."""
        missing = [name for name in self.null if cond.get(name) is None]
        if missing:
            raise ValueError(f"guidance needs the condition(s) {', '.join(missing)} at every call")
        if self.scale == 1:
            return self.field(x, t, r, **cond)
        doubled = {name: self._with_null(name, value) for name, value in cond.items()}
        both = self.field(torch.cat([x, x]), torch.cat([t, t]), None if r is None else torch.cat([r, r]), **doubled)
        conditional, unconditional = both.chunk(2)
        inside = (t >= self.guidance_interval[0]) & (t <= self.guidance_interval[1])
        guided = unconditional + self.scale * (conditional - unconditional)
        return torch.where(expand_times(inside, x), guided, conditional)

    def _with_null(self, name: str, value: Any) -> Any:
        """A condition for 2 B samples: as it is, then (if it is guided by) as "none"."""
        if not isinstance(value, Tensor):
            return value
        if name not in self.null:
            return torch.cat([value, value])
        null = self.null[name]
        empty = null.to(value).expand_as(value) if isinstance(null, Tensor) else torch.full_like(value, null)
        return torch.cat([value, empty])
