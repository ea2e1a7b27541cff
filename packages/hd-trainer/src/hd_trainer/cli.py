"""The ``hdistill`` command: its help, its exit codes, its errors of one line. commands.py has what it does."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

from hd_trainer import signals
from hd_trainer.commands import COMMANDS, HELP_FLAGS, RECIPES_HELP, recipes_help
from hd_trainer.errors import UserError

HELP = """\
hdistill: turn a many-step diffusion or flow teacher into a one-step generator.

{commands}
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
    except Exception as error:
        if _is_memory(error):
            return 2, f"the memory is full ({error}); lower --teacher.batch and its like, or the sizes of the network"
        # A library may turn the interruption into an error of its own, e.g. a failed import.
        if not signals.asked():
            raise
        return 130, signals.INTERRUPTED
    return 0, ""


def _dispatch(arguments: list[str]) -> None:
    for argument in arguments:
        if not _is_utf8(argument):  # safetensors and JSON could not name such a file
            raise UserError(f"arguments must be UTF-8; got {argument!a}")
    if not arguments or arguments[0] in (*HELP_FLAGS, "help"):
        print(HELP.format(commands=_commands(), title=RECIPES_HELP, recipes=recipes_help()))
    elif arguments[0] == "--version":
        from hd_trainer.version import __version__

        print(f"hdistill {__version__}")
    elif arguments[0] not in COMMANDS:
        raise UserError(f"unknown command {arguments[0]!r}; known: {', '.join(COMMANDS)} (try hdistill --help)")
    else:
        COMMANDS[arguments[0]].do(arguments[1:])


def _is_memory(error: Exception) -> bool:
    """Whether it says that there was no memory left; PyTorch has an error of its own for GPUs, and none for CPUs."""
    names = [one.__name__ for one in type(error).__mro__]
    return "MemoryError" in names or "OutOfMemoryError" in names or "DefaultCPUAllocator" in str(error)


def _commands() -> str:
    lines = {f"hdistill {name} {one.usage}".rstrip(): one.line for name, one in COMMANDS.items()}
    width = max(map(len, lines))
    return "".join(f"  {usage:{width}s}  {line}\n" for usage, line in lines.items())


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
