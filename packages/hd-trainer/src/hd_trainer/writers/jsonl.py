"""One JSON object a line in ``metrics.jsonl``: ``{"step": 20, "seconds": 1.5, "loss": 0.9}``."""

from __future__ import annotations

import json
from pathlib import Path

from hd_trainer.files import append_record, read_records, write_text

METRICS = "metrics.jsonl"


class JsonLines:
    """Appends to ``folder/metrics.jsonl``; lines past ``step`` would be written a second time and are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / METRICS
        kept = [record for record in read_records(self.path) if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """One line, on disk at once."""
        append_record(self.path, {"step": step, "seconds": round(seconds, 3), **values})

    def picture(self, step: int, path: Path) -> None:
        """Nothing: the picture is in the stage's folder already."""

    def close(self) -> None:
        """Nothing: every line is on disk."""
