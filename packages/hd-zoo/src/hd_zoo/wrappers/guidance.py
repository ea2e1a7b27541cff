"""Classifier-free guidance (arXiv 2207.12598) as a field around a field."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field, expand_times
from hd_zoo.wrappers.wrapper import Wrapper


class Guidance(Wrapper):
    """``v_u + scale (v_c - v_u)`` for times inside ``guidance_interval``, ``v_c`` outside it.

    It is a full teacher: it has the ``sample_shape``, ``classes``, ``null_label`` and ``takes_r`` of its ``field``.

    Args:
        field: the conditional field. Where it is a module, its parameters are this module's too.
        scale: guidance scale w >= 0; 1 is the conditional field itself and costs one call instead of two.
        guidance_interval: (low, high) in [0, 1] of the times at which guidance is on (arXiv 2404.07724).
        null: for each condition the value that stands for "none": ``null={"labels": 10}``, or a tensor that
            broadcasts to the condition (an empty text's embedding). Other conditions go unchanged to both
            calls.
        channels: guide the first ``channels`` channels alone; the others stay ``v_c``. None guides all. The official
            code of DiT, SiT and LightningDiT guides three, so its scales mean this package's with ``channels=3``.

    Raises:
        ValueError: for a negative scale, a guidance_interval outside [0, 1], channels < 1, or (when called) a null
            condition that the call did not pass, or fewer channels than ``channels``.
    """

    inside = "field"

    def __init__(
        self,
        field: Field,
        scale: float,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        *,
        null: dict[str, Any],
        channels: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale must be >= 0 and finite; got {scale}")
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must satisfy 0 <= low <= high <= 1; got {guidance_interval}")
        if not null:
            raise ValueError('null must name at least one condition and its empty value, e.g. {"labels": 10}')
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be >= 1, or None for all; got {channels}")
        self.field = field
        self.scale, self.null, self.channels = float(scale), dict(null), channels
        self.guidance_interval = (float(low), float(high))

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        """Shapes as in :class:`hd_zoo.Field`. Conditional and unconditional parts run as one batch of 2 B."""
        self._check(x, cond)
        if self.scale == 1:
            return self._ask(x, t, r, cond)
        both = self._ask(*self._doubled(x, t, r), self._doubled_conditions(cond))
        return self._guided(both, t)

    def _ask(self, x: Tensor, t: Tensor, r: Tensor | None, cond: dict[str, Any]) -> Tensor:
        """The field's answer. It is not shown an r that was not given: a teacher need not have the argument."""
        return self.field(x, t, **cond) if r is None else self.field(x, t, r, **cond)

    def with_variance(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """As ``field.with_variance``: the guided velocity, and the conditional part's variance."""
        self._check(x, cond)
        field: Any = self.field
        if self.scale == 1:
            velocity, variance = field.with_variance(x, t, **cond)
            return velocity, variance
        x_both, t_both, _ = self._doubled(x, t, None)
        both, variance = field.with_variance(x_both, t_both, **self._doubled_conditions(cond))
        return self._guided(both, t), variance.chunk(2)[0]

    def _check(self, x: Tensor, cond: dict[str, Any]) -> None:
        missing = [name for name in self.null if cond.get(name) is None]
        if missing:
            raise ValueError(f"guidance needs the condition(s) {', '.join(missing)} at every call")
        if self.channels is not None and (x.ndim < 2 or self.channels > x.shape[1]):
            raise ValueError(f"channels must be at most those of x; got {self.channels} for x {tuple(x.shape)}")

    def _guided(self, both: Tensor, t: Tensor) -> Tensor:
        """(2 B, ...) conditional and unconditional answers -> (B, ...)."""
        conditional, unconditional = both.chunk(2)
        inside = (t >= self.guidance_interval[0]) & (t <= self.guidance_interval[1])
        guided = torch.where(
            expand_times(inside, conditional), unconditional + self.scale * (conditional - unconditional), conditional
        )
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)

    def _doubled(self, x: Tensor, t: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return torch.cat([x, x]), torch.cat([t, t]), None if r is None else torch.cat([r, r])

    def _doubled_conditions(self, cond: dict[str, Any]) -> dict[str, Any]:
        return {name: self._with_null(name, value) for name, value in cond.items()}

    def _with_null(self, name: str, value: Any) -> Any:
        """A condition for 2 B samples: as it is, then (if it is guided by) as "none"."""
        if not isinstance(value, Tensor):
            return value
        if name not in self.null:
            return torch.cat([value, value])
        null = self.null[name]
        empty = null.to(value).expand_as(value) if isinstance(null, Tensor) else torch.full_like(value, null)
        return torch.cat([value, empty])
