"""Stage 2, distribution matching with an adversarial part: the student gains the detail that stage 1 left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hd_awd import generator_loss
from hd_dmd import DistributionMatchingLoss, UniformLevels, fake_score_loss
from hd_trainer.checks import MAX_BATCH, check_number, check_shares, check_steps, check_whole
from hd_trainer.context import Context
from hd_trainer.data import Batch
from hd_trainer.engine import draws
from hd_trainer.engine.average import average_of, update_average
from hd_trainer.engine.loop import Task
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings, turn_of
from hd_trainer.errors import UserError
from hd_trainer.networks import GuidanceSettings, guided, make_student, sampler, save_network
from hd_trainer.stages.alarms import compare_with_real, find_alarms
from hd_trainer.stages.discriminator import (
    DiscriminatorSettings,
    Judge,
    NoiseLevels,
    discriminator_step,
    prepare_judge,
    save_discriminator,
)


@dataclass(frozen=True, kw_only=True)
class DistributionSettings:
    """DMD with an adversarial part, two time scales [HD, arXiv 2511.08930; DMD2, arXiv 2405.14867]."""

    steps: int
    """iterations; each updates fake score and discriminator once"""
    student_update_every: int = 5
    """iterations per student update [DMD2: 5]"""
    batch: int = 128
    """samples an iteration"""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=3e-4))
    """of the student"""
    fake_score_optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(lr=5e-4, schedule="constant")
    )
    """of the fake score"""
    ema: float = 0.98
    """decay, per student update, of the exponential moving average that becomes the one-step generator"""
    matching_weight: float = 1.0
    """weight of the distribution-matching loss; 0 leaves the discriminator alone"""
    noise_levels: NoiseLevels = field(default_factory=UniformLevels)
    """noise levels of distribution matching [ours: U[0.02, 0.98]]"""
    fake_score_noise_levels: NoiseLevels | None = None
    """noise levels of the fake score; None: those of distribution matching [DMD2: all of them]"""
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    """of the real velocity"""
    discriminator: DiscriminatorSettings = field(default_factory=DiscriminatorSettings)

    def __post_init__(self) -> None:
        check_steps(steps=self.steps, student_update_every=self.student_update_every)
        check_whole(high=MAX_BATCH, batch=self.batch)
        check_shares(ema=self.ema)
        check_number(matching_weight=self.matching_weight)
        if self.matching_weight == 0 and self.discriminator.gan_weight == 0:
            raise UserError("matching_weight and discriminator.gan_weight are both 0: nothing would train the student")


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Who takes part in stage 2."""

    student: nn.Module
    average: nn.Module
    """the student's exponential moving average: the one-step generator"""
    fake_score: nn.Module
    teacher: nn.Module
    """frozen"""
    real_score: nn.Module
    """the teacher, guidance included"""
    judge: Judge
    """the discriminator on the teacher's features"""


