"""The training loop of every stage. Read it top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from hd_trainer import signals
from hd_trainer.checks import check_steps
from hd_trainer.engine.checkpoint import DIVERGED, Progress, load_newest, save_checkpoint, tidy
from hd_trainer.engine.optimizer import Optimizer
from hd_trainer.errors import UserError
from hd_trainer.files import remove_incomplete, write_json
from hd_trainer.images import save_grid
from hd_trainer.progress import progress, say
from hd_trainer.writers import JsonLines, Writer, WriterFactory

DONE, SAMPLES = "done.json", "samples"


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How often a stage speaks and saves."""

    log_every: int = 20
    """steps averaged into one record of metrics.jsonl"""
    checkpoint_every: int = 200
    """steps between resumable checkpoints (each with a grid of samples)"""

    def __post_init__(self) -> None:
        check_steps(log_every=self.log_every, checkpoint_every=self.checkpoint_every)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a stage gives to the loop. All randomness of ``step`` must be a function of the step's number."""

    name: str
    steps: int
    modules: dict[str, nn.Module]
    """everything that changes: trained networks and their averages"""
    optimizers: dict[str, Optimizer]
    step: Callable[[int], dict[str, Tensor]]
    """does step i (from 0) and returns scalars worth recording; an entry may be absent at some steps"""
    sample: Callable[[], Tensor]
    """a few images (N, C, H, W) in [-1, 1] from the same noise every time"""
    save: Callable[[Path], None]
    """writes the finished weights into the stage's folder"""
    compare: Callable[[Tensor], dict[str, float]] = lambda samples: {}
    """scalars worth recording of the samples, whenever they are drawn"""
    alarms: Callable[[Mapping[str, float], bool], Mapping[str, str]] = lambda record, at_end: {}
    """a sentence for each thing that is wrong by the latest scalars, by its kind; the flag says: at the stage's end"""


def train(task: Task, folder: Path, settings: LoopSettings, writers: Sequence[WriterFactory] = (JsonLines,)) -> None:
    """Run a stage to its end from wherever its folder says it is; a finished stage returns at once.

    Raises:
        UserError: for a damaged checkpoint, or a loss or a weight that is no longer finite.
        signals.Stopped: after Ctrl-C or SIGTERM, once a checkpoint has been written.
    """
    if (folder / DONE).exists():
        print(f"{task.name}: done already ({folder})")
        return
    tidy(folder)
    remove_incomplete(folder / SAMPLES)
    saved = load_newest(folder, task.modules, task.optimizers)
    start, sums = saved.step, dict(saved.sums)
    said: set[str] = set()
    with _opened(writers, folder, start) as opened, signals.postponed() as stop_requested:
        if start:
            print(f"{task.name}: resuming after step {start} of {task.steps}")
            if _is_due(start, task, settings) and not all(path.exists() for path in _grids(task, folder, start)):
                _save_samples(_draw(task, start), task, folder, start, opened)  # a kill came before them
        began = time.perf_counter() - saved.seconds
        for step in _steps(task.name, start, task.steps):
            for name, value in task.step(step).items():
                total, number = sums.get(name, (0.0, 0))
                sums[name] = (total + float(value), number + 1)
            done, seconds = step + 1, time.perf_counter() - began
            _check_finite(task.name, done, sums)
            due = _is_due(done, task, settings)
            images = _draw(task, done) if due else None
            if images is not None:
                sums |= {name: (value, 1) for name, value in task.compare(images).items()}
                _say(task.name, done, task.alarms(_averages(sums), done == task.steps), said)
            if done % settings.log_every == 0 or done == task.steps:
                for writer in opened:
                    writer.write(done, seconds, _averages(sums))
                sums = {}
            if due or stop_requested():
                saved = Progress(step=done, seconds=seconds, sums=sums)
                save_checkpoint(folder, saved, task.modules, task.optimizers)
                if images is not None:
                    _save_samples(images, task, folder, done, opened)
            if stop_requested() and done < task.steps:
                raise signals.Stopped(
                    f"{task.name} stopped after step {done} of {task.steps}; the same command goes on from there"
                )
        task.save(folder)
        write_json(folder / DONE, {"steps": task.steps, "seconds": round(time.perf_counter() - began, 2)})
        if stop_requested():
            raise signals.Stopped(f"{task.name} is done; the same command goes on with what follows")


def _is_due(step: int, task: Task, settings: LoopSettings) -> bool:
    """Whether a checkpoint and a grid of samples belong to this step."""
    return step % settings.checkpoint_every == 0 or step == task.steps


def _averages(sums: dict[str, tuple[float, int]]) -> dict[str, float]:
    return {name: total / number for name, (total, number) in sums.items()}


def _say(name: str, step: int, alarms: Mapping[str, str], said: set[str]) -> None:
    """Print each kind of alarm once; ``said`` remembers."""
    for kind, sentence in alarms.items():
        if kind not in said:
            say(f"{name}, step {step}: warning: {sentence}")
    said.update(alarms)


def _check_finite(name: str, step: int, sums: dict[str, tuple[float, int]]) -> None:
    """At every step, so that a diverged run ends at once."""
    broken = [key for key, (total, _) in sums.items() if not math.isfinite(total)]
    if broken:
        raise UserError(f"{name}: {', '.join(broken)} no longer finite at step {step}; {DIVERGED}")


def _draw(task: Task, step: int) -> Tensor:
    """The task's samples. They are drawn before a checkpoint is written: finite weights may still overflow in use."""
    images = task.sample()
    if not bool(images.isfinite().all()):
        raise UserError(f"{task.name}: samples no longer finite after step {step}; {DIVERGED}")
    return images


def _grids(task: Task, folder: Path, step: int) -> list[Path]:
    """Where the samples of a step are kept: its own grid, and at the end the stage's."""
    return [folder / SAMPLES / f"{step:06d}.png", *[folder / f"{SAMPLES}.png"] * (step == task.steps)]


def _save_samples(images: Tensor, task: Task, folder: Path, step: int, writers: Sequence[Writer]) -> None:
    """Write the grids of this step, and show them to the writers."""
    (folder / SAMPLES).mkdir(exist_ok=True)
    for path in _grids(task, folder, step):
        save_grid(images, path)
    for writer in writers:
        writer.picture(step, _grids(task, folder, step)[0])


@contextlib.contextmanager
def _opened(factories: Sequence[WriterFactory], folder: Path, step: int) -> Iterator[list[Writer]]:
    """The stage's writers, closed however the block ends."""
    with contextlib.ExitStack() as stack:
        writers = []
        for factory in factories:
            writer = factory(folder, step)
            stack.callback(writer.close)
            writers.append(writer)
        yield writers


def _steps(name: str, start: int, steps: int) -> Iterator[int]:
    """The numbers of the steps to do."""
    yield from progress(range(start, steps), desc=f"{name:12s}", initial=start, total=steps, unit="step")
