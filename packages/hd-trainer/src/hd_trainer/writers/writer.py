"""The contract of a writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Writer(Protocol):
    """Takes the records of one stage."""

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """Scalars averaged since the last record, after ``step`` steps and ``seconds`` of training."""


#: ``factory(folder, step)`` opens the writer of the stage in ``folder``; records past ``step`` are taken back.
WriterFactory = Callable[[Path, int], Writer]
