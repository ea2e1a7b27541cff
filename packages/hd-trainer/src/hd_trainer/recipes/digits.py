"""The main job: scikit-learn's digits, from nothing to a one-step generator in minutes on two CPU cores."""

from __future__ import annotations

from hd_dmd import UniformLevels
from hd_meanflow import LogitNormalTimes, MeanFlowLoss
from hd_trainer.engine.loop import LoopSettings
from hd_trainer.engine.optimizer import OptimizerSettings
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.networks import ModelSettings
from hd_trainer.settings import Settings
from hd_trainer.stages.discriminator import DiscriminatorSettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings

#: Blocks of dit_nano_2 that the discriminator sees: the middle and the last.
LAYERS = ("blocks.1", "blocks.3")

#: One-step sampling alone is asked of the student, so half of its intervals are (0, 1).
TIMES = LogitNormalTimes(interval_share=0.5, endpoint_share=0.5)
#: The plain squared error. With p = 1 the distance after stage 1 is four times as large: docs/results.md.
LOSS = MeanFlowLoss(p=0.0)


def digits() -> Settings:
    """scikit-learn's digits, 8x8 pixels, 10 classes: no download, minutes on two CPU cores."""
    return Settings(
        recipe="digits",
        data="digits",
        # At this width bf16 buys nothing: the time goes into small operations, not into matrix products.
        precision="fp32",
        model=ModelSettings(name="dit_nano_2"),
        teacher=TeacherSettings(steps=2_000, batch=64, optimizer=OptimizerSettings(lr=5e-3)),
        trajectory=TrajectorySettings(
            steps=700, batch=64, times=TIMES, meanflow=LOSS, optimizer=OptimizerSettings(lr=2e-3)
        ),
        distribution=DistributionSettings(
            steps=1_200,
            batch=64,
            student_update_every=3,
            optimizer=OptimizerSettings(lr=1e-3, warmup=20),
            # The fake score learns twice as fast as the student: it has to keep up with it.
            fake_score_optimizer=OptimizerSettings(lr=2e-3, warmup=20, schedule="constant"),
            discriminator=DiscriminatorSettings(
                layers=LAYERS,
                # Above t = 0.7 an 8x8 digit cannot be told from another; larger weights cost recall.
                noise_levels=UniformLevels(low=0.02, high=0.7),
                gan_weight=0.05,
                optimizer=OptimizerSettings(lr=2e-3, betas=(0.5, 0.99), warmup=20, schedule="constant"),
            ),
        ),
    )


def digits_smoke() -> Settings:
    """The same path in seconds: every line of code runs, no picture is good."""
    full = digits()
    return Settings(
        recipe="digits",
        data="digits",
        precision=full.precision,
        model=full.model,
        loop=LoopSettings(log_every=5, checkpoint_every=20),
        teacher=TeacherSettings(steps=40, batch=32),
        trajectory=TrajectorySettings(steps=30, batch=32, times=TIMES, meanflow=LOSS),
        distribution=DistributionSettings(
            steps=30, batch=32, student_update_every=3, discriminator=DiscriminatorSettings(layers=LAYERS)
        ),
        evaluation=EvaluationSettings(samples=100, teacher_steps=(1, 4, 50), timing_repeats=2),
    )
