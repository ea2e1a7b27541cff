"""``--dry-run``: what a run would do, how large it is and how long it takes, from a few measured steps.

Nothing is written but the cache of decoded pictures, as any command that reads a large folder does.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hd_trainer import pipeline
from hd_trainer.context import Context
from hd_trainer.data import pictures
from hd_trainer.engine import draws
from hd_trainer.engine.checkpoint import complete_checkpoints
from hd_trainer.engine.loop import DONE, LoopSettings, Task
from hd_trainer.engine.parallel import synchronise
from hd_trainer.errors import UserError
from hd_trainer.evaluation.extractors import default_names, load_extractors
from hd_trainer.evaluation.measure import Meter
from hd_trainer.networks import CONFIG, fresh_network, load_network, load_teacher, sampler
from hd_trainer.run_folder import check_claim
from hd_trainer.settings import Settings
from hd_trainer.stages import STAGES

#: Runs of each kind of step: the first are left out, then so many, or so many seconds, whichever is first [ours].
WARM_UP, MOST, SECONDS = 2, 10, 1.5
#: Bytes of a parameter in training: weight, gradient, two moments.
COPIES = 4
#: Images that are scored to see how long scoring takes, and pictures of the report's grid.
SCORED, PICTURED = 500, 80


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage would do."""

    name: str
    state: str
    """to train, goes on after step n, done, or brought from elsewhere"""
    left: int = 0
    """steps to do"""
    batch: int = 0
    parameters: int = 0
    """of the network that it makes"""
    weight_bytes: int = 0
    """of its model.safetensors"""
    state_bytes: int = 0
    """of its two newest checkpoints"""
    memory_bytes: int = 0
    """of weights, gradients, moments and averages; activations not counted"""
    step_seconds: float = 0.0
    """median"""
    grid_seconds: float = 0.0
    """of the samples drawn beside each checkpoint"""
    grids: int = 0

    @property
    def seconds(self) -> float:
        """Estimated time of what is left."""
        return self.left * self.step_seconds + self.grids * self.grid_seconds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of a run."""

    data: list[str]
    """lines about the data"""
    stages: list[StagePlan]
    rows: int = 0
    """measurements: of real data twice, of each network at each number of steps one for each sampling seed"""
    samples: int = 0
    """images of each"""
    extractors: str = ""
    """their names"""
    evaluation_seconds: float = 0.0
    report_seconds: float = 0.0
    peak_bytes: int | None = None
    """most memory that this process, or the accelerator, has held while measuring; None where it cannot be known"""
    facts: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Estimated time in all."""
        return sum(stage.seconds for stage in self.stages) + self.evaluation_seconds + self.report_seconds


def dry_run(
    settings: Settings,
    out: Path,
    *,
    stages: Sequence[str] = STAGES,
    student_weights: Path | None = None,
) -> Plan:
    """The plan of :func:`hd_trainer.run` with these arguments; of some ``stages`` alone without evaluation and report.

    Raises:
        UserError: for whatever the run itself would refuse before it trains.
    """
    with draws.seeded(settings.seed):  # whoever calls this has the random numbers that he had
        return _dry_run(settings, out, stages, student_weights)


def _dry_run(settings: Settings, out: Path, stages: Sequence[str], student_weights: Path | None) -> Plan:
    context = pipeline.context_of(settings)
    pipeline.check(settings, context, student_weights)
    check_claim(settings, out)
    _check_writable(out)
    given = {"teacher": settings.teacher_source, "trajectory": student_weights, "distribution": None}
    networks: dict[str, nn.Module] = {}
    plans = [_stage(stage, settings, context, out, given, networks, stage in stages) for stage in STAGES]
    plan = {"data": describe_data(context), "stages": [one for one in plans if one.name in stages]}
    whole = tuple(stages) == STAGES
    evaluation = _evaluation(settings, context, networks) if whole else {}
    facts = [f"{context.device.type}, {context.precision}, {torch.get_num_threads()} thread(s), into {out}"]
    return Plan(**plan, **evaluation, facts=facts, peak_bytes=peak_memory(context.device))  # type: ignore[arg-type]


