"""Resumable state: ``checkpoints/000400/{state.safetensors, state.json}``, complete or absent, never a pickle."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hd_trainer.errors import UserError
from hd_trainer.files import read_json, write_json
from hd_trainer.optim import Optimizer

FOLDER, TENSORS, FACTS = "checkpoints", "state.safetensors", "state.json"


def save_checkpoint(
    folder: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    facts: dict[str, Any],
    keep: int = 2,
) -> None:
    """Write the state after ``step`` steps into ``folder/checkpoints``, then drop all but the newest ``keep``.

    Everything goes into a temporary folder that is renamed when complete: a crash leaves no half checkpoint.
    """
    tensors = {f"module.{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    tensors |= {f"optimizer.{n}.{k}": v for n, o in optimizers.items() for k, v in o.tensors().items()}
    parent = folder / FOLDER
    parent.mkdir(exist_ok=True)
    for abandoned in parent.glob(".incomplete-*"):
        shutil.rmtree(abandoned, ignore_errors=True)  # by a process that was killed while it wrote
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".incomplete-"))
    try:
        # Clones: two entries must not share storage in the file (a moving average starts as a copy, but may be tied).
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        write_json(temporary / FACTS, {"step": step, **facts})
        target = parent / f"{step:06d}"
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    parent = folder / FOLDER
    if not parent.is_dir():
        return []
    found = (path for path in parent.iterdir() if path.name.isdigit() and (path / FACTS).is_file())
    return sorted(found, key=lambda path: int(path.name))


def load_newest(folder: Path, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]) -> dict[str, Any] | None:
    """Restore modules and optimisers from the newest complete checkpoint; its facts, or None where there is none.

    Raises:
        UserError: if that checkpoint is damaged or belongs to other networks. Nothing is changed then.
    """
    found = complete_checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    facts = read_json(path / FACTS)
    try:
        tensors = load_file(path / TENSORS)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"checkpoint {path} is damaged ({error}); remove that folder to go on from the one before"
        ) from error
    expected = {f"module.{n}.{k}": v.shape for n, m in modules.items() for k, v in m.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("module.")}
    if shapes != expected:
        raise UserError(f"checkpoint {path} belongs to other networks; choose another folder, or remove it")
    for name, module in modules.items():
        module.load_state_dict(_below(tensors, f"module.{name}."))
    for name, optimizer in optimizers.items():
        optimizer.load_tensors(_below(tensors, f"optimizer.{name}."))
    return facts


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
