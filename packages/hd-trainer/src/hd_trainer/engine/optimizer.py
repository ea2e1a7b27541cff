"""The one place where a gradient is taken: AdamW, its learning rate as a function of the step, and whose turn it is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hd_trainer.checks import MAX_STEPS, check_choice, check_number, check_whole
from hd_trainer.errors import UserError

Schedule = Literal["constant", "cosine"]

#: What AdamW keeps of each parameter: a count of steps and two moments of the parameter's shape.
COUNT, MOMENTS = "step", ("exp_avg", "exp_avg_sq")
#: The least value of an entry that has one.
LEAST = {COUNT: 1.0, MOMENTS[1]: 0.0}


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with a warm-up and a schedule."""

    lr: float
    """peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.99)
    """decay of the first and second moment"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    warmup: int = 50
    """steps of linear warm-up"""
    schedule: Schedule = "cosine"
    """what follows the warm-up: the peak rate, or a half cosine down to zero at the stage's last step"""
    clip: float = 1.0
    """gradients are scaled down to this norm; inf leaves them as they are"""

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, Schedule)
        check_number(above=True, lr=self.lr)
        if not self.clip > 0:
            raise UserError(f"clip must be > 0; got {self.clip}")
        if not (isinstance(self.betas, tuple) and len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise UserError(f"betas must be two numbers in [0, 1); got {self.betas}")
        check_number(weight_decay=self.weight_decay)
        check_whole(low=0, high=MAX_STEPS, warmup=self.warmup)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) in a stage of ``steps``."""
        rate = self.lr * min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
        return rate


class Optimizer:
    """AdamW over a module's parameters; ``update`` is one step: rate, backward, clip, step.

    Args:
        module: what it trains.
        settings: rate, moments, schedule.
        steps: number of updates in the whole stage, where the schedule ends.
    """

    def __init__(self, module: nn.Module, settings: OptimizerSettings, steps: int) -> None:
        self.parameters = list(module.parameters())
        self.settings, self.steps = settings, steps
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def update(self, loss: Tensor, step: int) -> Tensor:
        """Update number ``step`` (from 0) along the loss's gradient; returns the gradient's norm before clipping.

        The backward pass reaches whatever requires gradients: build the loss inside :func:`turn_of`.
        """
        for group in self.adamw.param_groups:
            group["lr"] = self.settings.rate(step, self.steps)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        return norm.detach()

    def tensors(self) -> dict[str, Tensor]:
        """The state as flat tensors, for a checkpoint that needs no pickle; empty before the first update."""
        return {
            f"{index}.{key}": value
            for index, parameter in enumerate(self.parameters)
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def expected(self, tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype that every entry of :meth:`tensors` must have, given the names in ``tensors``.

        A parameter that has had no gradient yet has no entries; any other has all three.
        """
        found = {name.split(".", 1)[0] for name in tensors}
        return {
            f"{index}.{key}": (
                torch.Size() if key == COUNT else one.shape,
                torch.float32 if key == COUNT else one.dtype,
            )
            for index, one in enumerate(self.parameters)
            if str(index) in found
            for key in (COUNT, *MOMENTS)
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave."""
        self.adamw.state.clear()
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            parameter = self.parameters[int(index)]
            # AdamW keeps its step counts on the CPU unless it is fused; moments live beside their parameter.
            self.adamw.state[parameter][key] = value.to(parameter.device)


@contextlib.contextmanager
def turn_of(module: nn.Module, others: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, ``module``'s parameters require gradients and those of ``others`` do not; afterwards all are as before.

    A loss built inside trains ``module`` alone, and ``loss.backward()`` is an ordinary call, so that hooks of DDP and
    FSDP2 fire as they always do.
    """
    wanted = [(parameter, True) for parameter in module.parameters()]
    wanted += [(parameter, False) for other in others for parameter in other.parameters()]
    before = [(parameter, parameter.requires_grad) for parameter, _ in wanted]
    for parameter, needed in wanted:
        parameter.requires_grad_(needed)
    try:
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
