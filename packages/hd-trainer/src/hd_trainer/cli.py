"""The ``hdistill`` command. Flags of ``run`` and ``train`` are generated from the recipe's settings."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from hd_trainer.errors import UserError
from hd_trainer.settings import Settings

T = TypeVar("T")

HELP = """\
hdistill: turn a many-step diffusion or flow teacher into a one-step generator.

  hdistill run RECIPE          train teacher, stage 1 and stage 2, evaluate, write report.html
  hdistill train STAGE RECIPE  one stage alone: teacher, trajectory or distribution
  hdistill sample FOLDER       draw images with the weights of a stage
  hdistill evaluate RUN        measure the stages of a run again
  hdistill report RUN          write a run's report.html again

Recipes:
{recipes}
Examples:
  hdistill run digits                                    # minutes on two CPU cores, into runs/digits
  hdistill run digits --smoke                            # the same path in seconds
  hdistill run digits --help                             # every setting, with its default
  hdistill run digits --out runs/gap --distribution.adversary.pooling mean
  hdistill sample runs/digits/distribution --count 40 --labels 3 7 --out threes-and-sevens.png

Whatever is stopped goes on where it was: give the same command again.
"""

HELP_FLAGS = ("-h", "--help")


@dataclass(frozen=True)
class SampleOptions:
    """Draw images with the weights of a stage."""

    folder: tyro.conf.Positional[Path]
    """a stage's folder (holds model.safetensors and config.json), e.g. runs/digits/distribution"""
    out: Path = Path("samples.png")
    """the picture to write"""
    count: int = 100
    """number of images, in rows of ten"""
    labels: tuple[int, ...] = ()
    """classes, repeated over the images; none given: all in turn"""
    seed: int = 0
    """of the noise; image i of a seed is the same picture at every count"""
    steps: int | None = None
    """jumps of a student (default 1) or Euler steps of a teacher (default 50)"""
    guidance_scale: float = 1.0
    """classifier-free guidance of a teacher; 1 is none"""
    device: str = "auto"
    """"auto", "cpu", "cuda" ..."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder."""

    folder: tyro.conf.Positional[Path]
    """made by `hdistill run`, e.g. runs/digits"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 a fault of ours, 2 bad input (one line on stderr), 130 stopped on request."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": _run,
        "train": _train,
        "sample": _sample,
        "evaluate": _evaluate,
        "report": _report,
    }
    from hd_trainer.loop import Stopped

    try:
        if not arguments or arguments[0] in (*HELP_FLAGS, "help"):
            print(_help())
        elif arguments[0] == "--version":
            from hd_trainer import __version__

            print(f"hdistill {__version__}")
        elif arguments[0] not in commands:
            raise UserError(f"unknown command {arguments[0]!r}; known: {', '.join(commands)} (try hdistill --help)")
        else:
            commands[arguments[0]](arguments[1:])
    except UserError as error:
        return _fail(error, 2)
    except BrokenPipeError:
        # Whoever read the output has seen enough, e.g. `| head`; the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error}; check that the folder can be written and that the disk is not full", 2)
    except Stopped as stopped:
        return _fail(stopped, 130)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the newest checkpoint", 130)
    return 0


def _fail(message: object, code: int) -> int:
    """Print the message as one line, whatever is in it, and hand back the exit code."""
    print(f"hdistill: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _run(arguments: list[str]) -> None:
    from hd_trainer.run import run

    if arguments[:1] and arguments[0] in HELP_FLAGS:
        return _print_usage("run")
    settings, out, _ = _settings_from("run", arguments)
    run(settings, out)


def _train(arguments: list[str]) -> None:
    from hd_trainer.run import check, train_stage
    from hd_trainer.stages import STAGES

    if not arguments or arguments[0] in HELP_FLAGS:
        _print_usage("train STAGE")
        print(f"\nSTAGE is one of {', '.join(STAGES)}. A stage reads the weights of the one before it from --out, or")
        print("from the folders given by --teacher-weights and --student-weights.")
        return
    if arguments[0] not in STAGES:
        raise UserError(f"unknown stage {arguments[0]!r}; known: {', '.join(STAGES)}")
    if arguments[1:2] and arguments[1] in HELP_FLAGS:
        return _print_usage(f"train {arguments[0]}")
    settings, out, weights = _settings_from(f"train {arguments[0]}", arguments[1:])
    check(settings)
    train_stage(
        arguments[0],
        settings,
        out,
        teacher_folder=weights.get("teacher_weights"),
        student_folder=weights.get("student_weights"),
    )


def _sample(arguments: list[str]) -> None:
    from hd_trainer.sample import sample

    options = _parse(SampleOptions, arguments, "hdistill sample")
    sample(**dataclasses.asdict(options))


def _evaluate(arguments: list[str]) -> None:
    from hd_trainer.run import evaluate, read_settings

    folder = _parse(RunFolder, arguments, "hdistill evaluate").folder
    evaluate(read_settings(folder), folder)


def _report(arguments: list[str]) -> None:
    from hd_trainer.report import write_report
    from hd_trainer.run import read_settings

    folder = _parse(RunFolder, arguments, "hdistill report").folder
    print(f"Wrote {write_report(read_settings(folder), folder)}")


def _settings_from(command: str, arguments: list[str]) -> tuple[Settings, Path, dict[str, Path]]:
    """(settings, run folder, weights given) from ``RECIPE [flags]``; the flags and their defaults are the recipe's."""
    from hd_trainer.recipes import RECIPES, load_recipe

    if not arguments or arguments[0].startswith("-"):
        known = ", ".join(RECIPES)
        example = f"hdistill {command} {next(iter(RECIPES))}"
        raise UserError(f"hdistill {command} needs a recipe first; known: {known} (e.g. {example})")
    recipe, rest = arguments[0], arguments[1:]
    smoke = "--smoke" in rest
    kind = _TrainOptions if command.startswith("train") else _RunOptions
    defaults = kind(settings=load_recipe(recipe, smoke=smoke), out=Path("runs") / (recipe + "-smoke" * smoke))
    options = _parse(kind, rest, f"hdistill {command} {recipe}", default=defaults)
    weights = {name: getattr(options, name, None) for name in ("teacher_weights", "student_weights")}
    return options.settings, options.out, {name: path for name, path in weights.items() if path is not None}