def describe_data(context: Context) -> list[str]:
    """Kind, numbers, shape, classes and range of a data set."""
    data = context.data
    some = data.train.read(torch.arange(min(1000, len(data.train)))).x
    channels, height, width = data.shape
    kind = {1: "grey images", 3: "images in colour"}.get(channels, "images") if data.holds_images else "latents"
    mirrored = ", mirror images counted" if len(data.reference) < len(data.train) else ""
    lines = [
        f"{data.name}: {kind}, {channels} x {height} x {width} (channels, height, width)",
        f"{len(data.train):,} for training{mirrored}, {len(data.held_out):,} held out",
        f"values from {float(some.min()):.2f} to {float(some.max()):.2f}",
    ]
    if data.decode is not None:
        shown = tuple(pictures(data, some[:1]).shape[1:])
        lines.append(f"shown through a decoder as {' x '.join(map(str, shown))}")
    names = ", ".join(data.classes[:8]) + (" ..." if len(data.classes) > 8 else "")
    lines.append(f"{len(data.classes)} classes: {names}" if data.classes else "no classes")
    others = sorted(data.null.keys() - {"labels"})
    return lines + ([f"other conditions: {', '.join(others)}"] if others else [])


def _stage(
    stage: str,
    settings: Settings,
    context: Context,
    out: Path,
    given: Mapping[str, str | Path | None],
    networks: dict[str, nn.Module],
    wanted: bool,
) -> StagePlan:
    """Plan one stage and put the network it leaves behind, or one of its kind, into ``networks``."""
    own, brought = out / stage, given[stage]
    folder = brought or (own if (own / CONFIG).exists() else None)
    if folder is not None:
        load = load_teacher if brought is not None and stage == "teacher" else load_network
        networks[stage] = load(folder, context.data, context.device)
        if brought is not None or (own / DONE).exists():
            state = "done" if brought is None else f"left out: {brought}"
            return StagePlan(name=stage, state=state, **_size(networks[stage]))
    elif not wanted and stage == "teacher":
        networks[stage] = fresh_network(settings.model, context).requires_grad_(False)
        return StagePlan(name=stage, state="")
    names = {"teacher": "teacher", "student": "trajectory"}
    task = pipeline.prepare(stage, settings, context, lambda name: networks[names[name]])
    networks[stage] = task.modules["average"]
    if not wanted:
        return StagePlan(name=stage, state="")
    checkpoints = complete_checkpoints(own)
    done = int(checkpoints[-1].name) if checkpoints else 0
    every = settings.distribution.student_update_every if stage == "distribution" else 1
    step_seconds = seconds_per_step(task.step, every, context.device)
    moments = sum(_bytes(optimizer.tensors().values()) for optimizer in task.optimizers.values())
    weights = sum(_bytes(module.state_dict().values()) for module in task.modules.values())
    gradients = sum(_bytes(optimizer.parameters) for optimizer in task.optimizers.values())
    frozen = _bytes(networks["teacher"].state_dict().values()) if stage != "teacher" else 0
    return StagePlan(
        name=stage,
        state=f"goes on after step {done:,}" if done else "to train",
        left=max(0, task.steps - done),
        batch=getattr(settings, stage).batch,
        state_bytes=2 * (weights + moments),
        memory_bytes=weights + moments + gradients + frozen,
        step_seconds=step_seconds,
        grid_seconds=_median(task.sample, context.device, warm_up=0, most=1),
        grids=_grids(task, settings.loop, done),
        **_size(networks[stage]),
    )


def seconds_per_step(step: Callable[[int], object], every: int, device: torch.device) -> float:
    """Median seconds of a step, warm-up left out; where every n-th step does more, the mean over one turn of n."""
    first = _median(lambda: step(0), device)
    return first if every == 1 else (first + (every - 1) * _median(lambda: step(1), device)) / every


