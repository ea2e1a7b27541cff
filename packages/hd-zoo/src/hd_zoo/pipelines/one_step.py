"""A student's one step as arithmetic around one call of the network inside its converters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hd_zoo.sampling.jumps import sample_jumps
from hd_zoo.student import behind
from hd_zoo.wrappers.convert import Converter


@dataclass(frozen=True)
class OneStep:
    """``sample = skip * noise - scale * network(input_scale * noise, t, r)``.

    A student without converters has x - u(x, 1, 0): all three factors are 1, t is 1 and r is 0.
    """

    network: Any
    """what is behind the converters"""
    skip: float
    scale: float
    input_scale: float
    t: float
    """the time that the network is shown"""
    r: float
    """the time to which it jumps"""


def one_step(student: nn.Module) -> OneStep:
    """The arithmetic of ``sample_jumps(student, noise)``, found by running the student's converters on a probe.

    Raises:
        ValueError: for a network that takes no r, or converters that are not affine in what the network answers.
    """
    if not getattr(student, "takes_r", False):
        raise ValueError("a student is needed, a network with takes_r = True; this one is sampled in many steps")
    converters: list[Converter] = []
    inside: Any = student
    while isinstance(inside, Converter):
        converters.append(inside)
        inside = inside.network
    probe = _Probe()
    field: Any = probe
    for converter in reversed(converters):
        field = behind(converter, field)

    def sample(noise: float, answer: float) -> float:
        probe.answer = answer
        return sample_jumps(field, torch.full((1, 1, 1, 1), noise, dtype=torch.float64)).item()

    skip, scale = sample(1.0, 0.0), -sample(0.0, 1.0)
    together = sample(2.0, 3.0)
    found = OneStep(inside, skip, scale, probe.x / 2.0, probe.t, probe.r)
    if abs(together - (2.0 * skip - 3.0 * scale)) > 1e-6 * (abs(together) + abs(skip) + abs(scale)):
        raise ValueError("the student's converters are not affine in what its network answers")
    return found


class _Probe(nn.Module):
    """A network that answers one number everywhere and notes what it is shown."""

    takes_r = True
    answer = 0.0
    x = t = r = 0.0

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        self.x, self.t, self.r = x.item(), t.item(), 0.0 if r is None else r.item()
        return torch.full_like(x, self.answer)
