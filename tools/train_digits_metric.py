"""Train the digits' extractor on the digits' training split and write it into hd-trainer, with its hash and facts.

    hatch run test:python tools/train_digits_metric.py

Takes about a minute on two cores. The committed weights are the result of one run of this script; a run on another
machine gives a network as good, not the same bits, and with it other FD-digits: compare within one set of weights.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from hd_trainer.data import load_digits, read_all
from hd_trainer.engine.draws import step_indices
from hd_trainer.evaluation.extractors.digits import DigitsClassifier

WEIGHTS = Path(__file__).parents[1] / "packages/hd-trainer/src/hd_trainer/weights"
STEPS, BATCH, SEED = 3_000, 128, 0


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by a fraction of a pixel, scale and shear it a little: features that forgive what eyes do."""
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    theta[:, :, :2] += 0.08 * torch.randn(len(images), 2, 2, generator=generator)
    theta[:, :, 2] = 0.1 * torch.randn(len(images), 2, generator=generator)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Outside of the picture lies background, which is -1: shift to 0, sample with zero padding, shift back.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def main() -> None:
    torch.manual_seed(SEED)
    data, network = load_digits(), DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(STEPS):
        batch = data.train.read(step_indices(step, BATCH, len(data.train), SEED))
        logits = network(augment(batch.x, generator))[1]
        loss = F.cross_entropy(logits, batch.cond["labels"], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    network.eval()
    accuracy = {}
    for name, split in (("train", data.train), ("held_out", data.held_out)):
        whole = read_all(split)
        with torch.no_grad():
            right = network(whole.x)[1].argmax(dim=1) == whole.cond["labels"]
        accuracy[name] = right.float().mean().item()
    content = save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    WEIGHTS.mkdir(exist_ok=True)
    (WEIGHTS / "digits_metric.safetensors").write_bytes(content)
    facts = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "accuracy": {split: round(value, 4) for split, value in accuracy.items()},
        "script": "tools/train_digits_metric.py",
        "torch": torch.__version__,
    }
    (WEIGHTS / "digits_metric.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
