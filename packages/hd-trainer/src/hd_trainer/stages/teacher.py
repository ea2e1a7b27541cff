"""Stage 0: a flow-matching teacher, for those who do not bring one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hd_zoo
from hd_meanflow import LogitNormalTimes, MeanFlowLoss
from hd_trainer.loop import Task, step_generator
from hd_trainer.optim import Optimizer, OptimizerSettings, moving_average, update_average
from hd_trainer.stages.common import Context, check_positive, check_shares, save_network


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Flow matching: E ||v(x_t, t) - (eps - x)||^2, with labels dropped now and then for guidance."""

    steps: int
    """optimiser steps"""
    batch: int = 128
    """images a step"""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=2e-3))
    ema: float = 0.99
    """decay of the moving average that becomes the teacher"""
    label_dropout: float = 0.1
    """share of the labels replaced by the null class, so that guidance has an unconditional field"""
    time_mean: float = 0.0
    """t = sigmoid(N(time_mean, time_std^2))"""
    time_std: float = 1.0
    """see time_mean"""

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, batch=self.batch, time_std=self.time_std)
        check_shares(ema=self.ema, label_dropout=self.label_dropout)


def prepare(settings: TeacherSettings, context: Context, network: nn.Module) -> Task:
    """The task that trains ``network`` (fresh weights, on the context's device) to be a teacher."""
    average = moving_average(network)
    optimizer = Optimizer(network.parameters(), settings.optimizer)
    # With r = t everywhere the MeanFlow loss is flow matching; p = 0 is the plain squared error.
    times = LogitNormalTimes(mean=settings.time_mean, std=settings.time_std, interval_share=0.0)
    loss = MeanFlowLoss(times=times, p=0.0)
    grid_noise, grid_labels = context.grid_inputs()
    null: Any = network.null_label

    def step(index: int) -> dict[str, Tensor]:
        generator = step_generator(context.seed, "teacher", index)
        x, labels = context.batch(index, settings.batch)
        dropped = torch.rand(len(labels), generator=generator) < settings.label_dropout
        labels = labels.masked_fill(dropped.to(labels.device), null)
        noise = context.noise(len(x), generator)
        with context.autocast():
            output = loss(network, x, noise, generator=generator, labels=labels)
        norm = optimizer.update(output.loss / x[0].numel(), index, settings.steps)
        update_average(average, network, settings.ema, index)
        return {"loss": output.squared_error.mean() / x[0].numel(), "gradient_norm": norm}

    return Task(
        name="teacher",
        steps=settings.steps,
        modules={"network": network, "average": average},
        optimizers={"network": optimizer},
        step=step,
        sample=lambda: hd_zoo.sample_ode(average, grid_noise, 25, labels=grid_labels),
        save=lambda folder: save_network(average, network, folder, stage="teacher", steps=settings.steps),
    )
