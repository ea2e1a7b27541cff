"""The training loop of every stage. Read it top to bottom."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hd_trainer.checkpoint import load_newest, save_checkpoint
from hd_trainer.errors import UserError
from hd_trainer.files import read_records, write_atomically, write_json
from hd_trainer.images import save_grid
from hd_trainer.optim import Optimizer

METRICS, DONE = "metrics.jsonl", "done.json"


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How often a stage speaks and saves."""

    log_every: int = 20
    """steps averaged into one record of metrics.jsonl"""
    checkpoint_every: int = 200
    """steps between resumable checkpoints (each with a grid of samples)"""

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.checkpoint_every < 1:
            raise UserError(
                f"log_every and checkpoint_every must be >= 1; got {self.log_every} and {self.checkpoint_every}"
            )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a stage gives to the loop. All randomness of ``step`` must be a function of the step's number."""

    name: str
    steps: int
    modules: dict[str, nn.Module]
    """everything that changes: trained networks and their moving averages"""
    optimizers: dict[str, Optimizer]
    step: Callable[[int], dict[str, Tensor]]
    """does step i (from 0) and returns scalars worth recording; an entry may be absent at some steps"""
    sample: Callable[[], Tensor]
    """a few images (N, C, H, W) in [-1, 1] from the same noise every time"""
    save: Callable[[Path], None]
    """writes the finished weights into the stage's folder"""


class Stopped(Exception):
    """Training was asked to stop; the state is saved."""


def train(task: Task, folder: Path, settings: LoopSettings) -> None:
    """Run a stage to its end from wherever its folder says it is; a finished stage returns at once.

    Raises:
        UserError: for a damaged checkpoint, or a loss that is no longer finite.
        Stopped: after Ctrl-C or SIGTERM, once a checkpoint has been written.
    """
    if (folder / DONE).exists():
        print(f"{task.name}: done already ({folder})")
        return
    facts = load_newest(folder, task.modules, task.optimizers) or {"step": 0, "sums": {}, "seconds": 0.0}
    start, sums, before = facts["step"], facts["sums"], facts["seconds"]
    # Records past the checkpoint would be written a second time.
    kept = [record for record in read_records(folder / METRICS) if record["step"] <= start]
    lines = "".join(json.dumps(record) + "\n" for record in kept)
    write_atomically(folder / METRICS, lambda path: path.write_text(lines, encoding="utf-8"))
    if start:
        print(f"{task.name}: resuming after step {start} of {task.steps}")

    began = time.perf_counter()
    with open(folder / METRICS, "a", encoding="utf-8") as metrics, _stop_request() as stop_requested:
        for step in _progress(task.name, start, task.steps):
            for name, value in task.step(step).items():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + float(value), count + 1)
            done = step + 1
            _check_finite(task.name, done, sums)
            seconds = before + time.perf_counter() - began
            if done % settings.log_every == 0 or done == task.steps:
                means = {name: total / count for name, (total, count) in sums.items()}
                metrics.write(json.dumps({"step": done, "seconds": round(seconds, 3), **means}) + "\n")
                metrics.flush()
                sums = {}
            if done % settings.checkpoint_every == 0 or done == task.steps or stop_requested():
                facts = {"sums": sums, "seconds": seconds}
                save_checkpoint(folder, done, task.modules, task.optimizers, facts)
                _save_samples(task, folder, done)
            if stop_requested() and done < task.steps:
                raise Stopped(
                    f"{task.name} stopped after step {done} of {task.steps}; the same command goes on from there"
                )
    task.save(folder)
    write_json(folder / DONE, {"steps": task.steps, "seconds": round(before + time.perf_counter() - began, 2)})
    if stop_requested():
        raise Stopped(f"{task.name} is done; the same command goes on with what follows")


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The random numbers of one step: a function of (seed, stage, step), so that resuming needs no stored state."""
    text = f"{stage}/{seed}/{step}".encode()
    # FNV-1a, 64 bit: Python's own hash of text differs from process to process.
    value = 0xCBF29CE484222325
    for byte in text:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return torch.Generator().manual_seed(value)


def _check_finite(name: str, step: int, sums: dict[str, Any]) -> None:
    """At every step, so that no checkpoint holds a diverged network."""
    broken = [key for key, (total, _) in sums.items() if not math.isfinite(total)]
    if broken:
        raise UserError(
            f"{name}: {', '.join(broken)} no longer finite at step {step}; "
            f"lower its learning rate and start again in another folder"
        )


def _save_samples(task: Task, folder: Path, step: int) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    images = task.sample()
    save_grid(images, folder / "samples" / f"{step:06d}.png")
    if step == task.steps:
        save_grid(images, folder / "samples.png")


def _progress(name: str, start: int, steps: int) -> Iterator[int]:
    # A log file gets a line now and then, a terminal a moving bar.
    interval = 0.5 if sys.stderr.isatty() else 10.0
    yield from tqdm(
        range(start, steps), desc=f"{name:12s}", initial=start, total=steps, mininterval=interval, unit="step"
    )


@contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag that is read between two steps; a second one acts as usual."""
    requested = False
    previous: dict[signal.Signals, Any] = {}

    def request(number: int, _frame: Any) -> None:
        nonlocal requested
        requested = True
        signal.signal(number, previous[signal.Signals(number)])

    try:
        for one in (signal.SIGINT, signal.SIGTERM):
            previous[one] = signal.signal(one, request)
    except ValueError:
        # Not in the main thread: signals are somebody else's.
        previous.clear()
    try:
        yield lambda: requested
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
