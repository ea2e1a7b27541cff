"""The ``hdistill`` command. A command imports what it needs itself: help must not wait for PyTorch."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from hd_trainer import signals
from hd_trainer.errors import UserError

HELP = """\
hdistill: turn a many-step diffusion or flow teacher into a one-step generator.

  hdistill run RECIPE          train teacher, stage 1 and stage 2, evaluate, write report.html
  hdistill train STAGE RECIPE  one stage alone: teacher, trajectory or distribution
  hdistill sample FOLDER       draw images with the weights of a run or of a stage
  hdistill evaluate RUN        measure the stages of a run again
  hdistill report RUN          write a run's report.html again
  hdistill list data           what --data takes
  hdistill emoji               build the emoji set, once

{title}
{recipes}
Examples:
  hdistill run digits                                    # minutes on two CPU cores, into runs/digits
  hdistill run digits --smoke                            # the same path in seconds
  hdistill run digits --help                             # every setting, with its default
  hdistill run digits --out runs/gap --distribution.discriminator.pooling mean \\
      --teacher-weights runs/digits/teacher --student-weights runs/digits/trajectory
  hdistill sample runs/digits --count 40 --labels 3 7 --out threes-and-sevens.png

Whatever is stopped goes on where it was: give the same command again.
"""

RECIPES_HELP = "Recipes, or a file (path/to/recipe.py:function, or a run's recipe.json):"
HELP_FLAGS = ("-h", "--help")
STAGES_HELP = """
STAGE is one of teacher, trajectory, distribution. A stage reads the weights of the one before it from --out, or
from the folders given by --teacher-weights and --student-weights."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: 0 done, 1 a fault of ours, 2 bad input (one line on stderr), 130 stopped on request."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with signals.listening():
        try:
            code, line = _answer(arguments)
            signals.finish()
        except KeyboardInterrupt:
            signals.finish()
            code, line = 130, signals.INTERRUPTED
        if line:
            _complain(line)
    return code


def entry() -> None:
    """The installed command: :func:`main` in a process of its own, whose last lines nothing interrupts."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder above may be named in other bytes than UTF-8
    with signals.listening():
        code = main()
        signals.ignore_from_now_on()
    sys.exit(code)


def _answer(arguments: list[str]) -> tuple[int, str]:
    """Do what is asked; the exit code, and the line to print if it is not 0."""
    try:
        _dispatch(arguments)
    except UserError as error:
        return 2, str(error)
    except BrokenPipeError:
        # Whoever read the output has seen enough, e.g. `| head`; the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return 2, f"{error}; check that the folder can be written and that the disk is not full"
    except signals.Stopped as stopped:
        return 130, str(stopped)
    except Exception:
        # A library may turn the interruption into an error of its own, e.g. a failed import.
        if not signals.asked():
            raise
        return 130, signals.INTERRUPTED
    return 0, ""


def _dispatch(arguments: list[str]) -> None:
    for argument in arguments:
        if not _is_utf8(argument):  # safetensors and JSON could not name such a file
            raise UserError(f"arguments must be UTF-8; got {argument!a}")
    commands: dict[str, Callable[[list[str]], None]] = {
        "run": _run,
        "train": _train,
        "sample": _sample,
        "evaluate": _evaluate,
        "report": _report,
        "list": _list,
        "emoji": _emoji,
    }
    if not arguments or arguments[0] in (*HELP_FLAGS, "help"):
        print(HELP.format(title=RECIPES_HELP, recipes=_recipes()))
    elif arguments[0] == "--version":
        from hd_trainer.version import __version__

        print(f"hdistill {__version__}")
    elif arguments[0] not in commands:
        raise UserError(f"unknown command {arguments[0]!r}; known: {', '.join(commands)} (try hdistill --help)")
    else:
        commands[arguments[0]](arguments[1:])


def _run(arguments: list[str]) -> None:
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


def _train(arguments: list[str]) -> None:
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


def _sample(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import SampleOptions, parse
    options = parse(SampleOptions, arguments, "hdistill sample")
    with signals.held():
        from hd_trainer.sample import sample
    sample(**vars(options))


def _evaluate(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import FolderOptions, parse
    folder = parse(FolderOptions, arguments, "hdistill evaluate").folder
    with signals.held():
        from hd_trainer.pipeline import evaluate_folder
    evaluate_folder(folder)


def _report(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import FolderOptions, parse
    folder = parse(FolderOptions, arguments, "hdistill report").folder
    with signals.held():
        from hd_trainer.pipeline import report_folder
    print(f"Wrote {report_folder(folder)}")


def _list(arguments: list[str]) -> None:
    if arguments[-1:] and arguments[-1] in HELP_FLAGS:
        print("usage: hdistill list data\n\nWhat --data takes, with a line for each.")
        return
    if arguments != ["data"]:
        raise UserError(f"hdistill list shows: data; got {' '.join(arguments) or 'nothing'}")
    with signals.held():
        from hd_trainer.data import SOURCES
    print("".join(f"  {name:19s} {line}\n" for name, line in SOURCES.items()), end="")


def _emoji(arguments: list[str]) -> None:
    with signals.held():
        from hd_trainer.options import EmojiOptions, parse
    options = parse(EmojiOptions, arguments, "hdistill emoji")
    with signals.held():
        from hd_trainer.data.emoji_build import build_emoji
    print(f"Wrote {build_emoji(options.out, options.packages)}")


def _complain(message: str) -> None:
    """Print the message as one line, whatever is in it."""
    line = " ".join(message.split())
    with contextlib.suppress(OSError):  # stderr may go to the very disk that is full
        print(f"hdistill: {line}".encode(errors="backslashreplace").decode(), file=sys.stderr)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _print_usage(command: str) -> None:
    print(f"usage: hdistill {command} RECIPE [flags]\n\n{RECIPES_HELP}\n{_recipes()}")
    print(f"hdistill {command} RECIPE --help lists every flag with the recipe's default.")


def _recipes() -> str:
    from hd_trainer.recipes import list_recipes

    return "".join(f"  {name:12s} {line}\n" for name, line in list_recipes().items())