@dataclass(frozen=True, kw_only=True)
class _RunOptions:
    """Train teacher, stage 1 and stage 2, evaluate and report. Done parts are kept, stopped ones go on."""

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    out: Path
    """the run's folder"""
    smoke: bool = False
    """the recipe's short form: the same path through the code in seconds, for tests"""


@dataclass(frozen=True, kw_only=True)
class _TrainOptions(_RunOptions):
    """Train one stage."""

    teacher_weights: Path | None = None
    """folder of the teacher's weights; none given: OUT/teacher"""
    student_weights: Path | None = None
    """folder of the weights that stage `distribution` starts from; none given: OUT/trajectory"""


def _parse(kind: type[T], arguments: list[str], program: str, default: T | None = None) -> T:
    """tyro's parser; its framed errors become the one line that every error of this command is."""
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            config = (tyro.conf.FlagCreatePairsOff,)
            parsed: Any = tyro.cli(kind, args=arguments, prog=program, default=default, config=config)
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_unframed(framed.getvalue())} (try {program} --help)") from None


def _unframed(text: str) -> str:
    """The message inside tyro's box, as one line; of suggested flags their names alone."""
    boxed = "╭" in text  # else stdout is not UTF-8: rules are hyphens, and the title is a section of its own
    parts: list[list[str]] = [[]]
    for line in (line.strip(" │╰╯") for line in text.splitlines() if not line.startswith("╭")):
        if line.strip("─-"):
            parts[-1].append(line)
        else:
            parts.append([])
    sections = [part for part in parts if part][0 if boxed else 1 :]
    message = " ".join(sections[0]).replace("Error parsing settings.", "")
    flags = [line.split()[0] for section in sections[1:] for line in section if line.startswith("--")]
    suggested = any(line.startswith("Perhaps you meant") for section in sections[1:] for line in section)
    return f"{message}; perhaps you meant {' or '.join(flags)}" if suggested and flags else message


def _help() -> str:
    return HELP.format(recipes=_recipes())


def _print_usage(command: str) -> None:
    print(f"usage: hdistill {command} RECIPE [flags]\n\nRecipes:\n{_recipes()}")
    print(f"hdistill {command} RECIPE --help lists every flag with the recipe's default.")


def _recipes() -> str:
    from hd_trainer.recipes import list_recipes

    return "".join(f"  {name:12s} {line}\n" for name, line in list_recipes().items())


if __name__ == "__main__":
    sys.exit(main())
