"""Tensors in one safetensors file or in several with an index, as the Hugging Face libraries lay them out."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hd_zoo.weights.words import one_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
#: safetensors' names of the dtypes that weights can have.
FLOATING = ("F64", "F32", "F16", "BF16")


def shard_writers(
    tensors: dict[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES
) -> dict[Path, Callable[[Path], Any]]:
    """What writes each file: one of weights, or several of at most ``shard_bytes`` and an index. No tensor is cut."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    if len(shards) == 1:
        return {folder / WEIGHTS: functools.partial(_save, tensors)}
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
    writers: dict[Path, Callable[[Path], Any]] = {}
    for file, shard in zip(files, shards, strict=True):
        writers[folder / file] = functools.partial(_save, shard)
    writers[folder / INDEX] = lambda path: path.write_text(index, encoding="utf-8")
    return writers


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, if safetensors can open what is there.

    Raises:
        ValueError: if it is not UTF-8.
    """
    try:
        str(Path(path)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {one_line(path)} is not UTF-8, which safetensors needs: rename it") from error
    return Path(path)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # A full disk or a size limit reaches safetensors as an error of the system, which it words itself.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise OSError(f"{path.parent} cannot be written: {one_line(error)}") from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path.parent)) from error


def shard_files(folder: Path) -> list[Path]:
    """The files that hold the weights.

    Raises:
        FileNotFoundError: if one of them is missing.
        ValueError: for an index that is damaged or that points out of the folder.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        files = [folder / WEIGHTS]
    else:
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is not an index of weights: {one_line(error)}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{index} names {one_line(repr(name), 80)}, which is no safetensors file of its folder"
                )
        files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}: a model folder holds config.json and its weights")
    return files


def describe_tensors(files: list[Path]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> (shape, whether it holds floating-point numbers) out of the files' headers alone.

    Raises:
        ValueError: if a file is damaged or not safetensors.
    """
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for file in files:
        with _opened(file, "cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is not a dictionary)
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype() in FLOATING
    return found


def read_tensors(
    files: list[Path], device: str | torch.device, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor), each straight to its device and dtype: no second copy of more than one tensor.

    Raises:
        ValueError: if a file is damaged or not safetensors.
    """
    for file in files:
        with _opened(file, device) as opened:
            for name in opened.keys():  # noqa: SIM118 (it is not a dictionary)
                tensor = opened.get_tensor(name)
                yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


@contextlib.contextmanager
def _opened(file: Path, device: str | torch.device) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read, is damaged or not safetensors: {one_line(error)}") from error
