"""The rules behind ``hdistill new``: settings as pure functions of the data's shape and numbers and of the machine.

docs/recipes.md says what each number rests on. Those marked [ours] are choices.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hd_dmd import UniformLevels
from hd_meanflow import LogitNormalTimes, MeanFlowLoss
from hd_trainer.checks import check_number
from hd_trainer.engine.loop import LoopSettings
from hd_trainer.engine.optimizer import OptimizerSettings
from hd_trainer.errors import UserError
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.networks import ModelSettings, cost_of
from hd_trainer.settings import Settings
from hd_trainer.stages.discriminator import DiscriminatorSettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings

# ---- stage 2: what a search decides, in one place

GAN_WEIGHT = 3e-3
STUDENT_LR = 3e-4
FAKE_SCORE_LR = 5e-4
DISCRIMINATOR_LR = 1e-3
STUDENT_UPDATE_EVERY = 3
DISCRIMINATOR_LEVELS = (0.02, 0.98)

# ---- the stages before it

TEACHER_LR, TRAJECTORY_LR = 2e-3, 1e-3
#: One-step sampling alone is asked of the student, so half of its intervals are (0, 1).
TIMES = LogitNormalTimes(interval_share=0.5, endpoint_share=0.5)
#: The plain squared error: the better one on digits and moons, see docs/results.md.
LOSS = MeanFlowLoss(p=0.0)

# ---- time

MINUTES = {"cpu": 12.0, "cuda": 60.0}
#: Share of the minutes that is left for the evaluation and the report.
EVALUATION_SHARE = 0.25
SHARES = {"teacher": 0.35, "trajectory": 0.2, "distribution": 0.45}
#: Multiply-adds of a step, in forward passes of its batch.
PASSES = {"teacher": 3.0, "trajectory": 5.3, "distribution": 8.8}
#: Multiply-adds a second: of one core in float32 and where bfloat16 runs in hardware, and of one GPU.
RATE = {"fp32": 30e9, "bf16": 50e9, "cuda": 5e12}
#: A pass of a small network is many small operations: seconds that it takes however few its multiply-adds are.
LEAST_PASS = {"cpu": 0.006, "cuda": 0.01}
LEAST_STEPS = {"teacher": 600, "trajectory": 300, "distribution": 300}
MOST_STEPS = 100_000
#: A teacher that sees each image more often than this begins to learn the images by heart. The students' stages are
#: kept to a share of its steps.
MOST_EPOCHS = 200
MOST_OF_TEACHER = {"teacher": 1.0, "trajectory": 0.5, "distribution": 0.75}

# ---- networks, the smallest first

SMALL_SIDE = 16
PATCH_2 = (ModelSettings(name="dit_nano_2"), ModelSettings(name="dit_nano_2", width=128))
PATCH_4 = (
    ModelSettings(name="dit_micro_4"),
    ModelSettings(name="dit_mini_4"),
    ModelSettings(name="dit_mini_4", width=384, depth=12),
)
#: A larger network is taken where this many steps of its teacher fit into the time, and there are images enough.
WORTH_STEPS, WORTH_SAMPLES = 4_000, 10_000


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the rules look at."""

    shape: tuple[int, int, int]
    """channels, height, width of a sample"""
    samples: int
    """for training"""
    classes: int
    """0 for none"""
    pictures: bool = True
    """whether the samples are images, or have a decoder, rather than latents alone"""
    device: str = "cpu"
    """"cpu" or "cuda" """
    cores: int = 2
    """that PyTorch computes with; of a GPU they do not count"""
    bf16: bool = False
    """whether the CPU multiplies in bfloat16 by hardware"""
    teacher_multiply_adds: int | None = None
    """of a forward pass of one sample, of a teacher that is given; None: one is trained"""
    minutes: float | None = None
    """the whole run, evaluation and report included; None: see MINUTES"""

    def __post_init__(self) -> None:
        if self.minutes is not None:
            check_number(above=True, high=1e5, minutes=self.minutes)
        _, height, width = self.shape
        if not self.has_teacher and (height != width or height % 2):
            raise UserError(
                f"networks take square samples with an even side; the data has {height} x {width}: "
                "choose another size, e.g. folder:PATH?size=32"
            )

    @property
    def kind(self) -> str:
        """ "cpu", or "cuda" for any accelerator."""
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is given."""
        return self.teacher_multiply_adds is not None

    @property
    def training_seconds(self) -> float:
        """Time for the three stages."""
        return 60 * (self.minutes or MINUTES[self.kind]) * (1 - EVALUATION_SHARE)


def shares_of(facts: Facts) -> dict[str, float]:
    """Share of the training time of each stage that is trained."""
    shares = {stage: share for stage, share in SHARES.items() if stage != "teacher" or not facts.has_teacher}
    return {stage: share / sum(shares.values()) for stage, share in shares.items()}


def step_seconds(facts: Facts, model: ModelSettings, stage: str, batch: int) -> float:
    """Estimated time of a step: multiply-adds over their rate."""
    rate = RATE["cuda"] if facts.kind == "cuda" else RATE["bf16" if facts.bf16 else "fp32"] * facts.cores
    a_sample = facts.teacher_multiply_adds
    if a_sample is None:
        a_sample = cost_of(model, facts.shape, facts.classes).multiply_adds
    work = batch * a_sample
    return PASSES[stage] * (LEAST_PASS[facts.kind] + work / rate)


def batch_of(facts: Facts) -> int:
    """64 on a CPU, where a step's time grows with the batch; 256 on a GPU; at most an eighth of the images."""
    batch = 64 if facts.kind == "cpu" else 256
    while batch > 8 and batch > facts.samples // 8:
        batch //= 2
    return batch


