"""Functions from a user's own Python file: ``path/to/file.py:function``. They are code, and are run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hd_trainer.errors import UserError


def is_function(text: str) -> bool:
    """Whether the text names a function in a file rather than something built in."""
    return text.partition(":")[0].endswith(".py")


def load_function(text: str, default: str) -> Callable[..., Any]:
    """The function that ``file.py:function`` names; ``default`` is its name where none is given.

    Raises:
        UserError: if the file is missing or raises, or has no such function.
    """
    path, _, name = text.partition(":")
    name = name or default
    if not Path(path).is_file():
        raise UserError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"_of_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    if (folder := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.append(folder)  # what lies beside the file can be imported, now and when the function is called
    writes_none, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing of ours beside a file of theirs
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit and its like too: it is no word of ours
        raise UserError(f"{path} cannot be imported: {_said(error)}") from error
    finally:
        sys.dont_write_bytecode = writes_none
    function = getattr(module, name, None)
    if not callable(function):
        found = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        raise UserError(f"{path} has no function {name!r}; it has {', '.join(found) or 'none'}")
    return function


def call(function: Callable[..., Any], text: str, kind: type) -> Any:
    """What the user's function returns, which must be a ``kind``.

    Raises:
        UserError: if it raises, or returns something else.
    """
    try:
        value = function()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"{text} raised {_said(error)}") from error
    if not isinstance(value, kind):
        raise UserError(f"{text} must return {kind.__module__}.{kind.__name__}; got {type(value).__name__}")
    return value


def _said(error: BaseException) -> str:
    """What an error of a user's code says, cut where it is long."""
    try:
        text = str(error)
    except Exception:  # it is their code as well
        text = ""
    return f"{type(error).__name__}: {text[:300]}"
