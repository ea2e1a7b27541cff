"""The extractor of the digits: a small classifier that ships with the package (tools/train_digits_metric.py)."""

from __future__ import annotations

import hashlib
import json
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn

from hd_trainer.evaluation.extractors.base import Extractor

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


def load_digits_classifier() -> DigitsClassifier:
    """The shipped network, frozen, in evaluation mode.

    Raises:
        RuntimeError: if the weights in the package are not the ones whose hash was committed with them.
    """
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


def digits_extractor(device: torch.device) -> Extractor:
    """The shipped network as an extractor; see :func:`load_digits_classifier`."""
    facts = json.loads((resources.files("hd_trainer") / "weights/digits_metric.json").read_text(encoding="utf-8"))
    return Extractor(
        name="digits",
        width=FEATURES,
        resize="none: 8x8",
        sha256=facts["sha256"],
        run=load_digits_classifier().to(device),
        knows_classes=True,
        keeps=False,  # quicker than their hash
        device=device,
        batch=500,
    )
