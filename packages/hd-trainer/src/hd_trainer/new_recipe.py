"""``hdistill new``: a recipe file with settings chosen from the data, each beside the rule that chose it."""

from __future__ import annotations

import importlib.util
import keyword
from pathlib import Path

import torch

from hd_trainer import rules
from hd_trainer.data import load_data
from hd_trainer.engine.parallel import choose_device
from hd_trainer.engine.precision import has_bf16
from hd_trainer.errors import UserError
from hd_trainer.files import write_text
from hd_trainer.networks import counted_multiply_adds, load_teacher
from hd_trainer.recipes import RECIPES
from hd_trainer.settings import Settings

TEXT = '''\
"""{title}

    hdistill run {file} --dry-run    # what it will do, and how long that takes here
    hdistill run {file}              # into runs/{stem}; if it is stopped, the same command goes on

Written by `hdistill new`, and yours to change; docs/recipes.md explains the rules.
"""

from hd_dmd import UniformLevels
from hd_meanflow import LogitNormalTimes, MeanFlowLoss
from hd_trainer import Settings, rules
from hd_trainer.engine.loop import LoopSettings
from hd_trainer.engine.optimizer import OptimizerSettings
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.networks import ModelSettings
from hd_trainer.stages.discriminator import DiscriminatorSettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings


def recipe() -> Settings:
    return Settings(
        recipe=__file__,
        data={data},
        # {model_rule}
        {model},
        # A tenth of the longest stage, at least 200.
        loop=LoopSettings(checkpoint_every={checkpoint_every:_}),
        # {steps_rule}
        # {batch_rule}
        teacher={teacher}
        trajectory=TrajectorySettings(
            steps={trajectory.steps:_}, batch={trajectory.batch}, optimizer={trajectory_optimizer},
            # The student is asked for one step alone: half of its intervals are (0, 1).
            times=LogitNormalTimes(interval_share={times.interval_share}, endpoint_share={times.endpoint_share}),
            meanflow=MeanFlowLoss(p={p}),  # 0: the plain squared error, 1: every sample weighs alike
        ),
        distribution=DistributionSettings(
            steps={distribution.steps:_}, batch={distribution.batch}, optimizer={student_optimizer},
            student_update_every={distribution.student_update_every},
            # The fake score has to keep up with the student: it learns faster and more often.
            fake_score_optimizer={fake_score_optimizer},
            discriminator=DiscriminatorSettings(
                gan_weight={gan_weight},  # larger weights bring detail, and collapse sooner
                noise_levels=UniformLevels(low={levels.low}, high={levels.high}),
                optimizer={discriminator_optimizer},
            ),
        ),
        # {evaluation_rule}
        # {metric_rule}
        evaluation=EvaluationSettings(
            samples={evaluation.samples:_}, teacher_steps={evaluation.teacher_steps},
            timing_repeats={evaluation.timing_repeats}, extractors={extractors},
        ),
    )


def smoke() -> Settings:
    return rules.shortened(recipe())
'''


def new_recipe(
    name: str,
    data: str,
    teacher: str | None = None,
    out: Path | None = None,
    minutes: float | None = None,
    device: str = "auto",
) -> str:
    """Write the recipe ``name`` for a data set to ``out`` (None: ``name.py`` here); a line about it.

    Raises:
        UserError: for a name that is no identifier or is taken, a file that exists, or data or a teacher that
            cannot be used.
    """
    out = _checked(name, out)
    facts = facts_of(data, device, minutes, teacher)
    settings = rules.settings_of(facts, data, name, teacher)
    write_text(out, text_of(settings, facts, data, out))
    estimate = rules.estimated_minutes(facts)
    asked = facts.minutes or rules.MINUTES[facts.kind]
    long = estimate > 1.1 * asked
    advice = f", more than {asked:.0f}: smaller pictures (?size=32) take less" if long else ""
    return (
        f"Wrote {out}: {described(facts)}. By its rules about {estimate:.0f} min{advice}. "
        f"Next: hdistill run {out} --dry-run"
    )


def facts_of(data: str, device: str, minutes: float | None, teacher: str | None = None) -> rules.Facts:
    """What the rules look at, read from the data, the machine and the teacher."""
    found = load_data(data)
    channels, height, width = found.shape
    place = choose_device(device)
    work = None
    if teacher is not None:
        work = counted_multiply_adds(load_teacher(teacher, found, place), found, place)
    return rules.Facts(
        shape=(channels, height, width),
        samples=len(found.reference),
        classes=len(found.classes),
        pictures=found.holds_images or found.decode is not None,
        device=place.type,
        bf16=has_bf16(place),
        cores=torch.get_num_threads(),
        teacher_multiply_adds=work,
        minutes=minutes,
    )


def described(facts: rules.Facts) -> str:
    """The data in a few words: 1,800 samples of 3 x 32 x 32, 8 classes."""
    classes = f"{facts.classes} classes" if facts.classes else "no classes"
    return f"{facts.samples:,} samples of {' x '.join(map(str, facts.shape))}, {classes}"


