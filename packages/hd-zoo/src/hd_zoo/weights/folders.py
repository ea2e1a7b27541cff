"""Weights on disk: safetensors and a ``config.json``. Never a pickle, never a half-written file."""

from __future__ import annotations

import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hd_zoo.registry import blueprint, build, computed_buffers, most_blocks
from hd_zoo.weights.shards import (
    INDEX,
    SHARD_BYTES,
    WEIGHTS,
    check_path,
    describe_tensors,
    read_tensors,
    shard_files,
    shard_writers,
)
from hd_zoo.weights.unwrap import check_finite, plain_weights, unwrap
from hd_zoo.weights.words import listed, one_line
from hd_zoo.wrappers.convert import CONVERTERS

CONFIG = "config.json"
#: What is written, and what is read: before the third, arguments had other names and meanings; see _upgraded.
FORMAT, FORMATS = "hd-zoo/3", ("hd-zoo/1", "hd-zoo/2", "hd-zoo/3")
#: The largest number that a converter of a file may be given: it makes tables of that length. [ours]
MOST_STEPS = 1_000_000
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
        model: a network of this package, perhaps behind converters of it. torch.compile, DDP and FSDP2 around it or
            around its parts are left out; with FSDP2 every process must call, and the first one writes.
        folder: where ``config.json`` and ``model.safetensors`` go, or for large networks several files with an
            index. All are written in full under temporary names before any is renamed, so that a failure leaves
            what was there as it was.
        metadata: JSON-able facts to keep in the configuration (training step, data, scores ...).
        shard_bytes: the largest file.

    Raises:
        ValueError: if the network was not built by this package, if its weights are not finite (with the first
            tensor's name), or for a folder whose name is not UTF-8. Nothing is written then.
        TypeError: if metadata is not JSON-able.
        OSError: if the folder cannot be written, or the disk is full.
    """
    converters, network = unwrap(model)
    architecture, arguments = blueprint(network)
    config: dict[str, Any] = {"format": FORMAT, "architecture": architecture, "arguments": arguments}
    if converters:
        config["converters"] = converters
    if metadata:
        config["metadata"] = metadata
    text = json.dumps(config, indent=2) + "\n"
    folder = check_path(folder)
    tensors = plain_weights(network)
    if tensors is None:  # another process has them, and writes
        return folder
    folder.mkdir(parents=True, exist_ok=True)
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
        ValueError: for a foreign or damaged configuration, damaged weights, weights that do not fit it (with the first
            keys, shapes and dtypes at fault) or that are not finite, or a path that is not UTF-8. One line. Nothing
            from the files is executed, and shapes are compared before anything is read.
    """
    folder = check_path(_local(source, revision))
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}: a model folder holds {CONFIG} and {WEIGHTS}")
    files = shard_files(folder)
    config = read_config(folder)
    found = describe_tensors(files)
    depth = most_blocks(config["arguments"])
    if depth > len(found):  # or building it would take for ever
        raise ValueError(
            f"{files[0]} does not fit its {CONFIG}: {one_line(depth, 30)} blocks, but {len(found)} tensors"
        )
    try:
        model = build(config["architecture"], config["arguments"], device="meta")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: {one_line(error, 300)}") from error
    _check_fit(files[0], model.state_dict(), found)
    if computed_buffers(model):  # now that the sizes are the file's
        with torch.random.fork_rng(devices=[]):
            model = build(config["architecture"], config["arguments"]).to(device)
    tensors = dict(read_tensors(files, device, dtype))
    try:
        check_finite(tensors)
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error
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


def _wrap(model: nn.Module, converter: Any, path: Path) -> nn.Module:
    try:
        if any(isinstance(value, int) and value > MOST_STEPS for value in converter["arguments"].values()):
            raise ValueError(f"an argument is larger than {MOST_STEPS:,}")
        kind = CONVERTERS[converter["name"]]
        parameters = inspect.signature(kind).parameters.values()
        known = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
        if unknown := converter["arguments"].keys() - known:
            raise ValueError(f"unknown arguments {sorted(unknown)}")
        return kind(model, **converter["arguments"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} names a converter that this package does not know: {one_line(error)}") from error


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
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(config, dict) or config.get("format") not in FORMATS:
        raise ValueError(f'{path} does not say "format": "{FORMAT}" or one before: not a model of this package')
    if not isinstance(config.get("architecture"), str) or not isinstance(config.get("arguments"), dict):
        raise ValueError(f"{path} lacks an architecture (text) or its arguments (an object)")
    if not isinstance(config.get("converters", []), list):
        raise ValueError(f"{path} has converters that are no list")
    if config["format"] != FORMAT:
        config["arguments"] = _upgraded(config["arguments"])
    return config


def _upgraded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a file in an older format, by their names and with their meanings of today."""
    arguments = dict(arguments)
    for then, now in RENAMED:
        if then in arguments and now not in arguments:
            arguments[now] = arguments.pop(then)
    if arguments.get("early_blocks") == 0:  # it stood for the usual number
        del arguments["early_blocks"]
    if isinstance(arguments.get("qk_norm"), bool):  # of the blocks' kind; with LayerNorm, eps was 1e-6
        arguments["qk_norm"] = arguments.get("norm", "layer") if arguments["qk_norm"] else None
        if arguments["qk_norm"] == "layer":
            arguments["qk_norm_eps"] = 1e-6
    return arguments


def _check_fit(path: Path, expected: dict[str, Tensor], found: dict[str, tuple[tuple[int, ...], bool]]) -> None:
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        shape, floating = found[name]
        if shape != tuple(expected[name].shape):
            problems.append(f"{name} has shape {shape}, not {tuple(expected[name].shape)}")
        if not floating:
            problems.append(f"{name} holds other than floating-point numbers")
    if problems:
        raise ValueError(f"{path} does not fit its {CONFIG}: {listed(problems)}")


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
