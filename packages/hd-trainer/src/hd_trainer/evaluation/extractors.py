"""Extractors: networks whose features stand for "what an image looks like". One ships with the package, for digits."""

from __future__ import annotations

import hashlib
import json
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn

from hd_trainer.data import Dataset

FEATURES = 64


class DigitsClassifier(nn.Module):
    """8x8 grey images in [-1, 1] -> 64 features -> 10 logits. 74 k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, FEATURES),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 1, 8, 8) -> features (B, 64) and logits (B, 10)."""
        features = self.trunk(images)
        return features, self.head(features.relu())


def extractor_for(data: Dataset) -> nn.Module | None:
    """The extractor of a data set, frozen; None where there is none, so that no distance can be measured.

    Raises:
        RuntimeError: if the weights in the package are not the ones whose hash was committed with them.
    """
    return load_digits_classifier() if data.name == "digits" else None


def load_digits_classifier() -> DigitsClassifier:
    """The shipped network, frozen, in evaluation mode; see :func:`extractor_for`."""
    folder = resources.files("hd_trainer") / "weights"
    content = (folder / "digits_metric.safetensors").read_bytes()
    expected = json.loads((folder / "digits_metric.json").read_text(encoding="utf-8"))["sha256"]
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise RuntimeError(
            f"the metric network's weights are damaged (sha256 {found[:12]}..., expected {expected[:12]}...): "
            "reinstall hd-trainer"
        )
    network = DigitsClassifier()
    network.load_state_dict(load(content))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def extract(network: nn.Module, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Features (N, F) and logits (N, classes) of images (N, C, H, W), batch by batch."""
    parts = [network(chunk) for chunk in images.split(batch)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
