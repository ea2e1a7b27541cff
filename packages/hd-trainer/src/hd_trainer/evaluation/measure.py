"""Every stage's network at its numbers of steps: sampled, timed and measured, for several sampling seeds."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hd_trainer.checks import MAX_BATCH, MAX_IMAGES, check_choice, check_whole
from hd_trainer.context import Context
from hd_trainer.data import Dataset
from hd_trainer.engine import draws
from hd_trainer.engine.parallel import synchronise
from hd_trainer.errors import UserError
from hd_trainer.evaluation.distances import compare, frechet_distance, within
from hd_trainer.evaluation.extractors import Extractor, load_extractors
from hd_trainer.evaluation.pixels import AT_ONCE, as_measured, restored, stored
from hd_trainer.evaluation.reference import MANIFOLD, NEAREST_FOR, nearest_training, reference_of, spread
from hd_trainer.evaluation.rows import HALVES, HELD_OUT, SCORES, Row, row_of_seeds
from hd_trainer.networks import GuidanceSettings, sampler
from hd_trainer.progress import progress

Labels = Literal["training", "random"]

#: Fewer images than this make no floor.
FEWEST_OF_A_HALF = 10


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured, and on how many samples."""

    extractors: tuple[str, ...] = ()
    """none, digits, classifier, mobilenet, efficientnet, inception:FILE, dino:ID, file.py:function; (): by the data"""
    seeds: int = 3
    """sampling seeds: each number is their mean, with the least and the greatest"""
    samples: int | None = None
    """generated images per row and seed; None: as many as the training split"""
    labels: Labels = "training"
    """what is asked for: the training split's conditions in their order, or drawn from them at random for each seed"""
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
        check_whole(high=100, seeds=self.seeds)
        check_whole(high=10_000, timing_repeats=self.timing_repeats)
        check_choice("labels", self.labels, Labels)
        for name, steps in (("teacher_steps", self.teacher_steps), ("student_steps", self.student_steps)):
            if not steps:
                raise UserError(f"{name} must hold at least one number of steps; got none")
            check_whole(high=100_000, **dict.fromkeys([name], max(steps)))
            check_whole(high=100_000, **dict.fromkeys([name], min(steps)))
        if self.samples is not None:
            check_whole(low=10, high=MAX_IMAGES, samples=self.samples)


