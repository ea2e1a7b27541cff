"""Samples of every stage, measured against the data: extractors, distances, the rows of the table."""

from hd_trainer.evaluation.measure import EvaluationSettings, evaluate, in_batches
from hd_trainer.evaluation.rows import RESULTS, Row, format_rows, read_results, save_rows

__all__ = ["RESULTS", "EvaluationSettings", "Row", "evaluate", "format_rows", "in_batches", "read_results", "save_rows"]
