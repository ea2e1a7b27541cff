"""Networks on disk: folders of hd_zoo, and folders of students whose network is a user's function."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hd_zoo
from hd_trainer.data import Dataset
from hd_trainer.engine.draws import seeded
from hd_trainer.errors import UserError
from hd_trainer.files import digest, read_json, read_tensors, write_files, write_json, write_tensors
from hd_trainer.networks.fields import is_of_zoo, try_network
from hd_trainer.user_code import call, load_function

WEIGHTS, CONFIG = "model.safetensors", "config.json"

#: In a config.json: the network is what a user's function returns. hd_zoo.from_pretrained refuses such a folder.
FUNCTION_FORMAT = "hd-trainer/function/1"
#: Name of the function where only a file is given.
DEFAULT_FUNCTION = "teacher"


@dataclass(frozen=True)
class Origin:
    """The function that a network came from; noted on the network, as ``origin``."""

    function: str
    """``/where/it/is/file.py:function``"""
    sha256: str
    """of the file"""


def read_folder(folder: Path, device: torch.device) -> nn.Module:
    """A frozen network from a folder that :func:`save_network` or hd_zoo.save_pretrained wrote.

    Raises:
        UserError: if it is missing or damaged.
    """
    network: nn.Module
    if is_of_function(folder):
        network = _read_student_of_function(folder, device)
    else:
        try:
            network = hd_zoo.from_pretrained(folder, device=device)
        except FileNotFoundError as error:
            raise UserError(f"{error}; train that stage first, or name another folder") from error
        except (ValueError, OSError, ImportError) as error:
            raise UserError(f"{error}; train that stage again, or name another folder") from error
    return network.requires_grad_(False)


def check_fits(network: Any, source: str, data: Dataset, device: torch.device) -> None:
    """Raises UserError unless the network was made for the data's samples and classes, and takes its conditions."""
    if tuple(network.sample_shape) != data.shape or network.classes != len(data.classes):
        raise UserError(
            f"the network in {source} is for samples {tuple(network.sample_shape)} of {network.classes} classes, "
            f"the data set {data.name!r} has {data.shape} and {len(data.classes)}"
        )
    try_network(network, data, device, f"the network in {source}")


def save_network(average: nn.Module, folder: Path, **metadata: Any) -> None:
    """Write an average's weights and its configuration: ``model.safetensors`` and ``config.json``.

    A network of hd_zoo or diffusers is written by hd_zoo.save_pretrained. Of a user's function the configuration names
    ``file.py:function`` and the file's hash: :func:`read_folder` calls it again.
    """
    origin = getattr(hd_zoo.network_inside(average), "origin", None)
    if origin is None:
        return write_files(folder, lambda temporary: _save_pretrained(average, temporary, metadata), last=CONFIG)
    config = {
        "format": FUNCTION_FORMAT,
        "function": origin.function,
        "sha256": origin.sha256,
        "interval_at": _interval_at(average),
        "metadata": metadata,
    }

    def fill(temporary: Path) -> None:
        write_tensors(temporary / WEIGHTS, average.state_dict())
        write_json(temporary / CONFIG, config)

    return write_files(folder, fill, last=CONFIG)


def _save_pretrained(network: nn.Module, folder: Path, metadata: dict[str, Any]) -> None:
    hd_zoo.save_pretrained(network, folder, metadata=metadata)


def load_vision_model(place: str, device: torch.device) -> nn.Module:
    """A frozen model of the library transformers, from a folder or by its name on the hub: for extractors.

    Raises:
        UserError: if the library is missing, or there is no such model in safetensors.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{place}: transformers is not installed: pip install transformers") from error
    try:
        network: nn.Module = transformers.AutoModel.from_pretrained(place, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"{place} cannot be read as a model of transformers ({str(error)[:200]})") from error
    return network.to(device).eval().requires_grad_(False)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights in a folder; of several files that of their hashes.

    Raises:
        UserError: if they are not there.
    """
    if (folder / WEIGHTS).is_file():
        return digest(folder / WEIGHTS)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if not shards:
        raise UserError(f"no {WEIGHTS} in {folder}")
    return hashlib.sha256("\n".join(map(digest, shards)).encode()).hexdigest()


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of all weights by name, and of what the converters and the network say of their settings."""
    sha256 = hashlib.sha256()
    for part in network.modules():
        settings = getattr(part, "arguments", None)
        if isinstance(settings, dict):
            sha256.update(json.dumps([type(part).__name__, settings], sort_keys=True, default=str).encode())
    for name, tensor in network.state_dict().items():
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


# ---- networks of a user's function


def call_function(function: str, device: torch.device) -> nn.Module:
    """The module that ``file.py:function`` returns, frozen, in evaluation mode; its origin is noted on it.

    What the function draws from PyTorch's global generator is the same each time.

    Raises:
        UserError: if there is no such function, it raises, or returns something else.
    """
    path, _, name = function.partition(":")
    name = name or DEFAULT_FUNCTION
    text = f"{path}:{name}"
    with seeded(0):
        network: nn.Module = call(load_function(text, default=DEFAULT_FUNCTION), text, nn.Module)
    network = network.to(device).eval().requires_grad_(False)
    if not is_of_zoo(network):
        hd_zoo.network_inside(network).origin = Origin(f"{Path(path).resolve()}:{name}", digest(Path(path)))
    return network


def is_of_function(folder: Path) -> bool:
    """Whether the folder's network is a user's function."""
    path = folder / CONFIG
    return path.is_file() and read_json(path).get("format") == FUNCTION_FORMAT


def _read_student_of_function(folder: Path, device: torch.device) -> nn.Module:
    config = read_json(folder / CONFIG)
    function, sha256, at = (config.get(name) for name in ("function", "sha256", "interval_at"))
    if not isinstance(function, str) or not isinstance(at, list) or not isinstance(sha256, str):
        raise UserError(f"{folder / CONFIG} does not name function, sha256 and interval_at; train that stage again")
    path = Path(function.partition(":")[0])
    if not path.is_file():
        raise UserError(f"the network in {folder} is made by {function}, and there is no such file: put it back")
    if digest(path) != sha256:
        print(
            f"{path} has changed since the network in {folder} was trained; its weights are put into what "
            f"{function.rpartition(':')[2]} returns now",
            file=sys.stderr,
        )
    network = call_function(function, device)
    tensors = read_tensors(folder / WEIGHTS)
    try:
        with seeded(0):
            names = [hd_zoo.layer_name(network, name) for name in map(str, at)]
            repeated = bool(getattr(hd_zoo.network_inside(network), "time_embedding_repeated", False))
            student = hd_zoo.add_interval(network, names, repeated=repeated)
        student.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights in {folder} do not fit what {function} returns now: {reason}") from error
    return student.eval()


def _interval_at(student: Any) -> list[str]:
    """The modules at which r enters a student of hd_zoo.add_interval, by their names in the network inside."""
    while not hasattr(student, "at"):
        student = student.network
    return list(student.at)
