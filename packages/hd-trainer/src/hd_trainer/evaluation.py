"""Samples of every stage, measured against the data: distances, class accuracy, network calls, images per second."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hd_zoo
from hd_trainer.data import ImageData
from hd_trainer.errors import UserError
from hd_trainer.files import write_json
from hd_trainer.images import quantise
from hd_trainer.metrics.distances import frechet_distance, kernel_distance, precision_recall
from hd_trainer.metrics.network import extract, load_metric_network
from hd_trainer.stages.common import check_guidance, check_positive, guided

RESULTS = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured, and on how many samples."""

    samples: int | None = None
    """generated images per row; None: as many as the training split, with its labels"""
    batch: int = 250
    """images a network call"""
    teacher_steps: tuple[int, ...] = (1, 2, 4, 50, 250)
    """Euler steps of the teacher's rows"""
    student_steps: tuple[int, ...] = (1,)
    """jumps of the students' rows"""
    guidance_scale: float = 1.0
    """classifier-free guidance of the teacher's rows; 1 is none"""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """times at which guidance is on"""
    timing_repeats: int = 15
    """runs whose median gives the images per second of one-step rows; rows with n calls per image take 1/n of them"""

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, timing_repeats=self.timing_repeats, samples=self.samples or 1)
        check_guidance(self.guidance_scale, self.guidance_interval)
        for name, steps in (("teacher_steps", self.teacher_steps), ("student_steps", self.student_steps)):
            if not steps or min(steps) < 1:
                raise UserError(f"{name} must hold at least one number of steps, each >= 1; got {steps}")
        if self.samples is not None and self.samples < 10:
            raise UserError(f"samples must be >= 10 (or none given); got {self.samples}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    """"teacher", "trajectory" or "distribution"; "held-out data" for the floor"""
    steps: int
    """integration steps or jumps; 0 for data"""
    calls: int
    """network evaluations per image, guidance counted"""
    samples: int
    """images measured"""
    fd: float
    """Fréchet distance to the training split in the metric network's features"""
    kid: float
    """kernel distance, unbiased"""
    precision: float
    recall: float
    accuracy: float
    """share of the images that the metric network takes for the class that was asked for"""
    nearest: float
    """mean distance, in pixel space, to the nearest training image: far below the held-out data's means copying"""
    images_per_second: float | None
    """None for data"""


class Meter:
    """The metric network and the reference, computed once."""

    def __init__(self, data: ImageData) -> None:
        self.data = data
        self.network = load_metric_network(data.name)
        self.reference = extract(self.network, data.train)[0]

    def measure(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Scores of images (N, C, H, W) that were asked to show labels (N,); pixels are rounded to storable levels."""
        images = quantise(images.cpu().float(), self.data.levels)
        features, logits = extract(self.network, images)
        precision, recall = precision_recall(self.reference, features)
        return {
            "samples": len(images),
            "fd": frechet_distance(features, self.reference),
            "kid": kernel_distance(features, self.reference),
            "precision": precision,
            "recall": recall,
            "accuracy": float((logits.argmax(dim=1) == labels.cpu()).float().mean()),
            "nearest": float(torch.cdist(images.flatten(1), self.data.train.flatten(1)).amin(dim=1).mean()),
        }


def evaluate(
    settings: EvaluationSettings,
    data: ImageData,
    networks: dict[str, nn.Module],
    device: torch.device,
    seed: int,
) -> list[Row]:
    """Measure every network at its step counts; the first row is held-out data against the training split: the floor.

    Args:
        networks: any of "teacher" (sampled by Euler's method), "trajectory" and "distribution" (sampled by jumps).
        seed: of the noise; every row starts from the same noise and labels.
    """
    meter = Meter(data)
    count = settings.samples or len(data.train)
    labels = data.train_labels.repeat(-(-count // len(data.train)))[:count].to(device)
    # 2^20 seeds apart: no two runs share an image's noise.
    noise = hd_zoo.seeded_noise(data.shape, range(seed << 20, (seed << 20) + count), device=device)
    rows = [
        Row(
            name="held-out data",
            steps=0,
            calls=0,
            images_per_second=None,
            **meter.measure(data.held_out, data.held_out_labels),
        )
    ]
    plan = [
        (name, steps)
        for name in networks
        for steps in (settings.teacher_steps if name == "teacher" else settings.student_steps)
    ]
    for name, steps in (bar := tqdm(plan, desc="evaluation", unit="row")):
        bar.set_postfix_str(f"{name}, {steps} step{'s' if steps > 1 else ''}")
        draw, calls = sampler(name, networks[name], steps, settings)
        repeats = max(1, settings.timing_repeats // calls)
        generate = functools.partial(_in_batches, draw, noise, labels, settings.batch)
        images, seconds = _timed(generate, repeats, device)
        try:
            scores = meter.measure(images, labels)
        except ValueError as error:
            raise UserError(f"{name}, {steps} step(s): {error}; train it again with a lower rate") from error
        rows.append(Row(name=name, steps=steps, calls=calls, images_per_second=count / seconds, **scores))
    return rows


def sampler(
    name: str, network: nn.Module, steps: int, settings: EvaluationSettings
) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """(function of noise and labels, network calls per image) of a stage's network at a number of steps."""
    if name == "teacher":
        field = guided(network, settings.guidance_scale, settings.guidance_interval)
        calls = steps if settings.guidance_scale == 1 else 2 * steps
        return lambda noise, labels: hd_zoo.sample_ode(field, noise, steps, labels=labels), calls
    times = hd_zoo.uniform_times(steps)
    return lambda noise, labels: hd_zoo.sample_jumps(network, noise, times, labels=labels), steps


def save_rows(rows: list[Row], folder: Path, facts: dict[str, Any]) -> None:
    """Write ``evaluation.json``: what was measured, on what, and the rows."""
    write_json(folder / RESULTS, {**facts, "rows": [vars(row) for row in rows]})


def format_rows(rows: list[Row], data: str) -> str:
    """The rows as a text table for a terminal."""
    header = f"{'':14s}{'steps':>6s}{'calls':>6s}{'N':>6s}{'FD-' + data:>11s}{'KID':>9s}{'prec.':>7s}{'recall':>7s}"
    header += f"{'acc.':>7s}{'nearest':>9s}{'images/s':>10s}"
    lines = [header]
    for row in rows:
        speed = "-" if row.images_per_second is None else f"{row.images_per_second:,.0f}"
        lines.append(
            f"{row.name:14s}{row.steps or '-':>6}{row.calls or '-':>6}{row.samples:>6d}{row.fd:>11.2f}{row.kid:>9.3f}"
            f"{row.precision:>7.3f}{row.recall:>7.3f}{row.accuracy:>7.3f}{row.nearest:>9.2f}{speed:>10s}"
        )
    return "\n".join(lines)


def _in_batches(draw: Callable[[Tensor, Tensor], Tensor], noise: Tensor, labels: Tensor, batch: int) -> Tensor:
    parts = zip(noise.split(batch), labels.split(batch), strict=True)
    return torch.cat([draw(one, other) for one, other in parts])


def _timed(draw: Callable[[], Tensor], repeats: int, device: torch.device) -> tuple[Tensor, float]:
    """(images, median seconds). A single run of many steps is long enough to need no warm-up and no median."""
    seconds = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        images = draw()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return images, statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
