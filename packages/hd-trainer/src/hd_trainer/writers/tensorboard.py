"""Event files for TensorBoard, in ``RUN/tensorboard/STAGE``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """A stage's events. TensorBoard hides what was written past ``step`` once the stage goes on from there."""

    def __init__(self, folder: Path, step: int, config: dict[str, Any]) -> None:
        place = folder.parent / "tensorboard" / folder.name
        begun = any(place.glob("events.*"))
        self.events: Any = SummaryWriter(str(place), purge_step=step + 1 if begun else None)
        if not begun:
            # Indented by four spaces: TensorBoard shows the text as it is.
            lines = json.dumps(config, indent=2).splitlines()
            self.events.add_text("settings", "\n".join(f"    {line}" for line in lines), 0)
            self.events.flush()

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """A curve for each value, and the seconds."""
        for name, value in {"seconds": seconds, **values}.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()

    def picture(self, step: int, path: Path) -> None:
        """The grid, by its step."""
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self.events.add_image("samples", pixels, step, dataformats="HWC")
        self.events.flush()

    def close(self) -> None:
        """Close the file."""
        self.events.close()
