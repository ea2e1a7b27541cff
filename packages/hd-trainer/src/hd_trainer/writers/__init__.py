"""Where the numbers of a training go: JSON lines always."""

from hd_trainer.writers.jsonl import METRICS, JsonLines
from hd_trainer.writers.writer import Writer, WriterFactory

__all__ = ["METRICS", "JsonLines", "Writer", "WriterFactory"]
