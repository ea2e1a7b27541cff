"""Resumable state: ``checkpoints/000400/{state.safetensors, state.json}``, complete or absent, never a pickle."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from hd_trainer.checks import MAX_STEPS
from hd_trainer.engine.optimizer import LEAST, Optimizer
from hd_trainer.errors import UserError
from hd_trainer.files import (
    read_json,
    read_tensors,
    remove_folder,
    remove_incomplete,
    write_folder,
    write_json,
    write_tensors,
)

FOLDER, TENSORS, FACTS = "checkpoints", "state.safetensors", "state.json"

#: What to do about a network that has diverged.
DIVERGED = "lower its learning rate and start again in another folder"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage has come, beside its tensors."""

    step: int = 0
    """steps done"""
    seconds: float = 0.0
    """time spent in them"""
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    """(sum, number) of each scalar since the last record"""


def save_checkpoint(
    folder: Path, progress: Progress, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer], keep: int = 2
) -> None:
    """Write the state after ``progress.step`` steps into ``folder/checkpoints``, then keep the newest ``keep``.

    Raises:
        UserError: if a weight or a moment is not finite: a network that has diverged is not saved.
    """
    tensors = {f"module.{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    tensors |= {f"optimizer.{n}.{k}": v for n, o in optimizers.items() for k, v in o.tensors().items()}
    for name, tensor in tensors.items():
        if not _is_all_finite(tensor):
            raise UserError(f"{name.split('.', 1)[1]} is no longer finite after step {progress.step}; {DIVERGED}")
    parent = folder / FOLDER
    parent.mkdir(exist_ok=True)

    def fill(temporary: Path) -> None:
        write_tensors(temporary / TENSORS, tensors)
        write_json(temporary / FACTS, asdict(progress))

    write_folder(parent / f"{progress.step:06d}", fill)
    tidy(folder, keep)


def tidy(folder: Path, keep: int = 2) -> None:
    """Remove all checkpoints but the newest ``keep``, and what a killed process left half-written."""
    remove_incomplete(folder)
    remove_incomplete(folder / FOLDER)
    for old in complete_checkpoints(folder)[:-keep]:
        remove_folder(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    parent = folder / FOLDER
    if not parent.is_dir():
        return []
    found = (path for path in parent.iterdir() if _is_step(path.name) and (path / FACTS).is_file())
    return sorted(found, key=lambda path: int(path.name))


def load_newest(folder: Path, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]) -> Progress:
    """Restore modules and optimisers from the newest complete checkpoint; a new Progress where there is none.

    Everything is read and checked before anything is changed.

    Raises:
        UserError: if that checkpoint is damaged or belongs to other networks.
    """
    found = complete_checkpoints(folder)
    if not found:
        return Progress()
    path = found[-1]
    try:
        progress = _progress(read_json(path / FACTS), path)
        tensors = read_tensors(path / TENSORS)
    except UserError as error:
        raise UserError(
            f"checkpoint {path} is damaged ({error}); remove that folder to go on from the one before"
        ) from error
    _check(tensors, modules, optimizers, path)
    for name, module in modules.items():
        module.load_state_dict(_below(tensors, f"module.{name}."))
    for name, optimizer in optimizers.items():
        optimizer.load_tensors(_below(tensors, f"optimizer.{name}."))
    return progress


def _progress(facts: dict[str, Any], path: Path) -> Progress:
    """The facts, once they are of the form that :func:`save_checkpoint` writes.

    Raises:
        UserError: for a missing or mistyped entry.
    """
    step, seconds, sums = facts.get("step"), facts.get("seconds"), facts.get("sums")
    if _is_whole(step) and step == int(path.name) and _is_finite(seconds) and seconds >= 0 and isinstance(sums, dict):
        pairs = [tuple(pair) if isinstance(pair, list) else () for pair in sums.values()]
        if all(len(pair) == 2 and _is_finite(pair[0]) and _is_whole(pair[1], low=1) for pair in pairs):
            totals = {name: (float(pair[0]), pair[1]) for name, pair in zip(sums, pairs, strict=True)}
            return Progress(step=step, seconds=float(seconds), sums=totals)
    raise UserError(f"{FACTS} does not hold step, seconds and sums as they were written")


def _check(
    tensors: dict[str, Tensor], modules: dict[str, nn.Module], optimizers: dict[str, Optimizer], path: Path
) -> None:
    """Names, shapes and dtypes are those of the networks and optimisers at hand, and all numbers are finite."""
    expected = {f"module.{n}.{k}": (v.shape, v.dtype) for n, m in modules.items() for k, v in m.state_dict().items()}
    for name, optimizer in optimizers.items():
        prefix = f"optimizer.{name}."
        forms = optimizer.expected(_below(tensors, prefix))
        expected |= {prefix + key: form for key, form in forms.items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[0]
        raise UserError(
            f"checkpoint {path} belongs to other networks, or to an earlier version ({odd} differs); "
            "choose another folder, or remove it"
        )
    for name, tensor in tensors.items():
        least = LEAST.get(name.rsplit(".", 1)[1]) if name.startswith("optimizer.") else None
        if not _is_all_finite(tensor) or (least is not None and bool((tensor < least).any())):
            raise UserError(f"checkpoint {path} is damaged ({name} holds impossible numbers); remove that folder")


def _is_all_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= len(str(MAX_STEPS))


def _is_whole(value: Any, low: int = 0) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MAX_STEPS


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
