"""hd-trainer with your own recipe: a function that returns all settings of a run.

    hdistill run examples/own_recipe.py            # minutes, into runs/own_recipe
    hdistill run examples/own_recipe.py --smoke    # the same path in seconds
    hdistill run examples/own_recipe.py --help     # every setting is a flag, its default is the recipe's

The command calls the function `recipe`, and `smoke` for the short form. What is not named here has its default.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

from hd_meanflow import LogitNormalTimes
from hd_trainer import Settings, run
from hd_trainer.engine.loop import LoopSettings
from hd_trainer.engine.optimizer import OptimizerSettings
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.networks import ModelSettings
from hd_trainer.stages.discriminator import DiscriminatorSettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings

DATA = Path(__file__).with_name("own_data.py")
TIMES = LogitNormalTimes(interval_share=0.5, endpoint_share=0.5)


def recipe() -> Settings:
    """Bars and crosses of 8x8 pixels, in about two minutes on two CPU cores."""
    return Settings(
        recipe=__file__,
        data=str(DATA),
        precision="fp32",
        model=ModelSettings(name="dit_nano_2", depth=4),
        teacher=TeacherSettings(steps=600, batch=64, optimizer=OptimizerSettings(lr=5e-3)),
        trajectory=TrajectorySettings(steps=300, batch=64, times=TIMES, optimizer=OptimizerSettings(lr=2e-3)),
        distribution=DistributionSettings(
            steps=300,
            batch=64,
            student_update_every=3,
            discriminator=DiscriminatorSettings(gan_weight=0.03, layers=("blocks.1", "blocks.3")),
        ),
        evaluation=EvaluationSettings(teacher_steps=(1, 50)),
    )


def smoke() -> Settings:
    """The same path in seconds; no picture is good."""
    full = recipe()
    return dataclasses.replace(
        full,
        loop=LoopSettings(log_every=5, checkpoint_every=20),
        teacher=dataclasses.replace(full.teacher, steps=10),
        trajectory=dataclasses.replace(full.trajectory, steps=10),
        distribution=dataclasses.replace(full.distribution, steps=10),
        evaluation=EvaluationSettings(samples=50, teacher_steps=(1, 4), timing_repeats=1),
    )


def main() -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        run(smoke(), Path(folder))
        rows: list[dict[str, object]] = json.loads(Path(folder, "evaluation.json").read_text())["rows"]
        return rows


if __name__ == "__main__":
    main()
