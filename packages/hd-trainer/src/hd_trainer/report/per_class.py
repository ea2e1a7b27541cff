"""Precision and recall of each class: where a student has lost something that the mean over all classes hides."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hd_trainer.context import Context
from hd_trainer.data import pictures
from hd_trainer.engine import draws
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.evaluation.distances import precision_recall
from hd_trainer.evaluation.extractors import extract, extractor_for
from hd_trainer.images import quantise
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

    The samples are those of the table's row in their first ``MOST_SAMPLES``. Of a class as many training samples as
    generated ones are compared. At most ten classes are shown in their order; of more, the median and the ten of
    least recall.
    """
    data = context.data
    features = _features(context) if data.classes else None
    if features is None:
        return []
    reference = data.reference
    labels = reference.cond(torch.arange(len(reference)))["labels"]
    count = min(settings.samples or len(reference), MOST_SAMPLES)
    cond = reference.cond(torch.arange(count) % len(reference))
    noise = draws.picture_noise(data.shape, draws.evaluation_seed(context.seed), count)
    draw, _ = sampler(student, 1, settings.guidance, data.null)

    def generate(index: Tensor) -> Tensor:
        given = {name: value[index].to(context.device) for name, value in cond.items()}
        return draw(noise[index].to(context.device), given)

    samples = _in_parts(torch.arange(count), lambda index: features(generate(index)), settings.batch)
    rows = []
    for label, name in enumerate(data.classes):
        own = (cond["labels"] == label).nonzero()[:MOST_OF_A_CLASS, 0]
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


def _features(context: Context) -> Callable[[Tensor], Tensor] | None:
    """Samples -> features (N, F) on the CPU, as the table's; None where the data set has no extractor."""
    data = context.data
    extractor: Any = extractor_for(data)
    if extractor is None:
        return None

    def features(samples: Tensor) -> Tensor:
        images = samples.cpu().float()
        images = quantise(images, data.grey_levels) if data.holds_images else pictures(data, images)
        return extract(extractor, images)[0]

    return features
