"""The main job: scikit-learn's digits, from nothing to a one-step generator in minutes on two CPU cores."""

from __future__ import annotations

from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.loop import LoopSettings
from hd_trainer.optim import OptimizerSettings
from hd_trainer.settings import ModelSettings, Settings
from hd_trainer.stages.critic import AdversarySettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings


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
            steps=700,
            batch=64,
            # One-step sampling alone is asked of the student, so half of its intervals are (0, 1).
            interval_share=0.5,
            endpoint_share=0.5,
            optimizer=OptimizerSettings(lr=2e-3),
        ),
        distribution=DistributionSettings(
            steps=1_200,
            batch=64,
            student_every=3,
            optimizer=OptimizerSettings(lr=1e-3, warmup=20),
            # The fake score learns twice as fast as the student: it has to keep up with it.
            fake_optimizer=OptimizerSettings(lr=2e-3, warmup=20, schedule="constant"),
            adversary=AdversarySettings(
                # Above t = 0.7 an 8x8 digit cannot be told from another; larger weights cost recall.
                levels=(0.02, 0.7),
                weight=0.05,
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
        trajectory=TrajectorySettings(steps=30, batch=32, interval_share=0.5, endpoint_share=0.5),
        distribution=DistributionSettings(steps=30, batch=32, student_every=3, adversary=AdversarySettings()),
        evaluation=EvaluationSettings(samples=100, teacher_steps=(1, 4, 50), timing_repeats=2),
    )
