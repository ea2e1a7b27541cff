"""Converters at the door: other predictions and the other time direction, made into a velocity field of ours.

All on the linear path x_t = (1 - t) x + t eps with t = 0 data and t = 1 noise.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hd_zoo.field import Field, expand_times


class ReversedTime(nn.Module):
    """v(x, t) = -field(x, 1 - t): for SiT and LightningDiT checkpoints, whose t = 0 is noise.

    A mean velocity over [r, t] becomes the other field's from 1 - t to 1 - r: as here, the state's own time
    comes first and the time to jump to second, ``field(x, 1 - t, 1 - r)``.
    """

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        if r is None:
            return -self.field(x, 1 - t, **cond)
        return -self.field(x, 1 - t, 1 - r, **cond)


class DataPrediction(nn.Module):
    """v = (x_t - x_hat) / t for a network that predicts the clean sample ``x_hat(x_t, t)``; r is ignored.

    The quotient is ill-conditioned as t tends to 0; t is kept >= ``t_min`` in the denominator.
    """

    def __init__(self, network: Field, t_min: float = 1e-3) -> None:
        super().__init__()
        if not 0 < t_min < 1:
            raise ValueError(f"t_min must lie in (0, 1); got {t_min}")
        self.network, self.t_min = network, t_min

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        return (x - self.network(x, t, **cond)) / expand_times(t, x).clamp(min=self.t_min)


class NoisePrediction(nn.Module):
    """v = (eps_hat - x_t) / (1 - t) for a network that predicts the linear path's noise ``eps_hat(x_t, t)``.

    r is ignored. The quotient is ill-conditioned as t tends to 1; 1 - t is kept >= ``gap`` in the
    denominator.
    """

    def __init__(self, network: Field, gap: float = 1e-3) -> None:
        super().__init__()
        if not 0 < gap < 1:
            raise ValueError(f"gap must lie in (0, 1); got {gap}")
        self.network, self.gap = network, gap

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        return (self.network(x, t, **cond) - x) / (1 - expand_times(t, x)).clamp(min=self.gap)
