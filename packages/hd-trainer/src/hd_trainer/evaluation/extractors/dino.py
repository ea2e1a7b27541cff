"""``dino:ID_OR_FOLDER``: a vision transformer of the library transformers, such as DINOv2; its class token."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hd_trainer.errors import UserError
from hd_trainer.evaluation.extractors.base import IMAGENET, Extractor, as_colour, normalised
from hd_trainer.files import read_json
from hd_trainer.networks import load_vision_model

#: Side of the pictures where the folder does not say: that of DINOv2's published features.
SIDE = 224


def dino_extractor(place: str, device: torch.device) -> Extractor:
    """The class token after the last norm, as FD-DINOv2 takes it (arXiv 2306.04675); no logits.

    Raises:
        UserError: if the library is missing, or there is no such model.
    """
    if not place:
        raise UserError("extractor dino: which model? Name it: dino:FOLDER or dino:OWNER/NAME")
    network: Any = load_vision_model(place, device)
    side, mean, deviation = _preparation(place)
    patch = getattr(network.config, "patch_size", 1)
    if not isinstance(patch, int) or side % patch:
        raise UserError(f"extractor dino: pictures of {side} pixels do not divide into patches of {patch}")

    def run(images: Tensor) -> tuple[Tensor, None]:
        coloured = as_colour(images)
        if coloured.shape[2:] != (side, side):
            coloured = F.interpolate(coloured, (side, side), mode="bicubic", align_corners=False, antialias=True)
        inputs = normalised(coloured.clamp(-1, 1), mean, deviation)
        return network(pixel_values=inputs).last_hidden_state[:, 0], None

    name = Path(place).name.lower()
    return Extractor(
        name=name if "dino" in name else f"dino-{name}",
        width=int(network.config.hidden_size),
        resize=f"{side}x{side}, bicubic with antialiasing; grey repeated",
        sha256=_digest(network),
        run=run,
        device=device,
        batch=50,
    )


def _preparation(place: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """(side, mean, deviation) of the folder's preprocessor_config.json; ImageNet's at 224 where it has none."""
    path = Path(place) / "preprocessor_config.json"
    if not path.is_file():
        return SIDE, *IMAGENET
    found = read_json(path)
    size = found.get("crop_size") or found.get("size") or SIDE
    side = (
        next((size[key] for key in ("height", "shortest_edge") if key in size), SIDE)
        if isinstance(size, dict)
        else size
    )
    mean, deviation = found.get("image_mean", IMAGENET[0]), found.get("image_std", IMAGENET[1])
    if not isinstance(side, int) or not 1 <= side <= 4096 or not len(mean) == len(deviation) == 3:
        raise UserError(f"{path} names no side and statistics of three channels that can be used")
    return side, tuple(mean), tuple(deviation)


def _digest(network: Any) -> str:
    """Over the weights themselves: they may lie in several files."""
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    return found.hexdigest()
