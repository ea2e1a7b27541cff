"""Every stage's network at its numbers of steps: sampled, timed and measured."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hd_trainer.checks import MAX_BATCH, MAX_IMAGES, check_whole
from hd_trainer.context import Context
from hd_trainer.data import Dataset, Split, read_all
from hd_trainer.engine import draws
from hd_trainer.engine.parallel import synchronise
from hd_trainer.errors import UserError
from hd_trainer.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from hd_trainer.evaluation.extractors import extract, extractor_for
from hd_trainer.evaluation.rows import HELD_OUT, Row
from hd_trainer.images import quantise
from hd_trainer.networks import GuidanceSettings, sampler

#: Training images of which the nearest is looked for.
NEAREST_OF = 50_000


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured, and on how many samples."""

    samples: int | None = None
    """generated images per row; None: as many as the training split, with its conditions"""
    batch: int = 250
    """images a network call"""
    teacher_steps: tuple[int, ...] = (1, 2, 4, 50, 250)
    """Euler steps of the teacher's rows"""
    student_steps: tuple[int, ...] = (1,)
    """jumps of the students' rows"""
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    """of the teacher's rows"""
    timing_repeats: int = 15
    """runs whose median gives the images per second of one-step rows; rows with n calls per image take 1/n of them"""

    def __post_init__(self) -> None:
        check_whole(high=MAX_BATCH, batch=self.batch)
        check_whole(high=10_000, timing_repeats=self.timing_repeats)
        for name, steps in (("teacher_steps", self.teacher_steps), ("student_steps", self.student_steps)):
            if not steps:
                raise UserError(f"{name} must hold at least one number of steps; got none")
            check_whole(high=100_000, **dict.fromkeys([name], max(steps)))
            check_whole(high=100_000, **dict.fromkeys([name], min(steps)))
        if self.samples is not None:
            check_whole(low=10, high=MAX_IMAGES, samples=self.samples)


class Meter:
    """The extractor and the reference, computed once."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self.extractor = extractor_for(data)
        self.training = read_all(data.reference, NEAREST_OF).x
        self.reference = None if self.extractor is None else _features(self.extractor, data.reference)

    def measure(self, samples: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Scores of samples (N, C, H, W) that were asked for with ``cond``; pixels are rounded to storable levels.

        Raises:
            ValueError: if they are not finite.
        """
        images = samples.cpu().float()
        if not bool(torch.isfinite(images).all()):
            raise ValueError("samples are not finite: the network has diverged")
        if self.data.holds_images:
            images = quantise(images, self.data.grey_levels)
        scores: dict[str, Any] = dict.fromkeys(("fd", "kid", "precision", "recall", "accuracy"))
        if self.extractor is not None and self.reference is not None:
            features, logits = extract(self.extractor, images)
            scores["fd"] = frechet_distance(features, self.reference)
            scores["kid"] = kernel_distance(features, self.reference)
            scores["precision"], scores["recall"] = precision_recall(self.reference, features)
            if "labels" in cond:
                scores["accuracy"] = float((logits.argmax(dim=1) == cond["labels"].cpu()).float().mean())
        nearest = [torch.cdist(part.flatten(1), self.training.flatten(1)).amin(dim=1) for part in images.split(1000)]
        return {
            "samples": len(images),
            **scores,
            "nearest": float(torch.cat(nearest).mean()),
            "deviation": float(images.std(dim=0).mean()),
        }


def evaluate(settings: EvaluationSettings, context: Context, networks: dict[str, nn.Module]) -> list[Row]:
    """Measure every network at its step counts; the first row is held-out data against the training split: the floor.

    Every row starts from the same noise and conditions, which are functions of the context's seed.

    Args:
        networks: any of "teacher" (sampled by Euler's method), "trajectory" and "distribution" (sampled by jumps).

    Raises:
        UserError: if a network's samples are not finite.
    """
    data = context.data
    meter = Meter(data)
    count = settings.samples or len(data.reference)
    conditions = data.reference.cond(torch.arange(count) % len(data.reference))
    cond = {name: value.to(context.device) for name, value in conditions.items()}
    noise = draws.picture_noise(data.shape, draws.evaluation_seed(context.seed), count, context.device)
    held_out = read_all(data.held_out)
    rows = [Row(name=HELD_OUT, steps=0, calls=0, images_per_second=None, **meter.measure(held_out.x, held_out.cond))]
    plan = [
        (name, steps)
        for name in networks
        for steps in (settings.teacher_steps if name == "teacher" else settings.student_steps)
    ]
    for name, steps in (bar := tqdm(plan, desc="evaluation", unit="row")):
        bar.set_postfix_str(f"{name}, {steps} step{'s' if steps > 1 else ''}")
        draw, calls = sampler(networks[name], steps, settings.guidance, data.null)
        repeats = max(1, settings.timing_repeats // calls)
        generate = functools.partial(in_batches, draw, noise, cond, settings.batch)
        images, seconds = _timed(generate, repeats, context.device)
        try:
            scores = meter.measure(images, cond)
        except ValueError as error:
            raise UserError(f"{name}, {steps} step(s): {error}; train it again with a lower rate") from error
        rows.append(Row(name=name, steps=steps, calls=calls, images_per_second=count / seconds, **scores))
    return rows


def in_batches(
    draw: Callable[[Tensor, dict[str, Tensor]], Tensor],
    noise: Tensor,
    cond: dict[str, Tensor],
    batch: int,
    done: Callable[[int], object] = int,
) -> Tensor:
    """``draw(noise, cond)`` for ``batch`` samples at a time; ``done`` hears how many each time."""
    parts = []
    for first in range(0, len(noise), batch):
        part = slice(first, first + batch)
        parts.append(draw(noise[part], {name: value[part] for name, value in cond.items()}))
        done(len(parts[-1]))
    return torch.cat(parts)


def _features(extractor: nn.Module, split: Split, batch: int = 500) -> Tensor:
    """Features of a whole split, read batch by batch."""
    return torch.cat([extract(extractor, split.read(index).x)[0] for index in torch.arange(len(split)).split(batch)])


def _timed(draw: Callable[[], Tensor], repeats: int, device: torch.device) -> tuple[Tensor, float]:
    """(images, median seconds). A single run of many steps is long enough to need no warm-up and no median."""
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        images = draw()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return images, statistics.median(seconds)
