"""``classifier``: a small network trained on the training split's classes, once, and kept in the cache folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hd_trainer.data import Dataset, Split
from hd_trainer.data.source import cache_folder
from hd_trainer.engine import draws
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings
from hd_trainer.engine.precision import autocast
from hd_trainer.errors import UserError
from hd_trainer.evaluation.extractors.base import Extractor, resized
from hd_trainer.evaluation.pixels import as_measured, key_of, split_digest
from hd_trainer.files import digest, folder_in_progress, read_json, read_tensors, write_json, write_tensors
from hd_trainer.progress import progress

#: Part of every key: another number when what is below changes what is learned.
CODE = 1
FEATURES, BATCH, SEED = 128, 128, 0
#: Passes over the training split, and the least and greatest number of steps [ours].
EPOCHS, FEWEST, MOST = 3, 300, 1_500
#: Larger pictures are scaled down to this side first.
SIDE = 64
OPTIMIZER = OptimizerSettings(lr=2e-3, weight_decay=0.05, clip=float("inf"))
WEIGHTS, FACTS = "model.safetensors", "classifier.json"


class Classifier(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> 128 features -> logits (B, K). About 0.3 M parameters."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = ((channels, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1))
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in widths
        ]
        self.trunk = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 128, FEATURES))
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 128) and logits (B, K)."""
        features = self.trunk(images)
        return features, self.head(features.relu())


@dataclass(frozen=True)
class Trained:
    """A frozen classifier and what is known of it."""

    network: Classifier
    sha256: str
    facts: dict[str, Any]


def classifier_extractor(data: Dataset, device: torch.device) -> Extractor:
    """The extractor of a data set with classes; trained first if that was not done on this machine.

    Raises:
        UserError: for data without classes.
    """
    found = trained_classifier(data, device)
    network = found.network.to(device)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(shrunk(images))
        return features, logits

    return Extractor(
        name="classifier",
        width=FEATURES,
        resize=f"none up to {SIDE} pixels; larger to {SIDE}x{SIDE}, bilinear with antialiasing",
        sha256=found.sha256,
        run=run,
        knows_classes=True,
        device=device,
        batch=500,
    )


def trained_classifier(data: Dataset, device: torch.device) -> Trained:
    """The classifier of a data set, out of the cache folder if it is there."""
    if not data.classes:
        raise UserError(f"extractor classifier needs classes; the data set {data.name!r} has none")
    shape = tuple(as_measured(data, data.train.read(torch.zeros(1, dtype=torch.long)).x).shape[1:])
    key = key_of("classifier", CODE, split_digest(data, data.train), list(shape), list(data.classes))
    target = cache_folder() / "extractors" / f"classifier-{key}"
    with draws.seeded(SEED):
        network = Classifier(shape[0], len(data.classes))
        unfilled = Classifier(shape[0], len(data.classes))
    if (found := _read(target, unfilled)) is not None:
        return found
    steps = train(network.to(device), data, device)
    network.eval().requires_grad_(False)
    facts = {
        "data": data.name,
        "training_images": len(data.train),
        "steps": steps,
        "held_out_images": len(data.held_out),
        "held_out_accuracy": round(accuracy(network, data, data.held_out, device), 4),
    }
    print(f"classifier of {data.name}: right for {facts['held_out_accuracy']:.1%} of the held-out images")
    with folder_in_progress(target) as temporary:
        write_tensors(temporary / WEIGHTS, network.state_dict())
        write_json(temporary / FACTS, facts)
    kept = _read(target, unfilled)
    if kept is None:
        raise UserError(f"{target} cannot be read back; choose another cache folder with HDISTILL_CACHE")
    return kept


def train(network: Classifier, data: Dataset, device: torch.device) -> int:
    """Cross entropy on the training split, shifted and stretched a little; returns the number of steps."""
    steps = min(MOST, max(FEWEST, EPOCHS * len(data.train) // BATCH))
    optimizer = Optimizer(network, OPTIMIZER, steps)
    network.train()
    for step in progress(range(steps), desc="classifier", unit="step"):
        batch = data.train.read(draws.step_indices(step, BATCH, len(data.train), SEED))
        images = shrunk(as_measured(data, batch.x).to(device))
        generator = draws.step_generator(SEED, "classifier", step)
        with autocast(device, "auto"):
            logits = network(moved(images, generator))[1]
        loss = F.cross_entropy(logits.float(), batch.cond["labels"].to(device), label_smoothing=0.1)
        optimizer.update(loss, step)
    return steps


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted, scaled and sheared a little: features that forgive what eyes do. The border is continued."""
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    theta[:, :, :2] += 0.05 * draws.normal(len(images), (2, 2), generator, torch.device("cpu"))
    theta[:, :, 2] = 0.08 * draws.normal(len(images), (2,), generator, torch.device("cpu"))
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(network: Classifier, data: Dataset, split: Split, device: torch.device) -> float:
    """Share of a split's images that are taken for their class."""
    right = 0
    for index in torch.arange(len(split)).split(500):
        batch = split.read(index)
        logits = network(shrunk(as_measured(data, batch.x).to(device)))[1]
        right += int((logits.argmax(dim=1).cpu() == batch.cond["labels"]).sum())
    return right / len(split)


def shrunk(images: Tensor) -> Tensor:
    """Images no larger than the network is made for."""
    return resized(images, SIDE) if max(images.shape[2:]) > SIDE else images


def _read(target: Path, network: Classifier) -> Trained | None:
    """What was kept there, in ``network``; None if nothing was, or it is damaged."""
    if not (target / FACTS).is_file():
        return None
    try:
        network.load_state_dict(read_tensors(target / WEIGHTS))
        facts = read_json(target / FACTS)
    except (UserError, RuntimeError):
        return None
    return Trained(network.eval().requires_grad_(False), digest(target / WEIGHTS), facts)
