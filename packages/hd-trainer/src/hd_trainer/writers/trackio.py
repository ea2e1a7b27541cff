"""trackio: a project for a run, in it a run for each stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import trackio


class Trackio:
    """A stage's run in the project named after the run's folder. Its files are where ``TRACKIO_DIR`` says.

    trackio never takes records back: what comes a second time stands there twice, with one step and one value.
    """

    def __init__(self, folder: Path, step: int, config: dict[str, Any]) -> None:
        self.run: Any = trackio.init(
            project=re.sub(r"[^\w-]+", "-", folder.parent.resolve().name).strip("-") or "run",
            name=folder.name,
            config={**config, "stage": folder.name},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
        )

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """A row of metrics."""
        self.run.log({"seconds": seconds, **values}, step=step)

    def picture(self, step: int, path: Path) -> None:
        """A copy of the grid, by its step."""
        self.run.log({"samples": trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        """Wait until everything is stored."""
        self.run.finish()
