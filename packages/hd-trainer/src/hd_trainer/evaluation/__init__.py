"""Samples of every stage, measured against the data: extractors, distances, the rows of the table."""

from hd_trainer.evaluation.extractors import EXTRACTORS, Extractor, check_extractors, load_extractors
from hd_trainer.evaluation.measure import EvaluationSettings, Meter, evaluate, facts_of, in_batches, sampling_inputs
from hd_trainer.evaluation.reference import nearest_training
from hd_trainer.evaluation.rows import RESULTS, Row, format_rows, read_results, save_rows, title

__all__ = [
    "EXTRACTORS",
    "RESULTS",
    "EvaluationSettings",
    "Extractor",
    "Meter",
    "Row",
    "check_extractors",
    "evaluate",
    "facts_of",
    "format_rows",
    "in_batches",
    "load_extractors",
    "nearest_training",
    "read_results",
    "sampling_inputs",
    "save_rows",
    "title",
]
