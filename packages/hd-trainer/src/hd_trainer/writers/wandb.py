"""Weights & Biases: a run for each stage, those of one ``hdistill run`` in one group."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import wandb
import wandb.errors

from hd_trainer.errors import UserError
from hd_trainer.files import read_json, write_json

#: Where the stage's run is noted, so that a resumed stage goes on in it.
NOTE = "wandb.json"
PROJECT = "hierarchical-distillation"


class WeightsAndBiases:
    """A stage's run, named RUN/STAGE. ``WANDB_PROJECT``, ``WANDB_ENTITY`` and ``WANDB_MODE=offline`` count as usual.

    A step that W&B has already is dropped: it never takes records back. As a resumed stage repeats itself bit for bit
    on one machine, what it has is what it would get. Offline each part of a stage is a folder of its own with one id.

    Raises:
        UserError: if W&B cannot begin, such as without a login.
    """

    def __init__(self, folder: Path, step: int, config: dict[str, Any]) -> None:
        if not (folder / NOTE).exists():
            write_json(folder / NOTE, {"id": uuid.uuid4().hex[:12]})
        self._known = -1
        try:
            self.run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=str(read_json(folder / NOTE).get("id")),
                name=f"{folder.parent.name}/{folder.name}",
                group=folder.parent.name,
                resume="allow",
                dir=folder.parent,
                config={**config, "stage": folder.name},
                settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
            )
        except (wandb.errors.Error, OSError) as error:
            line = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"wandb cannot begin a run ({line[0][:200]}); log in with: wandb login, or set WANDB_MODE=offline"
            ) from error
        self._known = self.run.step - 1

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """A row of the history."""
        self._log(step, {"seconds": seconds, **values})

    def picture(self, step: int, path: Path) -> None:
        """The grid, in the same row."""
        self._log(step, {"samples": wandb.Image(str(path))})

    def close(self) -> None:
        """Finish the run; a resumed stage opens it again."""
        self.run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step > self._known:
            self.run.log(values, step=step)