def text_of(settings: Settings, facts: rules.Facts, data: str, file: Path) -> str:
    """The recipe's file; the function in it returns these settings."""
    evaluation, stages = settings.evaluation, settings.distribution
    judge = stages.discriminator
    minutes = facts.minutes or rules.MINUTES[facts.kind]
    machine = (
        f"{facts.cores} CPU core{'s' * (facts.cores > 1)}" if facts.kind == "cpu" else f"one {facts.device} device"
    )
    shares = "/".join(f"{100 * share:.0f}" for share in rules.shares_of(facts).values())
    return TEXT.format(
        title=f"{described(facts)}: about {rules.estimated_minutes(facts):.0f} min on {machine}.",
        file=file,
        stem=file.stem,
        data=_quoted(data),
        **_network(settings, facts),
        steps_rule=f"{minutes:g} min, a quarter of them for the evaluation; the rest is parted {shares} %.",
        batch_rule=f"Batches of {stages.batch}: 64 on a CPU, 256 on a GPU, at most an eighth of the images.",
        checkpoint_every=settings.loop.checkpoint_every,
        trajectory=settings.trajectory,
        distribution=stages,
        times=settings.trajectory.times,
        p=settings.trajectory.meanflow.p,
        trajectory_optimizer=_optimizer(settings.trajectory.optimizer.lr),
        student_optimizer=_optimizer(stages.optimizer.lr),
        fake_score_optimizer=_optimizer(stages.fake_score_optimizer.lr, 'schedule="constant"'),
        discriminator_optimizer=_optimizer(judge.optimizer.lr, f"betas={judge.optimizer.betas}", 'schedule="constant"'),
        gan_weight=judge.gan_weight,
        levels=judge.noise_levels,
        evaluation=evaluation,
        extractors=str(evaluation.extractors).replace("'", '"'),
        evaluation_rule=f"{evaluation.samples:,} images a row and seed: all there are, up to "
        + ("1,000 on a CPU." if facts.kind == "cpu" else "10,000 on a GPU."),
        metric_rule="There are classes: a small network that learns them measures the samples."
        if evaluation.extractors
        else "No classes: an ImageNet network measures, where one is installed (docs/evaluation.md).",
    )


def _network(settings: Settings, facts: rules.Facts) -> dict[str, str]:
    """What the file says of the teacher: one that is given, or a network to train."""
    model, teacher = settings.model, settings.teacher
    if settings.teacher_source is not None:
        return {
            "model_rule": f"{(facts.teacher_multiply_adds or 0) / 1e6:,.1f} million multiply-adds a sample.",
            "model": f"teacher_source={_quoted(settings.teacher_source)}",
            "teacher": f"TeacherSettings(steps={teacher.steps}, batch={teacher.batch}, "
            f"optimizer={_optimizer(teacher.optimizer.lr)}),  # not used: a teacher is given",
        }
    sizes = "".join(f", {name}={value}" for name in ("width", "depth") if (value := getattr(model, name)) is not None)
    patch, side = 2 if model.name.endswith("_2") else 4, facts.shape[2]
    smallest = model in (rules.PATCH_2[0], rules.PATCH_4[0])
    why = "The smallest network for them." if smallest else f"The largest one that leaves {rules.WORTH_STEPS:,} steps."
    epochs = teacher.steps * teacher.batch / facts.samples
    return {
        "model_rule": f"{side} pixels a side in patches of {patch}: {(side // patch) ** 2} tokens. {why}",
        "model": f'model=ModelSettings(name="{model.name}"{sizes})',
        "teacher": f"TeacherSettings(steps={teacher.steps:_}, batch={teacher.batch}, "
        f"optimizer={_optimizer(teacher.optimizer.lr)}),  # sees each image {epochs:.0f} times",
    }


def _optimizer(lr: float, *others: str) -> str:
    return f"OptimizerSettings({', '.join((f'lr={lr:g}', *others))})"


def _quoted(text: str) -> str:
    return '"' + text + '"' if text.isprintable() and not set(text) & set('"\\') else ascii(text)


def _checked(name: str, out: Path | None) -> Path:
    """Where the file goes.

    Raises:
        UserError: for a name or a place that cannot be used.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(
            f"a recipe's name must be a Python name (letters, digits, _; no digit first); got {name[:60]!r}"
        )
    if name in RECIPES:
        raise UserError(f"{name} is a recipe that comes with hdistill; choose another name")
    out = out or Path(f"{name}.py")
    if out.suffix != ".py":
        raise UserError(f"a recipe's file must end in .py; got {out}")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; choose another name, or another --out")
    if not out.parent.is_dir():
        raise UserError(f"no folder {out.parent}; make it first, or choose another --out")
    if importlib.util.find_spec(out.stem) is not None:
        raise UserError(f"{out.name} would hide the Python module {out.stem!r}; choose another name")
    return out
