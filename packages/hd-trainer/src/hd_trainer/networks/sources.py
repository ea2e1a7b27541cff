"""The text after ``--teacher``: a network by where it comes from. A teacher is checked before anything is written."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hd_zoo
from hd_trainer.checks import short
from hd_trainer.data import Dataset
from hd_trainer.data.source import split_place
from hd_trainer.errors import UserError
from hd_trainer.files import read_json
from hd_trainer.networks.fields import first_line
from hd_trainer.networks.folders import (
    CONFIG,
    call_function,
    fingerprint,
    is_of_function,
    read_folder,
    weights_digest,
)
from hd_trainer.user_code import is_function

#: What can be asked for, for help and documentation.
TEACHERS = {
    "FOLDER": "of hd_zoo.save_pretrained, or of a run: its teacher",
    "NAME:FILE": "official weights of a network of `hdistill list models`: sit_xl_2:SiT-XL-2-256x256.pt; "
    "?image_size=64 &classes= and its like, for other sizes",
    "FOLDER or OWNER/NAME": "a pipeline or a network of diffusers, or its id on the hub; ?scheduler=FOLDER &subfolder=",
    "FILE.py:FUNCTION": "what a function of yours returns: a torch.nn.Module that is a velocity field",
}

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NAMED = re.compile(r"(\w+):(.+)", re.DOTALL)
_DIFFUSERS_OPTIONS = ("scheduler", "subfolder")
_RUN, _RUN_SOURCES = "recipe.json", "sources.json"

#: Hash of each source that is no folder of ours, as it was last read by this process.
_read_before: dict[str, str] = {}


def load_teacher(source: str | Path, data: Dataset, device: torch.device) -> nn.Module:
    """The teacher that ``source`` names: frozen, in evaluation mode, and found to be one that fits the data.

    Raises:
        UserError: one line, for a source that is nothing of :data:`TEACHERS` or damaged, a student, a network for other
            samples or classes, or one that does not answer as a velocity field does.
    """
    name = f"teacher {source}"
    network: Any = read_network(source, device)
    if getattr(network, "takes_r", False) is True:
        raise UserError(f"{name} is a student (it takes r): a teacher is what it was distilled from")
    cond = data.train.read(torch.arange(2)).to(device).cond
    shape, classes = getattr(network, "sample_shape", data.shape), getattr(network, "classes", len(data.classes))
    if tuple(shape) != data.shape or classes != len(data.classes):
        without = tuple(shape) == data.shape and classes == 0
        advice = "; leave the labels out with the data's option labels=false" if without else ""
        raise UserError(
            f"{name} is for samples {tuple(shape)} of {classes} classes, "
            f"the data set {data.name!r} has {data.shape} and {len(data.classes)}{advice}"
        )
    try:
        hd_zoo.check_teacher(network, cond, device=device)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return network


def read_network(source: str | Path, device: torch.device) -> nn.Module:
    """The network that ``source`` names, frozen, in evaluation mode; nothing is known of data.

    Args:
        source: text as after ``--teacher``; a path is a folder, and never a name on the hub.

    Raises:
        UserError: for a source that is nothing of :data:`TEACHERS`, or whatever is wrong with it.
    """
    # A folder of ours by the path as given: a folder above may be named in other bytes than UTF-8.
    if isinstance(source, Path) and (not source.is_dir() or is_folder_of_ours(str(source))):
        return read_folder(source, device)
    place = resolve(source)
    network = _read(place, device)
    if not is_folder_of_ours(place):
        _read_before[place] = fingerprint(network)
    return network


def resolve(source: str | Path) -> str:
    """The source by its full path; of a run's folder that of its teacher. It says where a network is from any folder.

    Raises:
        UserError: for what is nothing of :data:`TEACHERS`.
    """
    text = str(source)
    if is_function(text):
        path, colon, name = text.partition(":")
        return f"{Path(path).resolve()}{colon}{name}"
    place, options = split_place(text)
    if _is_dir(place):
        folder = Path(place).resolve()
        if (folder / _RUN).is_file() and not (folder / CONFIG).is_file():
            return _teacher_of_run(folder)
        return f"{folder}{options}"
    if (named := _NAMED.fullmatch(place)) is not None:
        return f"{named[1]}:{Path(named[2]).expanduser().resolve()}{options}"
    if _HUB.fullmatch(place):
        return text
    raise UserError(f"no network {short(text)}: there is no such folder. A teacher is one of {', '.join(TEACHERS)}")


def is_folder_of_ours(source: str) -> bool:
    """Whether a resolved source is a folder of hd_zoo.save_pretrained or of a run's stage."""
    config = Path(source) / CONFIG
    return _is_dir(source) and config.is_file() and "_class_name" not in read_json(config)


