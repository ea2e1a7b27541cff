"""Stage 1, trajectory distillation: the student learns the teacher's mean velocity - the structure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hd_meanflow import LogitNormalTimes, MeanFlowLoss, UniformTimes
from hd_trainer.checks import MAX_BATCH, check_shares, check_steps, check_whole
from hd_trainer.context import Context
from hd_trainer.engine import draws
from hd_trainer.engine.average import average_of, update_average
from hd_trainer.engine.loop import Task
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings, turn_of
from hd_trainer.errors import UserError
from hd_trainer.networks import GuidanceSettings, guided, make_student, sampler, save_network
from hd_trainer.stages.alarms import compare_with_real, find_alarms

#: Laws of the times; which one is the recipe's choice, the command line sets what that one has.
Times = LogitNormalTimes | UniformTimes


@dataclass(frozen=True, kw_only=True)
class TrajectorySettings:
    """MeanFlow against the teacher's velocity [HD, arXiv 2511.08930; MeanFlow, arXiv 2505.13447]."""

    steps: int
    """optimiser steps"""
    batch: int = 128
    """samples a step"""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-3))
    ema: float = 0.99
    """decay of the exponential moving average that becomes the student"""
    times: Times = field(default_factory=LogitNormalTimes)
    """times (t, r) of the loss"""
    meanflow: MeanFlowLoss = field(default_factory=MeanFlowLoss)
    """the loss; its times are the ones above"""
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    """of the teacher's velocity"""
    interval_at: tuple[str, ...] = ()
    """modules of a teacher from elsewhere to whose output the embedding of (t - r) is added; none given: the
    network's own place, or the module with a usual name (time_embedding, t_embedder ...)"""

    def __post_init__(self) -> None:
        check_steps(steps=self.steps)
        check_whole(high=MAX_BATCH, batch=self.batch)
        check_shares(ema=self.ema)
        if self.meanflow.guidance is not None:
            raise UserError("meanflow.guidance is for training without a teacher; guide the teacher: guidance.scale")


def prepare(settings: TrajectorySettings, context: Context, teacher: nn.Module) -> Task:
    """The task that distils ``teacher`` (frozen) into a student that starts as its exact copy."""
    student = make_student(teacher, context.seed, settings.interval_at)
    average = average_of(student)
    optimizer = Optimizer(student, settings.optimizer, settings.steps)
    real = guided(teacher, settings.guidance, context.data.null)
    loss = dataclasses.replace(settings.meanflow, times=settings.times)
    noise, cond = context.grid_inputs()
    draw, _ = sampler(average, 1, settings.guidance, context.data.null)

    def step(index: int) -> dict[str, Tensor]:
        with turn_of(student, [teacher]):
            record = student_step(settings, context, student, real, optimizer, loss, index)
        update_average(average, student, settings.ema, index)
        return record

    return Task(
        name="trajectory",
        steps=settings.steps,
        modules={"student": student, "average": average},
        optimizers={"student": optimizer},
        step=step,
        sample=lambda: draw(noise, cond),
        compare=compare_with_real(context),
        alarms=lambda record, at_end: find_alarms("trajectory", record, at_end=at_end),
        save=lambda folder: save_network(average, folder, stage="trajectory", steps=settings.steps),
    )


def student_step(
    settings: TrajectorySettings,
    context: Context,
    student: nn.Module,
    teacher: nn.Module,
    optimizer: Optimizer,
    loss: MeanFlowLoss,
    index: int,
) -> dict[str, Tensor]:
    """One update of the student against the teacher's velocity, guidance included; its scalars."""
    generator = draws.step_generator(context.seed, "trajectory", index)
    batch = context.batch(index, settings.batch)
    cond: dict[str, Any] = batch.cond
    noise = context.noise(len(batch), generator)
    with context.autocast():
        output = loss(student, batch.x, noise, teacher=teacher, generator=generator, **cond)
    norm = optimizer.update(output.loss, index)
    r_below_t, size = output.r != output.t, batch.x[0].numel()
    record = {
        "loss": output.loss.detach(),
        "error_r_equal_t": output.squared_error[~r_below_t].mean() / size,
        "error_r_below_t": output.squared_error[r_below_t].mean() / size,
        "derivative_rms": output.derivative_rms,
        "gradient_norm": norm,
    }
    # A share of 0 or 1 leaves one of the two groups empty.
    return {name: value for name, value in record.items() if not value.isnan() or name == "loss"}