class Meter:
    """The extractors and the references, computed once. It holds no picture of the training split."""

    def __init__(self, data: Dataset, extractors: list[Extractor]) -> None:
        self.data = data
        self.references = [reference_of(data, data.reference, extractor) for extractor in extractors]

    @property
    def names(self) -> list[str]:
        """Of the extractors."""
        return [one.extractor.name for one in self.references]

    def measure(self, samples: Tensor, cond: dict[str, Tensor]) -> dict[str, Any]:
        """Scores of samples (N, C, H, W) that were asked for with ``cond``; pixels are rounded to storable levels.

        Samples may come as :func:`hd_trainer.evaluation.pixels.stored` gives them.

        Raises:
            ValueError: if they are not finite.
        """
        small = samples if samples.dtype == torch.uint8 else _finite(self.data, samples)
        scores: dict[str, Any] = dict.fromkeys(SCORES)
        further = {}
        for index, reference in enumerate(self.references):
            parts = (as_measured(self.data, restored(self.data, part)) for part in small.split(AT_ONCE))
            found = reference.scores(parts, cond.get("labels"))
            if index == 0:
                scores |= found
            else:
                further[reference.extractor.name] = {name: found[name] for name in SCORES}
        some = restored(self.data, small[spread(len(small), NEAREST_FOR)])
        return {
            **scores,
            "nearest": float(nearest_training(some, self.data.reference)[0].mean()),
            "deviation": _deviation(self.data, small),
            "further": further,
        }

    def held_out(self, count: int) -> Row:
        """The floor: at most ``count`` held-out samples against the training split."""
        split = self.data.held_out
        index = spread(len(split), count)
        samples = torch.cat([stored(self.data, split.read(part).x) for part in index.split(AT_ONCE)])
        scores = self.measure(samples, split.cond(index))
        return Row(name=HELD_OUT, steps=0, calls=0, images_per_second=None, samples=len(samples), **scores)

    def halves(self, count: int) -> Row | None:
        """The floor where little is held out: two halves of the training split, drawn at random, of one size each.

        None without features of at least FEWEST_OF_A_HALF pictures in each.
        """
        found = []
        for reference in self.references:
            if reference.features is None or len(reference.features) < 2 * FEWEST_OF_A_HALF:
                return None
            order = draws.shuffled(len(reference.features), 0)
            number = min(count, len(order) // 2)
            a, b = (reference.features[part] for part in (order[:number], order[number : 2 * number]))
            scores: dict[str, float | None] = dict.fromkeys(SCORES)
            found.append({**scores, "fd": frechet_distance(a, b), **vars(compare(within(b), within(a)))})
        if not found:
            return None
        further = dict(zip(self.names[1:], found[1:], strict=True))
        facts: dict[str, Any] = {"steps": 0, "calls": 0, "nearest": None, "images_per_second": None, "samples": number}
        return Row(name=HALVES, **facts, **found[0], further=further)


def evaluate(
    settings: EvaluationSettings,
    context: Context,
    networks: dict[str, nn.Module],
    extractors: list[Extractor] | None = None,
) -> list[Row]:
    """Measure every network at its step counts; the first row is held-out data against the training split: the floor.

    Every row starts from the same noise and conditions, which are functions of the context's seed and the sampling
    seed. A second row, of two halves of the training split, comes where fewer samples are held out than are generated.

    Args:
        networks: any of "teacher" (sampled by Euler's method), "trajectory" and "distribution" (sampled by jumps).
        extractors: None: those of the settings.

    Raises:
        UserError: if a network's samples are not finite.
    """
    data = context.data
    count = settings.samples or len(data.reference)
    if extractors is None:
        extractors = load_extractors(settings.extractors, data, context.device)
    meter = Meter(data, extractors)
    rows = [meter.held_out(count)]
    if rows[0].samples < count and (halves := meter.halves(count)) is not None:
        rows.append(halves)
    plan = [
        (name, steps)
        for name in networks
        for steps in (settings.teacher_steps if name == "teacher" else settings.student_steps)
    ]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {one: [] for one in plan}
    speeds: dict[tuple[str, int], float] = {}
    all_calls: dict[tuple[str, int], int] = {}
    bar = progress(total=len(plan) * settings.seeds, desc="evaluation", unit="row")
    for seed in range(settings.seeds):
        noise, cond = sampling_inputs(settings, context, count, seed)
        for name, steps in plan:
            bar.set_postfix_str(f"{name}, {steps} step{'s' if steps > 1 else ''}, seed {seed}")
            draw, calls = sampler(networks[name], steps, settings.guidance, data.null)
            generate = functools.partial(in_batches, draw, noise, cond, settings.batch)
            repeats = max(1, settings.timing_repeats // calls) if seed == 0 else 1
            images, seconds = _timed(generate, repeats, context.device)
            try:
                scores = meter.measure(images, cond)
            except ValueError as error:
                raise UserError(f"{name}, {steps} step(s): {error}; train it again with a lower rate") from error
            found[name, steps].append({"seed": seed, **scores})
            speeds.setdefault((name, steps), count / seconds)
            all_calls[name, steps] = calls
            bar.update()
    bar.close()
    for (name, steps), per_seed in found.items():
        facts: dict[str, Any] = {"name": name, "steps": steps, "calls": all_calls[name, steps], "samples": count}
        rows.append(row_of_seeds(per_seed, **facts, images_per_second=speeds[name, steps]))
    return rows


def facts_of(settings: EvaluationSettings, data: Dataset, extractors: list[Extractor]) -> dict[str, Any]:
    """What a result records of how it was measured."""
    return {
        "extractors": [one.facts() for one in extractors],
        "sampling_seeds": settings.seeds,
        "labels": settings.labels if data.classes else "none",
        "reference_samples": len(data.reference),
        "neighbour_samples": min(MANIFOLD, len(data.reference)),
        "guidance_scale": settings.guidance.scale,
    }


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


def sampling_inputs(
    settings: EvaluationSettings, context: Context, count: int, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise and conditions of a sampling seed, on the device."""
    split = context.data.reference
    index = torch.arange(count) % len(split)
    if settings.labels == "random":
        generator = draws.step_generator(context.seed, "evaluation", seed)
        index = draws.any_of(len(split), count, generator)
    first = draws.evaluation_seed(context.seed, seed, count)
    noise = draws.picture_noise(context.data.shape, first, count, context.device)
    return noise, {name: value.to(context.device) for name, value in split.cond(index).items()}


def _finite(data: Dataset, samples: Tensor) -> Tensor:
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("samples are not finite: the network has diverged")
    return stored(data, samples)


def _deviation(data: Dataset, small: Tensor) -> float:
    """Mean over the pixels of their standard deviation over the samples, part by part."""
    first = restored(data, small[:1]).double()
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for part in small.split(AT_ONCE):
        apart = restored(data, part).double() - first
        total += apart.sum(dim=0)
        squares += apart.square().sum(dim=0)
    variance = (squares - total.square() / len(small)) / max(1, len(small) - 1)
    return float(variance.clamp(min=0).sqrt().mean())


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