def prepare(settings: DistributionSettings, context: Context, teacher: nn.Module, start: nn.Module) -> Task:
    """The task that turns ``start`` (stage 1's student, or the teacher) into the one-step generator.

    Raises:
        UserError: if the teacher lacks one of the discriminator's layers.
    """
    student = make_student(start, context.seed)
    networks = Networks(
        student=student,
        average=average_of(student),
        fake_score=average_of(teacher).requires_grad_(True),
        teacher=teacher,
        real_score=guided(teacher, settings.guidance, context.data.null),
        judge=prepare_judge(settings.discriminator, context, teacher),
    )
    student_updates = -(-settings.steps // settings.student_update_every)
    optimizers = {
        "student": Optimizer(student, settings.optimizer, student_updates),
        "fake_score": Optimizer(networks.fake_score, settings.fake_score_optimizer, settings.steps),
        "discriminator": Optimizer(networks.judge.discriminator, settings.discriminator.optimizer, settings.steps),
    }
    noise, cond = context.grid_inputs()
    draw, _ = sampler(networks.average, 1, settings.guidance, context.data.null)

    def save(folder: Path) -> None:
        save_network(networks.average, folder, stage="distribution", steps=settings.steps)
        save_discriminator(networks.judge, folder)

    return Task(
        name="distribution",
        steps=settings.steps,
        modules={
            "student": student,
            "average": networks.average,
            "fake_score": networks.fake_score,
            "discriminator": networks.judge.discriminator,
        },
        optimizers=optimizers,
        step=lambda index: distribution_step(settings, context, networks, optimizers, index),
        sample=lambda: draw(noise, cond),
        compare=compare_with_real(context),
        alarms=lambda record, at_end: find_alarms("distribution", record, at_end=at_end),
        save=save,
    )


def distribution_step(
    settings: DistributionSettings,
    context: Context,
    networks: Networks,
    optimizers: dict[str, Optimizer],
    index: int,
) -> dict[str, Tensor]:
    """One iteration: the student's turn now and then, the fake score's and the discriminator's always."""
    generator = draws.step_generator(context.seed, "distribution", index)
    batch = context.batch(index, settings.batch)
    noise = context.noise(len(batch), generator)
    student, fake_score, discriminator = networks.student, networks.fake_score, networks.judge.discriminator
    record: dict[str, Tensor] = {}
    if index % settings.student_update_every == 0:
        turn = index // settings.student_update_every
        with turn_of(student, [networks.teacher, fake_score, discriminator]):
            sample = one_step_sample(context, student, noise, batch)
            record |= student_step(settings, context, networks, optimizers["student"], batch, sample, generator, turn)
        update_average(networks.average, student, settings.ema, turn)
    else:
        with torch.no_grad():
            sample = one_step_sample(context, student, noise, batch)
    sample = sample.detach()
    if settings.matching_weight > 0:
        with turn_of(fake_score, [student, networks.teacher, discriminator]):
            record |= fake_score_step(
                settings, context, fake_score, optimizers["fake_score"], batch, sample, generator, index
            )
    if settings.discriminator.gan_weight > 0:
        with turn_of(discriminator, [student, networks.teacher, fake_score]):
            record |= discriminator_step(
                networks.judge, optimizers["discriminator"], batch.x, sample, batch.cond, generator, index
            )
    return record


def one_step_sample(context: Context, student: nn.Module, noise: Tensor, batch: Batch) -> Tensor:
    """x = eps - u(eps, 0, 1), of noise's shape, with the student's graph where gradients are on."""
    one, zero = noise.new_ones(len(noise)), noise.new_zeros(len(noise))
    with context.autocast():
        sample: Tensor = noise - student(noise, one, zero, **batch.cond)
    return sample


def student_step(
    settings: DistributionSettings,
    context: Context,
    networks: Networks,
    optimizer: Optimizer,
    batch: Batch,
    sample: Tensor,
    generator: torch.Generator,
    turn: int,
) -> dict[str, Tensor]:
    """Update number ``turn`` of the student, by distribution matching and by the discriminator's word; its scalars."""
    judge, gan_loss = networks.judge, settings.discriminator.gan_loss
    record: dict[str, Tensor] = {}
    loss = sample.new_zeros(())
    with context.autocast():
        if settings.matching_weight > 0:
            matching = DistributionMatchingLoss(noise_levels=settings.noise_levels)
            match = matching(
                sample, real=networks.real_score, fake=networks.fake_score, generator=generator, **batch.cond
            )
            loss = loss + settings.matching_weight * match.loss
            record |= {"matching_gradient": match.gradient_rms, "velocity_gap": match.velocity_gap}
        if settings.discriminator.gan_weight > 0:
            t = judge.levels(len(sample), generator)
            real_logits = None
            if gan_loss == "relativistic":
                real_logits = judge.logits(judge.show(batch.x, t, generator), t, batch.cond)
            fake_logits = judge.logits(judge.show(sample, t, generator), t, batch.cond)
            against = generator_loss(fake_logits, real_logits, gan_loss)
            loss = loss + settings.discriminator.gan_weight * against
            record["gan_loss"] = against.detach()
    record["gradient_norm"] = optimizer.update(loss, turn)
    return record


def fake_score_step(
    settings: DistributionSettings,
    context: Context,
    fake_score: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    sample: Tensor,
    generator: torch.Generator,
    index: int,
) -> dict[str, Tensor]:
    """One update of the fake score by flow matching on the student's detached samples; its scalar."""
    with context.autocast():
        output = fake_score_loss(
            fake_score,
            sample,
            noise_levels=settings.fake_score_noise_levels or settings.noise_levels,
            generator=generator,
            **batch.cond,
        )
    optimizer.update(output.loss, index)
    return {"fake_score_loss": output.loss.detach()}
