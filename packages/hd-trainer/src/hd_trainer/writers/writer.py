"""The contract of a writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Writer(Protocol):
    """Takes the records and the pictures of one stage."""

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """Scalars averaged since the last record, after ``step`` steps and ``seconds`` of training."""

    def picture(self, step: int, path: Path) -> None:
        """A grid of samples drawn after ``step`` steps, a PNG file that stays where it is."""

    def close(self) -> None:
        """The stage is done, was stopped or has failed: nothing more comes."""


#: ``factory(folder, step)`` opens the writer of the stage in ``folder``, which goes on after ``step``: what was
#: written past that step comes a second time.
WriterFactory = Callable[[Path, int], Writer]
