"""Stage 2, distribution matching with an adversarial part: the student gains the detail that stage 1 left out."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import hd_zoo
from hd_awd import approximate_r1, discriminator_loss, generator_loss
from hd_dmd import DistributionMatchingLoss, UniformLevels, fake_score_loss
from hd_meanflow import interpolate
from hd_trainer.errors import UserError
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
from hd_trainer.stages.critic import (
    AdversarySettings,
    check_layers,
    check_levels,
    save_discriminator,
    seeded_discriminator,
)


@dataclass(frozen=True, kw_only=True)
class DistributionSettings:
    """DMD with an adversarial part, two time scales [HD, arXiv 2511.08930; DMD2, arXiv 2405.14867]."""

    steps: int
    """iterations; each updates fake score and discriminator once"""
    student_every: int = 5
    """iterations per student update [DMD2: 5]"""
    batch: int = 128
    """images an iteration"""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=3e-4))
    """of the student"""
    fake_optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=5e-4, schedule="constant"))
    """of the fake score"""
    ema: float = 0.98
    """decay, per student update, of the moving average that becomes the one-step generator"""
    matching_weight: float = 1.0
    """weight of the distribution-matching loss; 0 leaves the adversary alone"""
    levels: tuple[float, float] = (0.02, 0.98)
    """noise levels of distribution matching and fake score [DMD2: U[0.02, 0.98]]"""
    guidance_scale: float = 1.0
    """classifier-free guidance of the real velocity; 1 is none"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """times at which guidance is on"""
    adversary: AdversarySettings = field(default_factory=AdversarySettings)

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, student_every=self.student_every, batch=self.batch)
        check_shares(ema=self.ema)
        check_guidance(self.guidance_scale, self.guidance_interval)
        check_levels(self.levels)
        if not 0 <= self.matching_weight < math.inf:
            raise UserError(f"matching_weight must be >= 0 and finite; got {self.matching_weight}")
        if self.matching_weight == 0 and self.adversary.weight == 0:
            raise UserError("matching_weight and adversary.weight are both 0: nothing would train the student")


def prepare(settings: DistributionSettings, context: Context, teacher: nn.Module, start: nn.Module) -> Task:
    """The task that turns ``start`` (stage 1's student, or the teacher) into the one-step generator.

    Raises:
        UserError: if the teacher lacks one of the adversary's layers.
    """
    adversary = settings.adversary
    student = seeded_student(start, context.seed)
    average = moving_average(student)
    fake = moving_average(teacher).requires_grad_(True).train()
    real = guided(teacher, settings.guidance_scale, settings.guidance_interval)
    tap = check_layers(adversary, teacher)
    grid_noise, grid_labels = context.grid_inputs()
    widths = [f.shape[-1] for f in tap(grid_noise, grid_noise.new_ones(len(grid_noise)), labels=grid_labels)]
    discriminator = seeded_discriminator(adversary, widths, context.seed).to(context.device)
    optimizers = {
        "student": Optimizer(student.parameters(), settings.optimizer),
        "fake": Optimizer(fake.parameters(), settings.fake_optimizer),
        "discriminator": Optimizer(discriminator.parameters(), adversary.optimizer),
    }
    matching = DistributionMatchingLoss(levels=UniformLevels(low=settings.levels[0], high=settings.levels[1]))
    seen_levels = UniformLevels(low=adversary.levels[0], high=adversary.levels[1])
    student_steps = -(-settings.steps // settings.student_every)

    def step(index: int) -> dict[str, Tensor]:
        generator = step_generator(context.seed, "distribution", index)
        real_images, labels = context.batch(index, settings.batch)
        noise = context.noise(len(labels), generator)
        one, zero = noise.new_ones(len(noise)), noise.new_zeros(len(noise))
        record: dict[str, Tensor] = {}

        def show(images: Tensor, t: Tensor) -> Tensor:
            """What the discriminator is shown: images noised to level t."""
            return interpolate(images, context.noise(len(images), generator), t)

        def logits_of(x_t: Tensor, t: Tensor) -> Tensor:
            """The gradient goes through the frozen teacher into the images."""
            return discriminator(tap(x_t, t, labels=labels))

        # The student's turn: distribution matching for every sample, and the adversary's word.
        updates_student = index % settings.student_every == 0
        with context.autocast(), torch.set_grad_enabled(updates_student):
            sample = noise - student(noise, one, zero, labels=labels)
        if updates_student:
            loss = sample.new_zeros(())
            with context.autocast():
                if settings.matching_weight > 0:
                    match = matching(sample, real=real, fake=fake, generator=generator, labels=labels)
                    loss = loss + settings.matching_weight * match.loss
                    record |= {"matching_gradient": match.gradient_rms, "velocity_gap": match.velocity_gap}
                if adversary.weight > 0:
                    t = seen_levels.sample(len(sample), generator, sample.device)
                    paired = adversary.loss == "relativistic"
                    real_logits = logits_of(show(real_images, t), t) if paired else None
                    deceit = generator_loss(logits_of(show(sample, t), t), real_logits, adversary.loss)
                    loss = loss + adversary.weight * deceit
                    record["student_adversarial"] = deceit.detach()
            turn = index // settings.student_every
            record["student_gradient"] = optimizers["student"].update(loss, turn, student_steps)
            update_average(average, student, settings.ema, turn)

        # The critics' turn: the fake score follows the student, the discriminator tells it from the data.
        sample = sample.detach()
        if settings.matching_weight > 0:
            with context.autocast():
                follow = fake_score_loss(fake, sample, levels=matching.levels, generator=generator, labels=labels)
            optimizers["fake"].update(follow.loss, index, settings.steps)
            record["fake_score"] = follow.loss.detach()
        if adversary.weight > 0:
            # Real and generated images are shown at the same levels: noise must not give them away.
            t = seen_levels.sample(len(sample), generator, sample.device)
            shown = show(real_images, t)
            with context.autocast():
                real_logits, fake_logits = logits_of(shown, t), logits_of(show(sample, t), t)
                loss = discriminator_loss(real_logits, fake_logits, adversary.loss)
            record |= {
                "discriminator": loss.detach(),
                "told_apart": ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2,
            }
            if adversary.r1_weight > 0:
                # Outside of autocast: bf16's rounding would be divided by the square of a small number.
                r1 = approximate_r1(functools.partial(logits_of, t=t), shown, std=adversary.r1_std, generator=generator)
                loss = loss + adversary.r1_weight * r1
                record["r1"] = r1.detach()
            optimizers["discriminator"].update(loss, index, settings.steps)
        return record

    def save(folder: Path) -> None:
        save_network(average, student, folder, stage="distribution", steps=settings.steps)
        save_discriminator(discriminator, adversary, folder)

    return Task(
        name="distribution",
        steps=settings.steps,
        modules={"student": student, "average": average, "fake": fake, "discriminator": discriminator},
        optimizers=optimizers,
        step=step,
        sample=lambda: hd_zoo.sample_jumps(average, grid_noise, labels=grid_labels),
        save=save,
    )
