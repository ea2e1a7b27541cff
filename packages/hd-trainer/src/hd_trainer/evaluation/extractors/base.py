"""What an extractor is: a frozen function from pictures to feature vectors, with a name and a hash."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Means and deviations of ImageNet's channels in [0, 1], with which the usual networks were trained.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network whose features stand for "what a picture looks like". Everything in it is frozen."""

    name: str
    """stands after "FD-" in tables"""
    width: int
    """of a feature vector"""
    resize: str
    """what becomes of a picture before the network sees it, in words"""
    sha256: str
    """of the file of the weights"""
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """pictures (B, C, H, W) float32 in [-1, 1], rounded to storable levels -> features (B, F), logits (B, K) or None"""
    knows_classes: bool = False
    """whether the logits are of the data's own classes, so that accuracy means something"""
    keeps: bool = True
    """whether features of the reference are kept in the cache folder"""
    device: torch.device
    batch: int = 100
    """pictures a call"""

    def facts(self) -> dict[str, Any]:
        """What a result records of it."""
        return {"name": self.name, "width": self.width, "resize": self.resize, "sha256": self.sha256}


def extract(extractor: Extractor, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features (N, F) and logits (N, K), or None, of images (N, C, H, W) in [-1, 1]; see :func:`extract_parts`."""
    return extract_parts(extractor, [images])


@torch.no_grad()
def extract_parts(extractor: Extractor, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Features (N, F) and logits (N, K), or None, on the CPU, of images in [-1, 1] that come in parts (B, C, H, W).

    Raises:
        ValueError: if the extractor returns another shape, or values that are not finite.
    """
    features, logits = [], []
    for images in parts:
        for some in images.split(extractor.batch):
            found, scores = extractor.run(some.to(extractor.device))
            if tuple(found.shape) != (len(some), extractor.width):
                raise ValueError(
                    f"extractor {extractor.name} must give ({len(some)}, {extractor.width}); got {tuple(found.shape)}"
                )
            features.append(found.float().cpu())
            if scores is not None:
                logits.append(scores.float().cpu())
    whole = torch.cat(features)
    if not bool(torch.isfinite(whole).all()):
        raise ValueError(f"extractor {extractor.name} gives features that are not finite")
    return whole, torch.cat(logits) if logits else None


def as_colour(images: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) -> (B, 3, H, W): grey is repeated."""
    return images.expand(-1, 3, -1, -1)


def resized(images: Tensor, side: int) -> Tensor:
    """To side x side: bilinear, with antialiasing where pictures shrink; the aspect ratio is not kept."""
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)


def side_for(shape: tuple[int, ...]) -> int:
    """The side at which an ImageNet network sees pictures (C, H, W): 64, 128 or 224, the next that is no smaller."""
    return next((side for side in (64, 128) if max(shape[1:]) <= side), 224)


def normalised(images: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Images in [-1, 1] with the statistics that a network was trained with, which are of [0, 1]."""
    shape = (1, len(mean), 1, 1)
    return ((images + 1) / 2 - images.new_tensor(mean).view(shape)) / images.new_tensor(deviation).view(shape)
