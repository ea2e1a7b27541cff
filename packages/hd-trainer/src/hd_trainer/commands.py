"""What each command of ``hdistill`` does. A command imports what it needs itself: help must not wait for PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hd_trainer import signals
from hd_trainer.errors import UserError

RECIPES_HELP = "Recipes, or a file (path/to/recipe.py:function, or a run's recipe.json):"
HELP_FLAGS = ("-h", "--help")
STAGES_HELP = """
STAGE is one of teacher, trajectory, distribution. A stage reads the weights of the one before it from --out, or
from what --teacher and --student-weights name."""


def run_command(arguments: list[str]) -> None:
    if arguments[:1] and arguments[0] in HELP_FLAGS:
        return _print_usage("run")
    with signals.held():
        from hd_trainer.pipeline import run
        from hd_trainer.run_options import parse_settings
    options = parse_settings("run", arguments)
    if options.dry_run:
        return _print_plan(options.settings, options.out, student_weights=options.student_weights)
    run(options.settings, options.out, student_weights=options.student_weights)


def new_command(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import NewOptions, parse
    options = parse(NewOptions, arguments, "hdistill new")
    with signals.held():
        from hd_trainer.new_recipe import new_recipe
    print(new_recipe(**vars(options)))


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
    if options.dry_run:
        stages, given = (arguments[0],), options.student_weights
        return _print_plan(options.settings, options.out, stages=stages, student_weights=given)
    context = context_of(options.settings)
    check(options.settings, context, options.student_weights)
    train_stage(arguments[0], options.settings, context, options.out, student_weights=options.student_weights)


def sample_command(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import SampleOptions, parse
    options = parse(SampleOptions, arguments, "hdistill sample")
    with signals.held():
        from hd_trainer.sample import sample
    sample(**vars(options))


def evaluate_command(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import EvaluateOptions, parse
    options = parse(EvaluateOptions, arguments, "hdistill evaluate")
    with signals.held():
        from hd_trainer.evaluation.outside import evaluate_pictures
        from hd_trainer.pipeline import evaluate_folder
    if options.against is None:
        if options.out is not None or options.device != "auto":
            raise UserError("--out and --device are for pictures, with --against; a run has its own")
        evaluate_folder(Path(options.path), options.extractors)
    else:
        evaluate_pictures(options.path, options.against, options.extractors, options.out, options.device)


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
    if arguments[-1:] and arguments[-1] in HELP_FLAGS and arguments[0] != "layers":  # which has options of its own
        lines = "".join(f"  hdistill list {name:10s} {one.line}\n" for name, one in LISTS.items())
        print(f"usage: hdistill list {{{','.join(LISTS)}}}\n\n{lines}", end="")
        return
    if not arguments or arguments[0] not in LISTS:
        raise UserError(f"hdistill list shows: {', '.join(LISTS)}; got {' '.join(arguments) or 'nothing'}")
    LISTS[arguments[0]].do(arguments[1:])


def list_data(arguments: list[str]) -> None:
    _none_of(arguments, "data")
    with signals.held():
        from hd_trainer.data import SOURCES
    print("".join(f"  {name:19s} {line}\n" for name, line in SOURCES.items()), end="")


def list_recipes(arguments: list[str]) -> None:
    _none_of(arguments, "recipes")
    print(recipes_help(), end="")
    print(f"  {'FILE.py':12s} a function of yours, FILE.py:FUNCTION; `hdistill new NAME --data DATA` writes one")
    print(f"  {'recipe.json':12s} of a run's folder: that run again, exactly")


def list_models(arguments: list[str]) -> None:
    _none_of(arguments, "models")
    with signals.held():
        from hd_trainer.networks.listing import model_lines
    print("\n".join(model_lines()))


def list_layers(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import LayersOptions, parse
    options = parse(LayersOptions, arguments, "hdistill list layers")
    with signals.held():
        from hd_trainer.networks.listing import layer_lines
    print("\n".join(layer_lines(options.teacher, options.data, every=options.every)))


def _none_of(arguments: list[str], name: str) -> None:
    if arguments:
        raise UserError(f"hdistill list {name} takes nothing more; got {' '.join(arguments)}")


def emoji_command(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import EmojiOptions, parse
    options = parse(EmojiOptions, arguments, "hdistill emoji")
    with signals.held():
        from hd_trainer.data.emoji_build import build_emoji
    print(f"Wrote {build_emoji(options.out, options.packages)}")


def _print_plan(*arguments: Any, **given: Any) -> None:
    with signals.held():
        from hd_trainer.dry_run import dry_run, format_plan
    print(format_plan(dry_run(*arguments, **given)))


def _print_usage(command: str) -> None:
    print(f"usage: hdistill {command} RECIPE [flags]\n\n{RECIPES_HELP}\n{recipes_help()}")
    print(f"hdistill {command} RECIPE --help lists every flag with the recipe's default.")


def recipes_help() -> str:
    from hd_trainer.recipes import list_recipes

    return "".join(f"  {name:12s} {line}\n" for name, line in list_recipes().items())


@dataclass(frozen=True, kw_only=True)
class Sublist:
    """One of ``hdistill list``'s: a line of help, and the function of what follows its name."""

    line: str
    do: Callable[[list[str]], None]


#: By name, in the order of the help.
LISTS = {
    "recipes": Sublist(line="what run and train take first", do=list_recipes),
    "data": Sublist(line="what --data takes", do=list_data),
    "models": Sublist(line="networks by name, for --model.name and --teacher NAME:FILE", do=list_models),
    "layers": Sublist(line="TEACHER: what --distribution.discriminator.layers can name", do=list_layers),
}


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
    "new": Command(
        usage="NAME --data DATA [--teacher T]", line="write a recipe for your data, to run or to change", do=new_command
    ),
    "train": Command(
        usage="STAGE RECIPE", line="one stage alone: teacher, trajectory or distribution", do=train_command
    ),
    "sample": Command(usage="FOLDER", line="draw images with the weights of a run or of a stage", do=sample_command),
    "evaluate": Command(
        usage="PATH", line="measure a run again, or pictures --against a data set", do=evaluate_command
    ),
    "report": Command(
        usage="RUN [RUN ...]", line="write a run's report.html again, or compare several runs", do=report_command
    ),
    "export": Command(usage="RUN", line="write a run as a folder to upload, with a model card", do=export_command),
    "list": Command(usage="|".join(LISTS), line="what there is of each", do=list_command),
    "emoji": Command(usage="", line="build the emoji set, once", do=emoji_command),
}
