"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


def average_of(model: nn.Module) -> nn.Module:
    """A frozen copy of the model in evaluation mode, to be kept up by :func:`update_average`."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average <- d average + (1 - d) model, with d = min(decay, (1 + step) / (10 + step)): short memory at first."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
