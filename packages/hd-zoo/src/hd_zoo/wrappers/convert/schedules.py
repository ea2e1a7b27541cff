"""The schedules of a variance-preserving diffusion by their usual names: abar of every step."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

#: "linear" in beta (DDPM, arXiv 2006.11239), "scaled_linear" in its root (latent diffusion, arXiv 2112.10752), and
#: the cosine of arXiv 2102.09672, equation 17, by the name that diffusers has for it.
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def alphas_cumprod(
    schedule: str = "linear",
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    *,
    zero_terminal_snr: bool = False,
) -> list[float]:
    """abar_i = prod_{j <= i} (1 - beta_j) for i = 0 .. steps - 1: the share of data's variance that is left.

    Args:
        schedule: one of :data:`SCHEDULES`. The cosine takes no betas; its own are at most 0.999.
        steps: S, >= 2.
        beta_start, beta_end: betas of the first and the last step.
        zero_terminal_snr: shift and scale sqrt(abar) so that the last is 0 and the first stays (arXiv 2305.08891,
            algorithm 1).

    Raises:
        ValueError: for an unknown schedule, steps < 2, or betas outside 0 < beta_start <= beta_end < 1.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if steps < 2 or not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"steps must be >= 2 and 0 < beta_start <= beta_end < 1; got {steps}, {beta_start} and {beta_end}"
        )
    if schedule == "squaredcos_cap_v2":
        left = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        pairs = itertools.pairwise(left)
        betas = torch.tensor([min(1 - after / before, 0.999) for before, after in pairs], dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    signal = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        signal = without_terminal_signal(signal)
    found: list[float] = signal.tolist()
    return found


def without_terminal_signal(signal: Tensor) -> Tensor:
    """abar (S,) with sqrt(abar) shifted and scaled: the last is 0, the first as before (arXiv 2305.08891)."""
    root = signal.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def checked_signals(signals: object) -> Tensor:
    """abar as a float64 tensor.

    Raises:
        ValueError: unless they are two numbers or more that fall from below 1 to 0 or above.
    """
    accepted = "alphas_cumprod must be at least two numbers that fall, from below 1 to 0 or above"
    try:
        found = torch.as_tensor(signals, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{accepted}; got a {type(signals).__name__}") from error
    if found.ndim != 1 or len(found) < 2:
        raise ValueError(f"{accepted}; got shape {tuple(found.shape)}")
    if not bool((found.diff() < 0).all()) or not found[0] < 1 or not found[-1] >= 0:
        raise ValueError(f"{accepted}; got {found[0].item():.4g} .. {found[-1].item():.4g}")
    return found
