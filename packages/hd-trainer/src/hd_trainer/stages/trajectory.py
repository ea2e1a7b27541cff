"""Stage 1, trajectory distillation: the student learns the teacher's mean velocity - the structure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

import hd_zoo
from hd_meanflow import LogitNormalTimes, MeanFlowLoss
from hd_trainer.errors import UserError, check_choice
from hd_trainer.loop import Task, step_generator
from hd_trainer.optim import Optimizer, OptimizerSettings, moving_average, update_average
from hd_trainer.stages.common import (
    Context,
    check_guidance,
    check_positive,
    check_shares,
    guided,
    save_network,
    seeded_student,
)

Derivative = Literal["jvp", "difference"]


@dataclass(frozen=True, kw_only=True)
class TrajectorySettings:
    """MeanFlow against the teacher's velocity [HD, arXiv 2511.08930; MeanFlow, arXiv 2505.13447]."""

    steps: int
    """optimiser steps"""
    batch: int = 128
    """images a step"""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-3))
    ema: float = 0.99
    """decay of the moving average that becomes the student"""
    interval_share: float = 0.25
    """share of the samples with r != t [MeanFlow]"""
    endpoint_share: float = 0.0
    """share of those set to (r, t) = (0, 1), the interval of one-step sampling [ours]"""
    time_mean: float = -0.4
    """t, r from sigmoid(N(time_mean, time_std^2)) [MeanFlow]"""
    time_std: float = 1.0
    """see time_mean"""
    p: float = 1.0
    """power of the adaptive weight [MeanFlow]"""
    c: float = 0.01
    """offset of the adaptive weight [MeanFlow]"""
    derivative: Derivative = "jvp"
    """how du/dt is taken: forward AD (exact) or a finite difference (any attention kernel)"""
    guidance_scale: float = 1.0
    """classifier-free guidance of the teacher's velocity; 1 is none"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """times at which guidance is on"""

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, batch=self.batch, time_std=self.time_std, c=self.c)
        check_shares(ema=self.ema, interval_share=self.interval_share, endpoint_share=self.endpoint_share)
        check_guidance(self.guidance_scale, self.guidance_interval)
        check_choice("derivative", self.derivative, Derivative)
        if not 0 <= self.p < math.inf:
            raise UserError(f"p must be >= 0 and finite; got {self.p}")


def prepare(settings: TrajectorySettings, context: Context, teacher: nn.Module) -> Task:
    """The task that distils ``teacher`` (frozen) into a student that starts as its exact copy."""
    student = seeded_student(teacher, context.seed)
    average = moving_average(student)
    optimizer = Optimizer(student.parameters(), settings.optimizer)
    field_of_teacher = guided(teacher, settings.guidance_scale, settings.guidance_interval)
    loss = MeanFlowLoss(
        times=LogitNormalTimes(
            mean=settings.time_mean,
            std=settings.time_std,
            interval_share=settings.interval_share,
            endpoint_share=settings.endpoint_share,
        ),
        p=settings.p,
        c=settings.c,
        derivative=settings.derivative,
    )
    grid_noise, grid_labels = context.grid_inputs()

    def step(index: int) -> dict[str, Tensor]:
        generator = step_generator(context.seed, "trajectory", index)
        x, labels = context.batch(index, settings.batch)
        noise = context.noise(len(x), generator)
        with context.autocast():
            output = loss(student, x, noise, teacher=field_of_teacher, generator=generator, labels=labels)
        norm = optimizer.update(output.loss, index, settings.steps)
        update_average(average, student, settings.ema, index)
        moving = output.r != output.t
        record = {
            "loss": output.loss.detach(),
            "error_at_r_equal_t": output.squared_error[~moving].mean() / x[0].numel(),
            "error_at_intervals": output.squared_error[moving].mean() / x[0].numel(),
            "derivative_rms": output.derivative_rms,
            "gradient_norm": norm,
        }
        # A share of 0 or 1 leaves one of the two groups empty.
        return {name: value for name, value in record.items() if not value.isnan() or name == "loss"}

    return Task(
        name="trajectory",
        steps=settings.steps,
        modules={"student": student, "average": average},
        optimizers={"student": optimizer},
        step=step,
        sample=lambda: hd_zoo.sample_jumps(average, grid_noise, labels=grid_labels),
        save=lambda folder: save_network(average, student, folder, stage="trajectory", steps=settings.steps),
    )
