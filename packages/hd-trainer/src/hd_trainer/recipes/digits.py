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
        model=ModelSettings(name="dit_nano_2", time_scale=10.0),
        teacher=TeacherSettings(steps=1_200, optimizer=OptimizerSettings(lr=5e-3)),
        trajectory=TrajectorySettings(steps=600, interval_share=0.5, endpoint_share=0.5),
        distribution=DistributionSettings(steps=900, student_every=3),
    )


def digits_smoke() -> Settings:
    """The same path in seconds: every line of code runs, no picture is good."""
    full = digits()
    return Settings(
        recipe="digits",
        data="digits",
        model=full.model,
        loop=LoopSettings(log_every=5, checkpoint_every=20),
        teacher=TeacherSettings(steps=40, batch=32),
        trajectory=TrajectorySettings(steps=30, batch=32, interval_share=0.5, endpoint_share=0.5),
        distribution=DistributionSettings(steps=30, batch=32, student_every=3, adversary=AdversarySettings()),
        evaluation=EvaluationSettings(samples=100, teacher_steps=(1, 4, 50), timing_repeats=2),
    )
