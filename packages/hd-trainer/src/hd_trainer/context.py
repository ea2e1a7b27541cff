"""A run's surroundings, made once per command and handed down."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hd_trainer.data import Batch, Dataset, grid_conditions, load_data
from hd_trainer.engine import draws, parallel
from hd_trainer.engine.precision import Precision, autocast
from hd_trainer.writers import JsonLines, WriterFactory

GRID_ROWS = 6


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where a stage runs and on what."""

    data: Dataset
    device: torch.device
    precision: Precision
    seed: int
    writers: tuple[WriterFactory, ...] = (JsonLines,)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """A fresh autocast context. Leaving it drops its cache of casts: use one for each forward pass that trains."""
        return autocast(self.device, self.precision)

    def batch(self, step: int, size: int) -> Batch:
        """The training samples of a step, on the device."""
        index = draws.step_indices(step, size, len(self.data.train), self.seed)
        return self.data.train.read(index).to(self.device)

    def noise(self, size: int, generator: torch.Generator) -> Tensor:
        """Standard normal (size, C, H, W) on the device."""
        return draws.normal(size, self.data.shape, generator, self.device)

    def grid_inputs(self, rows: int = GRID_ROWS, first_seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Noise and conditions of a grid of samples; by default that of the stages, the same in each."""
        cond = grid_conditions(self.data, rows)
        size = len(next(iter(cond.values()))) if cond else rows * 10
        noise = draws.picture_noise(self.data.shape, first_seed, size, self.device)
        return noise, {name: value.to(self.device) for name, value in cond.items()}


def make_context(
    data: str,
    *,
    device: str,
    precision: Precision,
    seed: int,
    writers: tuple[WriterFactory, ...] = (JsonLines,),
) -> Context:
    """Data, device, seed and writers of a command.

    Raises:
        UserError: for an unknown data set, a device that is not there, or one of several processes.
    """
    parallel.check_single_process()
    return Context(
        data=load_data(data),
        device=parallel.choose_device(device),
        precision=precision,
        seed=seed,
        writers=writers,
    )
