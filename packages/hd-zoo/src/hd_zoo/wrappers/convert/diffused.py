"""Networks of a variance-preserving diffusion, with any schedule and any prediction, as velocity fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hd_zoo.field import Field, expand_times
from hd_zoo.wrappers.convert.base import Converter
from hd_zoo.wrappers.convert.schedules import alphas_cumprod as named_signals
from hd_zoo.wrappers.convert.schedules import checked_signals

PREDICTIONS = ("epsilon", "v", "sample")
#: Where the field of a network that predicts noise ends, unless told otherwise: its error is multiplied by 1 / (1 - t).
NOISE_T_MAX = 0.995


class DiffusedNoise(Converter):
    """A network of a variance-preserving diffusion (DDPM, arXiv 2006.11239), such as DiT.

    It was shown z_i = sqrt(abar_i) x + sqrt(1 - abar_i) eps at steps i = 0 .. S - 1. Where both have the same ratio
    of noise to data the two paths differ by a factor alone:

        sqrt(1 - abar) / sqrt(abar) = t / (1 - t)       z = x_t / n,  n = sqrt((1 - t)^2 + t^2)
        "epsilon"  v = (eps_hat - x_t) / (1 - t)
        "sample"   v = (x_t - x_hat) / t
        "v"        v = ((2 t - 1) z + v_hat) / n,  v_hat = sqrt(abar) eps - sqrt(1 - abar) x   (arXiv 2202.00512)

    so that an Euler step of the field is a DDIM step (arXiv 2010.02502) of the diffusion. i(t) interpolates
    log(t / (1 - t)) linearly between the steps; in the last interval of a schedule that ends without signal, t itself.
    Before the first step the network is shown i = 0, and "sample" divides by the t of that step. After the last,
    ``t_end`` (0.9937 for DiT), the field is the one at ``t_end``: x_1, pure noise, is taken for the diffusion's last
    state, as its own samplers do. With "epsilon" it ends at ``t_max`` at the latest [ours], as a cosine schedule goes
    on to t = 0.99995, where the network's error is multiplied by 20,000.

    Args:
        network: called with z and i / S (a :class:`hd_zoo.DiffusionTransformer` with ``time_scale`` S).
        steps: S.
        beta_start, beta_end: of the schedule; the defaults are DiT's.
        schedule: "linear", "scaled_linear" or "squaredcos_cap_v2" (:func:`hd_zoo.wrappers.convert.alphas_cumprod`).
        zero_terminal_snr: that schedule without signal at its end.
        alphas_cumprod: abar of every step instead of the five above, falling from below 1 to 0 or above.
        prediction: what the network returns: "epsilon", "v" or "sample".
        t_max: a bound of t_end in (0, 1]; None: 0.995 for "epsilon", 1 for the others.

    Raises:
        ValueError: for an impossible schedule, an unknown prediction, or t_max outside (0, 1].
    """

    def __init__(
        self,
        network: Field,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        *,
        schedule: str = "linear",
        zero_terminal_snr: bool = False,
        alphas_cumprod: Sequence[float] | Tensor | None = None,
        prediction: str = "epsilon",
        t_max: float | None = None,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}; got {prediction!r}")
        if t_max is not None and not 0 < t_max <= 1:
            raise ValueError(f"t_max must lie in (0, 1]; got {t_max}")
        arguments: dict[str, Any] = {}
        if alphas_cumprod is None:
            signal = checked_signals(
                named_signals(schedule, steps, beta_start, beta_end, zero_terminal_snr=zero_terminal_snr)
            )
            arguments |= {"steps": steps, "beta_start": beta_start, "beta_end": beta_end}
        else:
            signal = checked_signals(alphas_cumprod)
            arguments["alphas_cumprod"] = signal.tolist()
        # Files of before know these three at their defaults alone, and have no such entries.
        for name, value, usual in (
            ("schedule", schedule, "linear"),
            ("zero_terminal_snr", zero_terminal_snr, False),
            ("prediction", prediction, "epsilon"),
            ("t_max", t_max, None),
        ):
            if value != usual and not (alphas_cumprod is not None and name in ("schedule", "zero_terminal_snr")):
                arguments[name] = value
        super().__init__(network, **arguments)
        self.steps, self.prediction = len(signal), prediction
        known = signal[signal > 0]
        ratio = ((1 - known) / known).sqrt()
        times = ratio / (1 + ratio)
        self.t_start, self._t_known = times[0].item(), times[-1].item()
        self._ends_without_signal = len(known) < len(signal)
        t_last = 1.0 if self._ends_without_signal else self._t_known
        self.t_end = min(t_last, t_max if t_max is not None else NOISE_T_MAX if prediction == "epsilon" else 1.0)
        # A plain attribute: it follows from the arguments, keeps its precision, and is in no file.
        self._log_ratio = ratio.log()

    def index(self, t: Tensor) -> Tensor:
        """t (B,) -> i (B,) in [0, S - 1], differentiable within the schedule."""
        table, exact = self._log_ratio.to(t.device), t.double()
        known = exact.clamp(max=self._t_known) if self._ends_without_signal else exact
        ratio = (known / (1 - known)).log()
        low = (torch.searchsorted(table, ratio.detach()) - 1).clamp(0, len(table) - 2)
        share = (ratio - table[low]) / (table[low + 1] - table[low])
        index = low + share.clamp(0, 1)
        if self._ends_without_signal:
            index = index + ((exact - self._t_known) / (1 - self._t_known)).clamp(0, 1)
        return index.to(t.dtype)

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        t = t.clamp(max=self.t_end)
        r = None if r is None else torch.minimum(r, t)
        share = self.index(t) / self.steps
        answer = self.answer(self._state(x, t), share, None if r is None else self.index(r) / self.steps, cond)
        return self._velocity(answer, x, t)

    def with_variance(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """The velocity, and what the network says of the reverse step's variance, about [-1, 1]: both of x's shape.

        For :func:`hd_zoo.sample_ancestral`. The network must have ``with_variance`` (AttributeError).
        """
        t = t.clamp(max=self.t_end)
        answer, variance = self.network.with_variance(self._state(x, t), self.index(t) / self.steps, **cond)
        return self._velocity(answer, x, t), variance

    def _state(self, x: Tensor, t: Tensor) -> Tensor:
        """z, what the network was trained on."""
        return x / self._norm(x, t)

    def _norm(self, x: Tensor, t: Tensor) -> Tensor:
        time = expand_times(t, x)
        return ((1 - time) ** 2 + time**2).sqrt().to(x.dtype)

    def _velocity(self, answer: Tensor, x: Tensor, t: Tensor) -> Tensor:
        time = expand_times(t, x)
        if self.prediction == "epsilon":
            return (answer - x) / (1 - time).to(x.dtype)
        if self.prediction == "sample":
            return (x - answer) / time.clamp(min=self.t_start).to(x.dtype)
        norm = self._norm(x, t)
        return ((2 * time - 1).to(x.dtype) * (x / norm) + answer) / norm
