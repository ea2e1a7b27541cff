"""Converters at the door: other predictions, noise schedules and time directions, made into our velocity field.

Ours is the linear path x_t = (1 - t) x + t eps with t = 0 data and t = 1 noise, v = eps - x. A converter shows the
network what it was trained on and turns its answer into v. Time r goes through the same clock as t to a network that
says ``takes_r = True`` (a student of :func:`hd_zoo.to_student`, which starts as the teacher behind the same converter);
one that says ``takes_r = False`` ignores r and is not shown it; one that says neither cannot be called with r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field, expand_times
from hd_zoo.wrapper import Wrapper, call_network


class Converter(Wrapper):
    """A network and how to read it; ``arguments`` are what :func:`hd_zoo.save_pretrained` keeps of the latter.

    It is a full teacher: it has the ``sample_shape``, ``classes``, ``null_label`` and ``takes_r`` of the network, which
    is its ``network``: layer ``blocks.1`` of that is ``network.blocks.1`` here (:func:`hd_zoo.layer_name`).
    """

    inside = "network"
    network: Any

    def __init__(self, network: Field, **arguments: Any) -> None:
        super().__init__()
        self.network = network
        self.arguments = arguments

    def answer(self, x: Tensor, t: Tensor, r: Tensor | None, cond: dict[str, Any]) -> Tensor:
        """The network's, with r if it takes one."""
        return call_network(self.network, x, t, r, cond)


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


class DiffusedNoise(Converter):
    """A network that predicts the noise of a variance-preserving diffusion (DDPM, arXiv 2006.11239), as DiT does.

    It was shown z_i = sqrt(abar_i) x + sqrt(1 - abar_i) eps at steps i = 0 .. S - 1. Where both have the same ratio
    of noise to data the two paths differ by a factor alone:

        sqrt(1 - abar) / sqrt(abar) = t / (1 - t)       z = x_t / n,  n = sqrt((1 - t)^2 + t^2)
        v = (eps_hat - x_t) / (1 - t)

    i(t) interpolates log(t / (1 - t)) linearly between the steps. The schedule begins and ends within (0, 1): before
    its first step the network is shown i = 0. After the last, ``t_end`` (0.9937 for DiT), where data is weighed by
    less than a hundredth, the field is the one at ``t_end``: x_1, pure noise, is taken for the diffusion's last
    state, as its own samplers do.

    Args:
        network: called with z and i / S (a :class:`hd_zoo.DiffusionTransformer` with ``time_scale`` S).
        steps: S.
        beta_start, beta_end: of the linear schedule of beta; DiT's are the defaults.

    Raises:
        ValueError: for steps < 2 or betas outside 0 < beta_start <= beta_end < 1.
    """

    def __init__(self, network: Field, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> None:
        super().__init__(network, steps=steps, beta_start=beta_start, beta_end=beta_end)
        if steps < 2 or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"steps must be >= 2 and 0 < beta_start <= beta_end < 1; got {steps}, {beta_start} and {beta_end}"
            )
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        signal = torch.cumprod(1 - betas, dim=0)
        ratio = ((1 - signal) / signal).sqrt()
        self.steps, self.t_end = steps, (ratio[-1] / (1 + ratio[-1])).item()
        # A plain attribute: it follows from the arguments, keeps its precision, and is in no file.
        self._log_ratio = ratio.log()

    def index(self, t: Tensor) -> Tensor:
        """t (B,) -> i (B,) in [0, S - 1], differentiable within the schedule."""
        table = self._log_ratio.to(t.device)
        ratio = (t.double() / (1 - t.double())).log()
        low = (torch.searchsorted(table, ratio.detach()) - 1).clamp(0, self.steps - 2)
        share = (ratio - table[low]) / (table[low + 1] - table[low])
        return (low + share.clamp(0, 1)).to(t.dtype)

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        t = t.clamp(max=self.t_end)
        r = None if r is None else torch.minimum(r, t)
        share = self.index(t) / self.steps
        noise = self.answer(self._state(x, t), share, None if r is None else self.index(r) / self.steps, cond)
        return self._velocity(noise, x, t)

    def with_variance(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """The velocity, and what the network says of the reverse step's variance, about [-1, 1]: both of x's shape.

        For :func:`hd_zoo.sample_ancestral`. The network must have ``with_variance`` (AttributeError).
        """
        t = t.clamp(max=self.t_end)
        noise, variance = self.network.with_variance(self._state(x, t), self.index(t) / self.steps, **cond)
        return self._velocity(noise, x, t), variance

    def _state(self, x: Tensor, t: Tensor) -> Tensor:
        """z, what the network was trained on."""
        time = expand_times(t, x)
        return x / ((1 - time) ** 2 + time**2).sqrt().to(x.dtype)

    def _velocity(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (noise - x) / (1 - expand_times(t, x)).to(x.dtype)


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


#: What a ``config.json`` may name; nothing else is ever constructed from a file.
CONVERTERS: dict[str, type[Converter]] = {
    "reversed_time": ReversedTime,
    "data_prediction": DataPrediction,
    "noise_prediction": NoisePrediction,
    "diffused_noise": DiffusedNoise,
    "edm_denoiser": EDMDenoiser,
}
