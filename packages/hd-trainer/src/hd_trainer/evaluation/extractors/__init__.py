"""Extractors: networks whose features stand for "what a picture looks like", chosen by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hd_trainer.data import Dataset
from hd_trainer.errors import UserError
from hd_trainer.evaluation.extractors import packages
from hd_trainer.evaluation.extractors.base import Extractor, extract, extract_parts
from hd_trainer.evaluation.pixels import as_measured
from hd_trainer.user_code import is_function, load_function

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "check_extractors",
    "default_names",
    "extract",
    "extract_parts",
    "load_extractors",
]

#: What ``--evaluation.extractors`` takes.
EXTRACTORS = {
    "digits": "the network that ships with the package, for the digits alone",
    "classifier": "a small network trained on the data's classes once, and kept",
    "mobilenet": f"MobileNetV2, ImageNet; {packages.HOW['mobilenet']}",
    "efficientnet": f"EfficientNet-lite0, ImageNet; {packages.HOW['efficientnet']}",
    "inception:FILE": "InceptionV3 of FID, weights from your file",
    "dino:ID_OR_FOLDER": "a vision transformer of the library transformers, such as DINOv2",
    "FILE.py:FUNCTION": "your function of pictures (B, C, H, W) in [-1, 1]: features (B, F)",
    "none": "no extractor: the table has distances between pixels alone",
}


def default_names(data: Dataset) -> tuple[str, ...]:
    """Digits have their own; data with classes a classifier; others an ImageNet network that is installed, or none."""
    if data.name == "digits":
        return ("digits",)
    if _channels(data) not in (1, 3):
        return ()
    if data.classes:
        return ("classifier",)
    return next(((name,) for name in ("mobilenet", "efficientnet") if packages.is_installed(name)), ())


def check_extractors(names: tuple[str, ...], data: Dataset) -> None:
    """What can be known before anything is trained: that the names are known, and their files and packages there.

    Raises:
        UserError: as :func:`load_extractors`.
    """
    for name in names if names != ("none",) else ():
        kind, _, place = name.partition(":")
        if is_function(name):
            load_function(name, default="features")
            continue
        _check_name(name, data)
        if kind in ("mobilenet", "efficientnet") and not packages.is_installed(kind):
            raise UserError(f"extractor {kind} needs a package: {packages.HOW[kind]}")
        if kind == "inception" and not Path(place).expanduser().is_file():
            raise UserError(f"extractor inception: no file {place or 'given; name it: inception:FILE'}")
        if kind == "classifier" and not data.classes:
            raise UserError(f"extractor classifier needs classes; the data set {data.name!r} has none")


def load_extractors(names: tuple[str, ...], data: Dataset, device: torch.device) -> list[Extractor]:
    """The extractors by their names; () chooses by the data, see :func:`default_names`.

    Raises:
        UserError: for an unknown name, one given twice, a package or file that is missing, or data it cannot see.
    """
    if names == ("none",):
        return []
    found = [_load(name, data, device) for name in names or default_names(data)]
    own = [one.name for one in found]
    if len(set(own)) < len(own):
        raise UserError(f"extractors must have different names; got {', '.join(own)}")
    return found


def _load(name: str, data: Dataset, device: torch.device) -> Extractor:
    if is_function(name):
        return _from_function(name, data, device)
    _check_name(name, data)
    kind, _, place = name.partition(":")
    if kind == "digits":
        from hd_trainer.evaluation.extractors.digits import digits_extractor

        return digits_extractor(device)
    if kind == "classifier":
        from hd_trainer.evaluation.extractors.classifier import classifier_extractor

        return classifier_extractor(data, device)
    if kind == "inception":
        from hd_trainer.evaluation.extractors.inception import inception_extractor

        return inception_extractor(place, device)
    if kind == "dino":
        from hd_trainer.evaluation.extractors.dino import dino_extractor

        return dino_extractor(place, device)
    make = packages.mobilenet_extractor if kind == "mobilenet" else packages.efficientnet_extractor
    return make(device, tuple(_example(data, 1).shape[1:]))


def _check_name(name: str, data: Dataset) -> None:
    kind, _, place = name.partition(":")
    known = {one.partition(":")[0] for one in EXTRACTORS} - {"FILE.py", "none"}
    if kind not in known or (place and kind not in ("inception", "dino")):
        raise UserError(f"unknown extractor {name!r}; known: {', '.join(EXTRACTORS)}")
    if _channels(data) not in (1, 3):
        raise UserError(
            f"extractor {name} needs pictures; the data set {data.name!r} has {_channels(data)} channels and no decode"
        )
    if kind == "digits" and data.shape != (1, 8, 8):
        raise UserError(f"extractor digits is for grey images of 8x8; the data set {data.name!r} has {data.shape}")


def _from_function(name: str, data: Dataset, device: torch.device) -> Extractor:
    """A user's function, tried on a few pictures: its width, and whether a picture's features are its own."""
    function = load_function(name, default="features")
    images = _example(data, 4).to(device)

    def run(pictures: Tensor) -> tuple[Tensor, None]:
        try:
            found: Any = function(pictures)
        except (Exception, SystemExit) as error:
            raise UserError(f"extractor {name} raised {type(error).__name__}: {error}") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(pictures):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"extractor {name} must give features ({len(pictures)}, F); got {got}")
        return found, None

    with torch.no_grad():
        together, alone = run(images)[0], run(images[:1])[0]
    if not torch.allclose(together[:1].double(), alone.double(), rtol=1e-2, atol=1e-3):
        raise UserError(
            f"extractor {name}: a picture's features depend on the others in its batch; is the network in .eval()?"
        )
    path = Path(name.partition(":")[0])
    reserved = {"fid", *(one.partition(":")[0] for one in EXTRACTORS)}
    return Extractor(
        name=f"own-{path.stem}" if path.stem.lower() in reserved else path.stem,
        width=together.shape[1],
        resize="by the function",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        run=run,
        keeps=False,  # the file may load weights that its hash does not know
        device=device,
    )


def _example(data: Dataset, count: int) -> Tensor:
    """The first training samples as they are measured."""
    return as_measured(data, data.reference.read(torch.arange(min(count, len(data.reference)))).x)


def _channels(data: Dataset) -> int:
    return data.shape[0] if data.decode is None else int(_example(data, 1).shape[1])
