"""Where the numbers and pictures of a training go: JSON lines always, TensorBoard, W&B and trackio where asked for."""

from hd_trainer.writers.extras import EXTRAS, check_installed, check_names, make_writers
from hd_trainer.writers.jsonl import METRICS, JsonLines
from hd_trainer.writers.writer import Writer, WriterFactory

__all__ = [
    "EXTRAS",
    "METRICS",
    "JsonLines",
    "Writer",
    "WriterFactory",
    "check_installed",
    "check_names",
    "make_writers",
]