def source_digest(source: str | Path) -> str:
    """SHA-256 by which a source is known again: of a folder's weights, else of the network that was read.

    Raises:
        UserError: if it is not there.
    """
    if isinstance(source, Path) and not source.is_dir():
        return weights_digest(source)
    place = resolve(source)
    if is_folder_of_ours(place):
        return weights_digest(Path(place))
    if place not in _read_before:
        read_network(place, torch.device("cpu"))
    return _read_before[place]


def _read(place: str, device: torch.device) -> nn.Module:
    if is_function(place):
        return call_function(place, device)
    path, options = split_place(place)
    if _is_dir(path):
        folder = Path(path)
        if is_of_function(folder) or not _is_of_diffusers(folder, options):
            return read_folder(folder, device)
        return _read_diffusers(path, options, device)
    if (named := _NAMED.fullmatch(path)) is not None:
        return _read_published(named[1], named[2], options, device)
    return _read_diffusers(path, options, device)


def _read_published(name: str, file: str, options: str, device: torch.device) -> nn.Module:
    settings: dict[str, Any] = {key: _value(value) for key, value in _parsed(name, options, None).items()}
    try:
        network: nn.Module = hd_zoo.load_published(file, name, **settings)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"teacher {name}:{file}{options}: {error}") from error
    return network.to(device).requires_grad_(False)


def _read_diffusers(source: str, options: str, device: torch.device) -> nn.Module:
    settings = _parsed(source, options, _DIFFUSERS_OPTIONS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of importing the library
            from hd_zoo.adapters import from_diffusers

            network: nn.Module = from_diffusers(source, use_safetensors=True, **settings)
    except ModuleNotFoundError as error:
        raise UserError(f"teacher {source} needs the package {error.name}: pip install {error.name}") from error
    except Exception as error:  # whatever the library, the hub or the network between run into
        where = "" if _is_dir(source) else "there is no such folder, and as an id of the hub it fails with "
        raise UserError(f"teacher {source}: {where}{type(error).__name__}: {first_line(error)}") from error
    return network.to(device).requires_grad_(False)


def _is_of_diffusers(folder: Path, options: str = "") -> bool:
    """Whether a folder holds a pipeline or a network of that library."""
    inside = [folder / part / CONFIG for part in ("", "transformer", "unet")]
    known = any(path.is_file() and "_class_name" in read_json(path) for path in inside)
    return known or (folder / "model_index.json").is_file() or bool(options)


def _teacher_of_run(folder: Path) -> str:
    if (folder / "teacher" / CONFIG).is_file():
        return str(folder / "teacher")
    noted = read_json(folder / _RUN_SOURCES).get("teacher") if (folder / _RUN_SOURCES).is_file() else None
    found = (noted.get("source") or noted.get("folder")) if isinstance(noted, dict) else None
    if not isinstance(found, str) or (Path(found) / _RUN).is_file():
        raise UserError(f"the run in {folder} has no finished teacher; train it first, or name another source")
    return found


def _parsed(kind: str, options: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    """Options by name; ``known`` None: whoever takes them checks their names."""
    found: dict[str, Any] = {}
    for part in options.removeprefix("?").split("&") if options else ():
        name, equals, value = part.partition("=")
        if known is not None and name not in known:
            raise UserError(f"teacher {kind}: unknown option {short(name)}; known: {', '.join(known)}")
        if name in found or not equals or not value:
            raise UserError(f"teacher {kind}: option {name} needs one value, as in ?{name}=...; got {short(options)}")
        found[name] = value
    return found


def _value(text: str) -> Any:
    """A number, a switch or a text; the network checks what it needs."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_dir(place: str) -> bool:
    try:
        return os.path.isdir(place)
    except ValueError:  # a name that no file system takes
        return False
