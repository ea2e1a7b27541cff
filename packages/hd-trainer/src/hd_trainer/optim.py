"""Optimiser, learning rate and moving average: each a function of the step, so that none has a state of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hd_trainer.errors import UserError, check_choice

Schedule = Literal["constant", "cosine"]


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
    """gradients are scaled down to this norm"""

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, Schedule)
        if not (0 < self.lr < math.inf and self.clip > 0):
            raise UserError(f"lr and clip must be > 0, lr finite; got lr = {self.lr}, clip = {self.clip}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must lie in [0, 1); got {self.betas}")
        if not 0 <= self.weight_decay < math.inf or self.warmup < 0:
            raise UserError(f"weight_decay and warmup must be >= 0; got {self.weight_decay} and {self.warmup}")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) in a stage of ``steps``."""
        rate = self.lr * min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
        return rate


class Optimizer:
    """AdamW over a set of parameters; ``update`` is one step: rate, backward, clip, step."""

    def __init__(self, parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> None:
        self.parameters = list(parameters)
        self.settings = settings
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def update(self, loss: Tensor, step: int, steps: int) -> Tensor:
        """Step ``step`` of ``steps`` along the loss's gradient in these parameters alone; its norm before clipping."""
        for group in self.adamw.param_groups:
            group["lr"] = self.settings.rate(step, steps)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        return norm.detach()

    def tensors(self) -> dict[str, Tensor]:
        """The state as flat tensors, for a checkpoint that needs no pickle."""
        return {
            f"{index}.{key}": value
            for index, parameter in enumerate(self.parameters)
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`tensors` gave."""
        self.adamw.state.clear()
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            parameter = self.parameters[int(index)]
            # AdamW keeps its step counts on the CPU unless it is fused; moments live beside their parameter.
            self.adamw.state[parameter][key] = value.to(parameter.device)


def moving_average(model: nn.Module) -> nn.Module:
    """A frozen copy of the model, to be kept up by :func:`update_average`."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average <- d average + (1 - d) model, with d = min(decay, (1 + step) / (10 + step)): short memory at first."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
