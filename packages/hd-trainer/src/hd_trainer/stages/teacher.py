"""Stage 0: a flow-matching teacher, for those who do not bring one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hd_meanflow import LogitNormalTimes, MeanFlowLoss
from hd_trainer.checks import MAX_BATCH, check_shares, check_steps, check_whole
from hd_trainer.context import Context
from hd_trainer.data import Batch
from hd_trainer.engine import draws
from hd_trainer.engine.average import average_of, update_average
from hd_trainer.engine.loop import Task
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings
from hd_trainer.errors import UserError
from hd_trainer.networks import GuidanceSettings, sampler, save_network
from hd_trainer.stages.alarms import compare_with_real, find_alarms

GRID_STEPS = 25


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Flow matching: E ||v(x_t, t) - (eps - x)||^2, with conditions dropped now and then for guidance."""

    steps: int
    """optimiser steps"""
    batch: int = 128
    """samples a step"""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=2e-3))
    ema: float = 0.99
    """decay of the exponential moving average that becomes the teacher"""
    condition_dropout: float = 0.1
    """share of the samples that lose their conditions, so that guidance has an unconditional field"""
    times: LogitNormalTimes = field(default_factory=lambda: LogitNormalTimes(mean=0.0, interval_share=0.0))
    """times t at which the velocity is learned"""

    def __post_init__(self) -> None:
        check_steps(steps=self.steps)
        check_whole(high=MAX_BATCH, batch=self.batch)
        check_shares(ema=self.ema, condition_dropout=self.condition_dropout)
        if self.times.interval_share != 0:
            raise UserError(
                f"times.interval_share of a teacher must be 0: it has r = t; got {self.times.interval_share}"
            )


def prepare(settings: TeacherSettings, context: Context, network: nn.Module) -> Task:
    """The task that trains ``network`` (fresh weights, on the context's device) to be a teacher."""
    average = average_of(network)
    optimizer = Optimizer(network, settings.optimizer, settings.steps)
    # With r = t everywhere the MeanFlow loss is flow matching; p = 0 is the plain squared error.
    loss = MeanFlowLoss(times=settings.times, p=0.0)
    noise, cond = context.grid_inputs()
    draw, _ = sampler(average, GRID_STEPS, GuidanceSettings(), context.data.null)

    def step(index: int) -> dict[str, Tensor]:
        record = teacher_step(settings, context, network, optimizer, loss, index)
        update_average(average, network, settings.ema, index)
        return record

    return Task(
        name="teacher",
        steps=settings.steps,
        modules={"network": network, "average": average},
        optimizers={"network": optimizer},
        step=step,
        sample=lambda: draw(noise, cond),
        compare=compare_with_real(context),
        alarms=lambda record, at_end: find_alarms("teacher", record, at_end=at_end),
        save=lambda folder: save_network(average, folder, stage="teacher", steps=settings.steps),
    )


def teacher_step(
    settings: TeacherSettings,
    context: Context,
    network: nn.Module,
    optimizer: Optimizer,
    loss: MeanFlowLoss,
    index: int,
) -> dict[str, Tensor]:
    """One update of the network by flow matching; its scalars."""
    generator = draws.step_generator(context.seed, "teacher", index)
    batch = context.batch(index, settings.batch)
    dropped = draws.coins(len(batch), settings.condition_dropout, generator)
    cond: dict[str, Any] = without(batch, dropped.to(context.device), context)
    noise = context.noise(len(batch), generator)
    with context.autocast():
        output = loss(network, batch.x, noise, generator=generator, **cond)
    size = batch.x[0].numel()
    norm = optimizer.update(output.loss / size, index)
    return {"loss": output.squared_error.mean() / size, "gradient_norm": norm}


def without(batch: Batch, dropped: Tensor, context: Context) -> dict[str, Tensor]:
    """The batch's conditions, with "no condition" where ``dropped`` (B,) is True."""
    replaced = {}
    for name, value in batch.cond.items():
        null = torch.as_tensor(context.data.null[name], dtype=value.dtype, device=value.device)
        replaced[name] = torch.where(dropped.reshape(-1, *(1,) * (value.ndim - 1)), null, value)
    return replaced
