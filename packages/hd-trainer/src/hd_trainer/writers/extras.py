"""The writers that are extras of this package: which there are, whether they can be used, how they are made."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hd_trainer.errors import UserError
from hd_trainer.writers.jsonl import JsonLines
from hd_trainer.writers.writer import Writer, WriterFactory

#: Name of the writer, of the extra and of its package -> (what must be imported for it, the class here).
EXTRAS = {
    "tensorboard": ("torch.utils.tensorboard", "TensorBoard"),
    "wandb": ("wandb", "WeightsAndBiases"),
    "trackio": ("trackio", "Trackio"),
}


def check_names(names: Iterable[str]) -> None:
    """Every name is that of a writer, and none stands there twice.

    Raises:
        UserError: for one that is not.
    """
    names = tuple(names)
    unknown = [name for name in names if name not in EXTRAS]
    if unknown or len(set(names)) < len(names):
        got = " ".join(map(str, unknown or names))[:60]
        raise UserError(f"writers must be some of {', '.join(EXTRAS)}, each once; got {got}")


def check_installed(names: Iterable[str]) -> None:
    """Import what the writers need.

    Raises:
        UserError: for a package that is missing or cannot be imported, with the command that installs it.
    """
    for name in names:
        try:
            importlib.import_module(EXTRAS[name][0])
        except ImportError as error:
            raise UserError(
                f'--writers {name} needs the package {name} ({error}): pip install "hd-trainer[{name}]", '
                f"or leave {name} out"
            ) from error


def make_writers(names: Iterable[str], config: dict[str, Any]) -> tuple[WriterFactory, ...]:
    """JSON lines, and the named writers behind them; nothing is imported before a stage opens them.

    Args:
        config: the run's settings as plain values, which the tools show beside the curves.
    """

    return (JsonLines, *(functools.partial(_open, name, config) for name in names))


def _open(name: str, config: dict[str, Any], folder: Path, step: int) -> Writer:
    check_installed([name])
    kind: type[Any] = getattr(importlib.import_module(f"hd_trainer.writers.{name}"), EXTRAS[name][1])
    writer: Writer = kind(folder, step, config)
    return writer
