"""The flags of ``hdistill run`` and ``hdistill train``: a recipe's settings, and where to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hd_trainer.errors import UserError
from hd_trainer.options import parse
from hd_trainer.recipes import RECIPES, load_recipe
from hd_trainer.run_folder import RECIPE, brought, check_sources
from hd_trainer.settings import Settings


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Train teacher, stage 1 and stage 2, evaluate and report. Done parts are kept, stopped ones go on."""

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    out: Path
    """the run's folder"""
    smoke: bool = False
    """the recipe's short form: the same path through the code in seconds, for tests"""
    dry_run: bool = False
    """say what would happen, how large it is and how long it takes, from a few measured steps; write nothing"""
    teacher_weights: Path | None = None
    """another name of --teacher, for a folder"""
    student_weights: Path | None = None
    """folder of the student that stage 2 starts from; none given: OUT/trajectory"""


def parse_settings(command: str, arguments: list[str]) -> RunOptions:
    """Options from ``RECIPE [flags]``; the flags and their defaults are the recipe's.

    Raises:
        UserError: for a missing or unknown recipe, or a flag that does not fit.
    """
    if not arguments or arguments[0].startswith("-"):
        known = ", ".join(RECIPES)
        example = f"hdistill {command} {next(iter(RECIPES))}"
        raise UserError(f"hdistill {command} needs a recipe first; known: {known} (e.g. {example})")
    recipe, rest = arguments[0], arguments[1:]
    smoke = "--smoke" in rest
    settings = load_recipe(recipe, smoke=smoke)
    if recipe.endswith(".json"):
        return _again(command, recipe, settings, rest)
    if settings.recipe != recipe:
        settings = dataclasses.replace(settings, recipe=recipe)
    name = Path(recipe.partition(":")[0]).stem
    defaults = RunOptions(settings=settings, out=Path("runs") / (name + "-smoke" * smoke))
    return with_teacher(parse(RunOptions, rest, f"hdistill {command} {recipe}", default=defaults))


def _again(command: str, recipe: str, settings: Settings, rest: list[str]) -> RunOptions:
    """Options of a run's recipe.json: its settings as they are, and the weights that were brought to that run.

    Raises:
        UserError: also if these weights are gone or are others by now.
    """
    folder = Path(recipe).resolve().parent
    student = brought(folder).get("student")
    name = f"{folder.name}-again" if Path(recipe).name == RECIPE else Path(recipe).stem
    weights = None if student is None else Path(student)
    defaults = RunOptions(settings=settings, out=Path("runs") / name, student_weights=weights)
    options = with_teacher(parse(RunOptions, rest, f"hdistill {command} {recipe}", default=defaults))
    same = {
        "teacher": (options.settings.teacher_source, settings.teacher_source),
        "student": (options.student_weights, weights),
    }
    check_sources(folder, {name: was for name, (now, was) in same.items() if was is not None and now == was})
    return options


def with_teacher(options: RunOptions) -> RunOptions:
    """The options with what ``--teacher-weights`` names as the settings' teacher.

    Raises:
        UserError: if both flags name one.
    """
    if options.teacher_weights is None:
        return options
    source, folder = options.settings.teacher_source, str(options.teacher_weights)
    if source not in (None, folder):
        raise UserError(f"--teacher and --teacher-weights are one setting; got {source} and {folder}: give one of them")
    return dataclasses.replace(options, settings=dataclasses.replace(options.settings, teacher_source=folder))
