"""Precision and recall of each class: where a student has lost something that the mean over all classes hides."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hd_trainer.context import Context
from hd_trainer.evaluation import EvaluationSettings, load_extractors, sampling_inputs
from hd_trainer.evaluation.distances import precision_recall
from hd_trainer.evaluation.extractors import extract
from hd_trainer.evaluation.pixels import as_measured
from hd_trainer.networks import sampler

#: Samples drawn, and real ones of a class that are looked at; fewer than ``FEWEST`` say nothing [ours].
MOST_SAMPLES, MOST_OF_A_CLASS, FEWEST = 20_000, 1_000, 10
#: Classes that are shown; of more, the worst ones.
SHOWN = 10


@dataclass(frozen=True)
class ClassRow:
    """One class, or the median over all."""

    name: str
    samples: int | None
    """on either side; None for the median"""
    precision: float
    recall: float


def per_class(context: Context, settings: EvaluationSettings, student: nn.Module) -> list[ClassRow]:
    """Precision and recall in one step of every class, as far as there are labels, an extractor and enough samples.

    The samples are those of the table's row at its first sampling seed, ``MOST_SAMPLES`` at most; the extractor is the
    table's first. Of a class as many training samples as generated ones are compared. At most ten classes are shown in
    their order; of more, the median and the ten of least recall.
    """
    data = context.data
    extractors = load_extractors(settings.extractors, data, context.device) if data.classes else []
    if not extractors:
        return []

    def features(samples: Tensor) -> Tensor:
        return extract(extractors[0], as_measured(data, samples.cpu().float()))[0]

    reference = data.reference
    labels = reference.cond(torch.arange(len(reference)))["labels"]
    count = min(settings.samples or len(reference), MOST_SAMPLES)
    noise, cond = sampling_inputs(settings, context, count, 0)
    draw, _ = sampler(student, 1, settings.guidance, data.null)

    def generate(index: Tensor) -> Tensor:
        return draw(noise[index], {name: value[index] for name, value in cond.items()})

    samples = _in_parts(torch.arange(count), lambda index: features(generate(index)), settings.batch)
    asked = cond["labels"].cpu()
    rows = []
    for label, name in enumerate(data.classes):
        own = (asked == label).nonzero()[:MOST_OF_A_CLASS, 0]
        theirs = (labels == label).nonzero()[: len(own), 0]
        number = min(len(own), len(theirs))
        if number >= FEWEST:
            real = _in_parts(theirs, lambda index: features(reference.read(index).x), settings.batch)
            rows.append(ClassRow(name, number, *precision_recall(real, samples[own[:number]])))
    return shown(rows) if len(rows) > 1 else []


def _in_parts(index: Tensor, function: Callable[[Tensor], Tensor], batch: int) -> Tensor:
    return torch.cat([function(part) for part in index.split(batch)])


def shown(rows: list[ClassRow]) -> list[ClassRow]:
    """All of at most ten classes; of more, the median and the worst ten by their recall."""
    if len(rows) <= SHOWN:
        return rows
    median = ClassRow(
        f"median of {len(rows)}",
        None,
        statistics.median(row.precision for row in rows),
        statistics.median(row.recall for row in rows),
    )
    return [median, *sorted(rows, key=lambda row: row.recall)[:SHOWN]]