def model_of(facts: Facts) -> ModelSettings:
    """Patches of 2 up to 16 pixels a side, else of 4; the largest network that the time and the images are worth."""
    if facts.has_teacher:
        return ModelSettings()  # not used
    _, _, side = facts.shape
    chosen, *larger = PATCH_2 if side <= SMALL_SIDE or side % 4 else PATCH_4
    for model in larger:
        seconds = step_seconds(facts, model, "teacher", batch_of(facts))
        fits = facts.training_seconds * SHARES["teacher"] / seconds >= WORTH_STEPS
        if fits and facts.samples >= WORTH_SAMPLES:
            chosen = model
    return chosen


def steps_of(facts: Facts) -> dict[str, int]:
    """Steps of each stage: its share of the time over the estimated time of a step, within bounds."""
    model, batch = model_of(facts), batch_of(facts)
    most = min(MOST_STEPS, MOST_EPOCHS * facts.samples // batch)
    found = {"teacher": 1}  # where one is given
    for stage, share in shares_of(facts).items():
        fitting = facts.training_seconds * share / step_seconds(facts, model, stage, batch)
        found[stage] = _round(max(LEAST_STEPS[stage], min(most * MOST_OF_TEACHER[stage], fitting)))
    return found


def estimated_minutes(facts: Facts) -> float:
    """Of the whole run by the rules' own rates; ``--dry-run`` measures."""
    model, batch, steps = model_of(facts), batch_of(facts), steps_of(facts)
    training = sum(steps[stage] * step_seconds(facts, model, stage, batch) for stage in shares_of(facts))
    return training / (1 - EVALUATION_SHARE) / 60


def evaluation_of(facts: Facts) -> EvaluationSettings:
    """As many images as there are, up to 1,000 on a CPU and 10,000 on a GPU; the teacher's most steps there."""
    samples = max(10, min(facts.samples, 1_000 if facts.kind == "cpu" else 10_000))
    teacher_steps = (1, 4, 25) if facts.kind == "cpu" else (1, 4, 50, 250)
    extractors = ("classifier",) if facts.classes and facts.pictures else ()
    return EvaluationSettings(extractors=extractors, samples=samples, teacher_steps=teacher_steps, timing_repeats=3)


def settings_of(facts: Facts, data: str, recipe: str, teacher: str | None = None) -> Settings:
    """All of them together."""
    batch, steps = batch_of(facts), steps_of(facts)
    return Settings(
        recipe=recipe,
        data=data,
        teacher_source=teacher,
        model=model_of(facts),
        loop=LoopSettings(checkpoint_every=max(200, _round(max(steps.values()) / 10))),
        teacher=TeacherSettings(steps=steps["teacher"], batch=batch, optimizer=OptimizerSettings(lr=TEACHER_LR)),
        trajectory=TrajectorySettings(
            steps=steps["trajectory"],
            batch=batch,
            times=TIMES,
            meanflow=LOSS,
            optimizer=OptimizerSettings(lr=TRAJECTORY_LR),
        ),
        distribution=DistributionSettings(
            steps=steps["distribution"],
            batch=batch,
            student_update_every=STUDENT_UPDATE_EVERY,
            optimizer=OptimizerSettings(lr=STUDENT_LR),
            fake_score_optimizer=OptimizerSettings(lr=FAKE_SCORE_LR, schedule="constant"),
            discriminator=DiscriminatorSettings(
                gan_weight=GAN_WEIGHT,
                noise_levels=UniformLevels(low=DISCRIMINATOR_LEVELS[0], high=DISCRIMINATOR_LEVELS[1]),
                optimizer=OptimizerSettings(lr=DISCRIMINATOR_LR, betas=(0.0, 0.99), schedule="constant"),
            ),
        ),
        evaluation=evaluation_of(facts),
    )


def shortened(settings: Settings) -> Settings:
    """The same path in seconds, for tests: every line of code runs, no picture is good."""
    wanted = settings.evaluation
    extractors = ("none",) if "classifier" in wanted.extractors else wanted.extractors  # it would have to be trained
    few: dict[str, Any] = {"steps": 20, "batch": min(16, settings.teacher.batch)}
    return dataclasses.replace(
        settings,
        loop=LoopSettings(log_every=5, checkpoint_every=20),
        teacher=dataclasses.replace(settings.teacher, **few),
        trajectory=dataclasses.replace(settings.trajectory, **few),
        distribution=dataclasses.replace(settings.distribution, **few),
        evaluation=dataclasses.replace(
            wanted, samples=50, teacher_steps=(1, 4), timing_repeats=1, seeds=1, extractors=extractors
        ),
    )


def _round(number: float) -> int:
    """Down to two leading digits: nobody reads meaning into 1,437 steps."""
    whole = int(number)
    unit = 10 ** max(0, len(str(whole)) - 2)
    return max(1, whole // unit * unit)
