"""What each command of ``hdistill`` does. A command imports what it needs itself: help must not wait for PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hd_trainer import signals
from hd_trainer.errors import UserError

RECIPES_HELP = "Recipes, or a file (path/to/recipe.py:function, or a run's recipe.json):"
HELP_FLAGS = ("-h", "--help")
STAGES_HELP = """
STAGE is one of teacher, trajectory, distribution. A stage reads the weights of the one before it from --out, or
from the folders given by --teacher-weights and --student-weights."""


def run_command(arguments: list[str]) -> None:
    if arguments[:1] and arguments[0] in HELP_FLAGS:
        return _print_usage("run")
    with signals.held():
        from hd_trainer.pipeline import run
        from hd_trainer.run_options import parse_settings
    options = parse_settings("run", arguments)
    run(
        options.settings,
        options.out,
        teacher_weights=options.teacher_weights,
        student_weights=options.student_weights,
    )


def train_command(arguments: list[str]) -> None:
    if not arguments or arguments[0] in HELP_FLAGS:
        _print_usage("train STAGE")
        print(STAGES_HELP)
        return
    from hd_trainer.stages import STAGES

    if arguments[0] not in STAGES:
        raise UserError(f"unknown stage {arguments[0]!r}; known: {', '.join(STAGES)}")
    if arguments[1:2] and arguments[1] in HELP_FLAGS:
        return _print_usage(f"train {arguments[0]}")
    with signals.held():
        from hd_trainer.pipeline import check, context_of, train_stage
        from hd_trainer.run_options import parse_settings
    options = parse_settings(f"train {arguments[0]}", arguments[1:])
    context = context_of(options.settings)
    given = {"teacher_weights": options.teacher_weights, "student_weights": options.student_weights}
    check(options.settings, context, **given)
    train_stage(arguments[0], options.settings, context, options.out, **given)


def sample_command(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import SampleOptions, parse
    options = parse(SampleOptions, arguments, "hdistill sample")
    with signals.held():
        from hd_trainer.sample import sample
    sample(**vars(options))


def evaluate_command(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import FolderOptions, parse
    folder = parse(FolderOptions, arguments, "hdistill evaluate").folder
    with signals.held():
        from hd_trainer.pipeline import evaluate_folder
    evaluate_folder(folder)


def report_command(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import ReportOptions, parse
    options = parse(ReportOptions, arguments, "hdistill report")
    with signals.held():
        from hd_trainer.pipeline import report_folders
    print(f"Wrote {report_folders(options.folders, options.out)}")


def export_command(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import ExportOptions, parse
    options = parse(ExportOptions, arguments, "hdistill export")
    with signals.held():
        from hd_trainer.pipeline import export_folder
    print(f"Wrote {export_folder(options.folder, options.out, name=options.name, license=options.license)}")


def list_command(arguments: list[str]) -> None:
    if arguments[-1:] and arguments[-1] in HELP_FLAGS:
        print("usage: hdistill list data\n\nWhat --data takes, with a line for each.")
        return
    if arguments != ["data"]:
        raise UserError(f"hdistill list shows: data; got {' '.join(arguments) or 'nothing'}")
    with signals.held():
        from hd_trainer.data import SOURCES
    print("".join(f"  {name:19s} {line}\n" for name, line in SOURCES.items()), end="")


def emoji_command(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import EmojiOptions, parse
    options = parse(EmojiOptions, arguments, "hdistill emoji")
    with signals.held():
        from hd_trainer.data.emoji_build import build_emoji
    print(f"Wrote {build_emoji(options.out, options.packages)}")


def _print_usage(command: str) -> None:
    print(f"usage: hdistill {command} RECIPE [flags]\n\n{RECIPES_HELP}\n{recipes_help()}")
    print(f"hdistill {command} RECIPE --help lists every flag with the recipe's default.")


def recipes_help() -> str:
    from hd_trainer.recipes import list_recipes

    return "".join(f"  {name:12s} {line}\n" for name, line in list_recipes().items())


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: how it is called, what it does in a line, and the function of its arguments."""

    usage: str
    line: str
    do: Callable[[list[str]], None]


#: By name, in the order of the help.
COMMANDS = {
    "run": Command(
        usage="RECIPE", line="train teacher, stage 1 and stage 2, evaluate, write report.html", do=run_command
    ),
    "train": Command(
        usage="STAGE RECIPE", line="one stage alone: teacher, trajectory or distribution", do=train_command
    ),
    "sample": Command(usage="FOLDER", line="draw images with the weights of a run or of a stage", do=sample_command),
    "evaluate": Command(usage="RUN", line="measure the stages of a run again", do=evaluate_command),
    "report": Command(
        usage="RUN [RUN ...]", line="write a run's report.html again, or compare several runs", do=report_command
    ),
    "export": Command(usage="RUN", line="write a run as a folder to upload, with a model card", do=export_command),
    "list": Command(usage="data", line="what --data takes", do=list_command),
    "emoji": Command(usage="", line="build the emoji set, once", do=emoji_command),
}
