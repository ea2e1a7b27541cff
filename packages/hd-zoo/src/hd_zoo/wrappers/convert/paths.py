"""Converters of networks on the linear path or on EDM's: other predictions, other time directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field, expand_times
from hd_zoo.wrappers.convert.base import Converter


class ReversedTime(Converter):
    """v(x, t) = -network(x, 1 - t): for networks whose t = 0 is noise and whose velocity points to data.

    A mean velocity over [r, t] becomes the other field's from 1 - t to 1 - r: as here, the state's own time
    comes first and the time to jump to second, ``network(x, 1 - t, 1 - r)``. SiT and LightningDiT weights of this
    package need no such converter: their networks have it as a setting, ``reversed_time``.
    """

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        return -self.answer(x, 1 - t, None if r is None else 1 - r, cond)


class DataPrediction(Converter):
    """v = (x_t - x_hat) / t for a network that predicts the clean sample ``x_hat(x_t, t)`` of the linear path.

    The quotient is ill-conditioned as t tends to 0; t is kept >= ``t_min`` in the denominator.
    """

    def __init__(self, network: Field, t_min: float = 1e-3) -> None:
        super().__init__(network, t_min=t_min)
        if not 0 < t_min < 1:
            raise ValueError(f"t_min must lie in (0, 1); got {t_min}")
        self.t_min = t_min

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        return (x - self.answer(x, t, r, cond)) / expand_times(t, x).clamp(min=self.t_min)


class NoisePrediction(Converter):
    """v = (eps_hat - x_t) / (1 - t) for a network that predicts the noise ``eps_hat(x_t, t)`` of the linear path.

    The quotient is ill-conditioned as t tends to 1; 1 - t is kept >= ``gap`` in the denominator.
    """

    def __init__(self, network: Field, gap: float = 1e-3) -> None:
        super().__init__(network, gap=gap)
        if not 0 < gap < 1:
            raise ValueError(f"gap must lie in (0, 1); got {gap}")
        self.gap = gap

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        return (self.answer(x, t, r, cond) - x) / (1 - expand_times(t, x)).clamp(min=self.gap)


class EDMDenoiser(Converter):
    """A denoiser D(y, sigma) of y = x + sigma eps (EDM, arXiv 2206.00364).

        sigma = t / (1 - t)       y = x_t / (1 - t)       v = (x_t - D(y, sigma)) / t

    Past ``sigma_max`` the field is the one at t_end = sigma_max / (1 + sigma_max), with x_t taken for the state there.

    Args:
        network: D, or with ``sigma_data`` the network F inside of it: D = c_skip y + c_out F(c_in y, ln(sigma) / 4)
            with EDM's table 1.
        sigma_data: of the data, for F; None for D itself, called with sigma.
        sigma_max: the largest noise level that it was trained on.
        t_min: what t is kept above in the denominator.

    Raises:
        ValueError: for settings that are not positive.
    """

    def __init__(
        self, network: Field, sigma_data: float | None = None, sigma_max: float = 80.0, t_min: float = 1e-3
    ) -> None:
        super().__init__(network, sigma_data=sigma_data, sigma_max=sigma_max, t_min=t_min)
        if not (sigma_data is None or sigma_data > 0) or not sigma_max > 0 or not 0 < t_min < 1:
            given = f"{sigma_data}, {sigma_max} and {t_min}"
            raise ValueError(f"sigma_data and sigma_max must be > 0 and t_min lie in (0, 1); got {given}")
        self.sigma_data, self.t_min, self.t_end = sigma_data, t_min, sigma_max / (1 + sigma_max)

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        t = t.clamp(max=self.t_end)
        time = expand_times(t, x)
        y = x / (1 - time)
        target = None if r is None else torch.minimum(r, t)
        sigma, target = t / (1 - t), None if target is None else target / (1 - target)
        return (x - self._denoise(y, sigma, target, cond)) / time.clamp(min=self.t_min)

    def _denoise(self, y: Tensor, sigma: Tensor, target: Tensor | None, cond: dict[str, Any]) -> Tensor:
        if self.sigma_data is None:
            return self.answer(y, sigma, target, cond)
        level, data = expand_times(sigma, y), self.sigma_data
        total = level**2 + data**2
        target = None if target is None else _log_level(target)
        inner = self.answer(y / total.sqrt(), _log_level(sigma), target, cond)
        return data**2 / total * y + level * data / total.sqrt() * inner


def _log_level(sigma: Tensor) -> Tensor:
    """EDM's c_noise, finite at sigma = 0."""
    return sigma.clamp(min=1e-8).log() / 4
