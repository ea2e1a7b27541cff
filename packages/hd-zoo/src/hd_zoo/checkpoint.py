"""Weights on disk: ``model.safetensors`` and ``config.json``. Never a pickle, never a half-written file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hd_zoo.registry import blueprint, build

WEIGHTS, CONFIG, FORMAT = "model.safetensors", "config.json", "hd-zoo/1"


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write a network's weights and its configuration into ``folder`` (made if missing); returns the folder.

    Args:
        model: a network of this package.
        folder: where ``model.safetensors`` and ``config.json`` go. Both are written in full under temporary
            names before either is renamed, so that a failure leaves the old pair as it was.
        metadata: JSON-able facts to keep in the configuration (training step, data, scores ...).

    Raises:
        ValueError: if the network was not built by this package.
        TypeError: if metadata is not JSON-able.
        OSError: if the folder cannot be written.
    """
    architecture, arguments = blueprint(model)
    config: dict[str, Any] = {"format": FORMAT, "architecture": architecture, "arguments": arguments}
    if metadata:
        config["metadata"] = metadata
    text = json.dumps(config, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    _replace(
        {
            folder / WEIGHTS: lambda path: save_file(tensors, path),
            folder / CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        }
    )
    return folder


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a network that :func:`save_pretrained` wrote, in evaluation mode. Draws no random numbers.

    Args:
        folder: holds ``model.safetensors`` and ``config.json``.
        device: where the weights go, straight from the file.
        dtype: cast floating-point weights to it; None keeps the file's.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: for a foreign or damaged configuration, damaged weights, or weights that do not fit it
            (with the keys, shapes and dtypes at fault). Nothing from the files is executed.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}: a model folder holds {CONFIG} and {WEIGHTS}")
    config = read_config(folder)
    model = build(config["architecture"], config["arguments"], device="meta")
    try:
        tensors = load_file(folder / WEIGHTS, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read, is damaged or not safetensors: {error}") from error
    _check_fit(folder / WEIGHTS, model.state_dict(), tensors)
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked contents of ``folder/config.json``: format, architecture, arguments and perhaps metadata.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON, or not a configuration of this package.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f'{path} does not say "format": "{FORMAT}": not a model of this package')
    if not isinstance(config.get("architecture"), str) or not isinstance(config.get("arguments"), dict):
        raise ValueError(f"{path} lacks an architecture (text) or its arguments (an object)")
    return config


def _check_fit(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    problems += [
        f"{name} has dtype {found[name].dtype}, not a floating-point one"
        for name in expected.keys() & found.keys()
        if expected[name].is_floating_point() and not found[name].is_floating_point()
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit its {CONFIG}: {'; '.join(sorted(problems)[:5])}{more}")


def _replace(writers: dict[Path, Callable[[Path], Any]]) -> None:
    """Write every file under a temporary name beside its place, then rename them all."""
    temporaries: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(handle)
            temporaries[path] = Path(name)
            write(temporaries[path])
            temporaries[path].chmod(0o644)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
