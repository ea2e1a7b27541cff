"""The weights of a foreign checkpoint by name, out of ``.pt``, ``.pth``, ``.ckpt`` or ``.safetensors``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hd_zoo.weights.pickled import Archive, Dense
from hd_zoo.weights.words import one_line

#: Where training loops keep the weights in a checkpoint, the averaged ones first.
AVERAGED, CURRENT = ("ema", "model_ema", "ema_state_dict"), ("model", "state_dict", "net")
_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")


def read_weights(
    path: str | os.PathLike[str], *, averaged: bool = True, dropped: re.Pattern[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of whichever nesting, without a wrapper's prefix ("module.").

    They are views of the file where it allows: nothing is copied, and no size that the file only claims is allocated.

    Args:
        path: the file.
        averaged: take the moving average where the file has one beside the current weights.
        dropped: names that match its beginning are left out, unread.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as weights alone, holds none, or holds others than plain dense tensors of
            floating-point numbers. One line.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{one_line(path)} is a folder; a checkpoint is one file, and from_pretrained reads folders")
    if not path.is_file():
        raise FileNotFoundError(f"no file {one_line(path)}")
    try:
        found = _safetensors(path) if path.suffix == ".safetensors" else _archive(path, averaged, dropped)
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{one_line(path)} cannot be read as weights alone: {one_line(error)}") from error
    if not found:
        raise ValueError(f"{one_line(path)} holds no weights by name")
    return {_PREFIX.sub("", name): tensor for name, tensor in found.items()}


def _safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is not a dictionary)
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{one_line(name, 80)}: it has dtype {tensor.dtype}, not a floating-point one")
    return found


def _archive(path: Path, averaged: bool, dropped: re.Pattern[str] | None) -> dict[str, Tensor]:
    archive = Archive(path)
    contents: Any = archive.contents
    for place in (*AVERAGED, *CURRENT) if averaged else (*CURRENT, *AVERAGED):
        if isinstance(contents, dict) and isinstance(contents.get(place), dict):
            contents = contents[place]
            break
    if not isinstance(contents, dict):
        return {}
    found = {}
    for name, dense in contents.items():
        if (
            not isinstance(dense, Dense)
            or not isinstance(name, str)
            or (dropped and dropped.match(_PREFIX.sub("", name)))
        ):
            continue
        try:
            found[name] = archive.tensor(dense)
        except ValueError as error:
            raise ValueError(f"{one_line(name, 80)}: {error}") from error
    return found
