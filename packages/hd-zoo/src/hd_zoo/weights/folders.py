"""Weights on disk: safetensors and a ``config.json``. Never a pickle, never a half-written file."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hd_zoo.convert import CONVERTERS, Converter
from hd_zoo.registry import blueprint, build
from hd_zoo.weights.shards import INDEX, SHARD_BYTES, WEIGHTS, read_tensors, shard_files, shard_writers

CONFIG = "config.json"
#: The second has converters, which a reader of the first would overlook.
FORMATS = ("hd-zoo/1", "hd-zoo/2")
#: Arguments that had another name in files written before: (then, now).
RENAMED = (("interval", "r_embedding"), ("heads", "num_heads"))


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    metadata: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a network's weights and its configuration into ``folder`` (made if missing); returns the folder.

    Args:
        model: a network of this package, perhaps behind converters of it.
        folder: where ``config.json`` and ``model.safetensors`` go, or for large networks several files with an
            index. All are written in full under temporary names before any is renamed, so that a failure leaves
            what was there as it was.
        metadata: JSON-able facts to keep in the configuration (training step, data, scores ...).
        shard_bytes: the largest file.

    Raises:
        ValueError: if the network was not built by this package.
        TypeError: if metadata is not JSON-able.
        OSError: if the folder cannot be written.
    """
    converters, network = _unwrap(model)
    architecture, arguments = blueprint(network)
    config: dict[str, Any] = {"format": FORMATS[bool(converters)], "architecture": architecture, "arguments": arguments}
    if converters:
        config["converters"] = converters
    if metadata:
        config["metadata"] = metadata
    text = json.dumps(config, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    writers = shard_writers(tensors, folder, shard_bytes)
    _replace({**writers, folder / CONFIG: lambda path: path.write_text(text, encoding="utf-8")})
    # What an earlier, differently divided save left would be read in place of, or beside, the new files.
    for old in {folder / WEIGHTS, folder / INDEX, *folder.glob("model-*-of-*.safetensors")} - writers.keys():
        old.unlink(missing_ok=True)
    return folder


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> nn.Module:
    """Load a network that :func:`save_pretrained` wrote, in evaluation mode. Draws no random numbers.

    Args:
        source: a folder, or where huggingface_hub is installed the id of a repository on its hub, ``owner/name``.
        device: where the weights go, straight from the file.
        dtype: cast floating-point weights to it, one tensor after the other; None keeps the file's.
        revision: of the repository on the hub.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ModuleNotFoundError: for an id if huggingface_hub is not installed.
        ValueError: for a foreign or damaged configuration, damaged weights, or weights that do not fit it
            (with the keys, shapes and dtypes at fault). Nothing from the files is executed.
    """
    folder = _local(source, revision)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}: a model folder holds {CONFIG} and {WEIGHTS}")
    files = shard_files(folder)
    config = read_config(folder)
    model = build(config["architecture"], config["arguments"], device="meta")
    tensors = dict(read_tensors(files, device, dtype))
    _check_fit(files[0], model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    for converter in reversed(config.get("converters", [])):
        model = _wrap(model, converter, folder / CONFIG)
    return model.eval()


def _local(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder, or a snapshot of the repository on the hub."""
    folder = Path(source)
    if folder.exists() or not isinstance(source, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"there is no folder {source}; if it is a repository on the hub, pip install huggingface_hub"
        ) from error
    return Path(snapshot_download(source, revision=revision, allow_patterns=[CONFIG, INDEX, "*.safetensors"]))


def _unwrap(model: nn.Module) -> tuple[list[dict[str, Any]], nn.Module]:
    """The converters around a network, outermost first, and the network."""
    names = {kind: name for name, kind in CONVERTERS.items()}
    found = []
    while isinstance(model, Converter):
        if type(model) not in names:
            raise ValueError(f"a converter of this package is needed; got {type(model).__name__}")
        found.append({"name": names[type(model)], "arguments": model.arguments})
        model = model.network
    return found, model


def _wrap(model: nn.Module, converter: Any, path: Path) -> nn.Module:
    try:
        return CONVERTERS[converter["name"]](model, **converter["arguments"])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} names a converter that this package does not know: {error}") from error


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked contents of ``folder/config.json``: format, architecture, arguments and perhaps metadata.

    Arguments have their names of today, whatever the file's version called them.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not JSON, or not a configuration of this package.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") not in FORMATS:
        raise ValueError(f'{path} does not say "format": "{FORMATS[0]}": not a model of this package')
    if not isinstance(config.get("architecture"), str) or not isinstance(config.get("arguments"), dict):
        raise ValueError(f"{path} lacks an architecture (text) or its arguments (an object)")
    if not isinstance(config.get("converters", []), list):
        raise ValueError(f"{path} has converters that are no list")
    arguments = config["arguments"]
    for then, now in RENAMED:
        if then in arguments and now not in arguments:
            arguments[now] = arguments.pop(then)
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