def _median(do: Callable[[], object], device: torch.device, *, warm_up: int = WARM_UP, most: int = MOST) -> float:
    for _ in range(warm_up):
        do()
    seconds: list[float] = []
    while len(seconds) < most and sum(seconds) < SECONDS:
        synchronise(device)
        began = time.perf_counter()
        do()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _evaluation(settings: Settings, context: Context, networks: dict[str, nn.Module]) -> dict[str, Any]:
    """Rows and samples of the table, and its time, from a few calls of a teacher and a student and one scoring."""
    wanted, data = settings.evaluation, context.data
    samples = wanted.samples or len(data.reference)
    batch = min(wanted.batch, samples)
    cond = {name: value.to(context.device) for name, value in data.reference.cond(_first(batch, context)).items()}
    noise = draws.picture_noise(data.shape, 0, batch, context.device)
    names = wanted.extractors or default_names(data)
    extractors = [] if "classifier" in names else load_extractors(wanted.extractors, data, context.device)
    began = time.perf_counter()
    meter = Meter(data, extractors)
    seconds = time.perf_counter() - began
    rows, images_a_second = 2, {}
    for name, network in networks.items():
        draw, calls = sampler(network, 1, wanted.guidance, data.null)
        call = _median(lambda draw=draw: draw(noise, cond), context.device, warm_up=1, most=5) / calls  # type: ignore[misc]
        images_a_second[name] = batch / call
        for steps in wanted.teacher_steps if name == "teacher" else wanted.student_steps:
            calls = sampler(network, steps, wanted.guidance, data.null)[1]
            times = max(1, wanted.timing_repeats // calls) + wanted.seeds - 1
            seconds += times * samples * calls / images_a_second[name]
            rows += wanted.seeds
    few = min(SCORED, samples)
    chosen = data.reference.read(_first(few, context))
    scoring = _median(lambda: meter.measure(chosen.x, chosen.cond), context.device, warm_up=0, most=1)
    report = PICTURED * max(wanted.teacher_steps) / images_a_second["teacher"] + PICTURED * scoring / few
    return {
        "rows": rows,
        "samples": samples,
        "evaluation_seconds": seconds + rows * scoring * samples / few,
        "report_seconds": report,
        "extractors": ", ".join(names) or "none",
    }


def _first(number: int, context: Context) -> torch.Tensor:
    return torch.arange(number) % len(context.data.reference)


def _grids(task: Task, settings: LoopSettings, done: int) -> int:
    """Steps with a checkpoint and its samples that are still to come."""
    every = settings.checkpoint_every
    return max(0, task.steps // every - done // every) + (task.steps % every != 0 and done < task.steps)


def _size(network: nn.Module) -> dict[str, int]:
    return {
        "parameters": sum(one.numel() for one in network.parameters()),
        "weight_bytes": _bytes(network.state_dict().values()),
    }


def _bytes(tensors: object) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)  # type: ignore[attr-defined]


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that this process has held in memory, or the accelerator for it; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _check_writable(out: Path) -> None:
    """Whether the run's folder could be made, without making it."""
    above = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UserError(f"{above} is not a folder; choose another --out")
    if not os.access(above, os.W_OK):
        raise UserError(f"{above} cannot be written; choose another --out")


# ---- as text


def format_plan(plan: Plan) -> str:
    """The plan for a terminal."""
    lines = [f"data         {plan.data[0]}", *(f"             {line}" for line in plan.data[1:]), ""]
    header = f"{'':13s}{'steps':>8s}{'batch':>7s}{'parameters':>13s}{'weights':>10s}{'checkpoints':>13s}"
    lines.append(header + f"{'memory':>10s}{'s/step':>9s}{'time':>12s}  ")
    for one in plan.stages:
        line = f"{one.name:13s}"
        if one.left:
            line += f"{one.left:>8,}{one.batch:>7,}{one.parameters:>13,}{size(one.weight_bytes):>10s}"
            line += f"{size(one.state_bytes):>13s}{size(one.memory_bytes):>10s}{one.step_seconds:>9.3g}"
        else:
            line += f"{'':15s}{one.parameters:>13,}{size(one.weight_bytes):>10s}{'':32s}"
        lines.append(f"{line}{duration(one.seconds):>12s}  {one.state}")
    if plan.rows:
        row = f"{plan.rows} times {plan.samples:,} images; extractors: {plan.extractors}"
        lines.append(f"{'evaluation':13s}{row:70s}{duration(plan.evaluation_seconds):>12s}")
        lines.append(f"{'report':83s}{duration(plan.report_seconds):>12s}")
    lines.append(f"{'in all':83s}{duration(plan.seconds):>12s}")
    peak = "unknown here" if plan.peak_bytes is None else size(plan.peak_bytes)
    if "classifier" in plan.extractors:
        lines.append("The classifier's training is not counted: minutes, once for a data set.")
    lines += ["", f"Peak memory while this was measured: {peak}. {'; '.join(plan.facts)}. Nothing was written."]
    return "\n".join(lines)


def size(number: float) -> str:
    """Bytes, in the unit that leaves up to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
