"""Fashion-MNIST, 28x28: the first data set of real photographs, from nothing to a one-step generator in 20 minutes."""

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

#: One-step sampling alone is asked of the student, so half of its intervals are (0, 1).
TIMES = LogitNormalTimes(interval_share=0.5, endpoint_share=0.5)
#: The plain squared error, which is the better one on digits and moons too: docs/results.md.
LOSS = MeanFlowLoss(p=0.0)


def fashion() -> Settings:
    """Fashion-MNIST, 28x28 grey photographs, 10 classes: Debian's package, 20 minutes on two cores."""
    return Settings(
        recipe="fashion",
        data="fashion",
        model=ModelSettings(name="dit_micro_4"),
        teacher=TeacherSettings(steps=4_000, batch=64, optimizer=OptimizerSettings(lr=2e-3)),
        trajectory=TrajectorySettings(
            steps=1_000, batch=64, times=TIMES, meanflow=LOSS, optimizer=OptimizerSettings(lr=1e-3)
        ),
        distribution=DistributionSettings(
            steps=1_500,
            batch=64,
            student_update_every=3,
            optimizer=OptimizerSettings(lr=1e-3, warmup=20),
            fake_score_optimizer=OptimizerSettings(lr=2e-3, warmup=20, schedule="constant"),
            discriminator=DiscriminatorSettings(
                layers=("blocks.1", "blocks.3"),
                noise_levels=UniformLevels(low=0.02, high=0.7),
                gan_weight=0.01,
                optimizer=OptimizerSettings(lr=1e-3, betas=(0.0, 0.99), warmup=20, schedule="constant"),
            ),
        ),
        evaluation=EvaluationSettings(samples=1_000, teacher_steps=(1, 4, 50, 250)),
    )


def fashion_smoke() -> Settings:
    """The same path in seconds: every line of code runs, no picture is good."""
    full = fashion()
    return Settings(
        recipe="fashion",
        data="fashion",
        model=full.model,
        loop=LoopSettings(log_every=5, checkpoint_every=20),
        teacher=TeacherSettings(steps=20, batch=16),
        trajectory=TrajectorySettings(steps=10, batch=16, times=TIMES, meanflow=LOSS),
        distribution=DistributionSettings(steps=12, batch=16, student_update_every=3),
        # The classifier of 60,000 pictures takes minutes to train.
        evaluation=EvaluationSettings(extractors=("none",), samples=50, teacher_steps=(1, 4), timing_repeats=2),
    )
