"""hd-trainer with a teacher from elsewhere, one that predicts noise in place of a velocity.

    python examples/own_teacher.py

A converter of hd-zoo makes a velocity of the prediction, once, at the door; `save_pretrained` writes both as a
folder. The stages take that folder as their teacher; `hdistill run digits --teacher-weights FOLDER` does the same. For
published weights see `load_published`.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import hd_zoo
from hd_trainer import load_recipe, run
from hd_trainer.data import load_data, read_all


def train_elsewhere(network: nn.Module, steps: int = 60) -> None:
    """Somebody's training: the network learns the noise in (1 - t) x + t noise."""
    batch = read_all(load_data("digits").train)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(steps):
        index = torch.randint(len(batch), (64,))
        x, labels, t = batch.x[index], batch.cond["labels"][index], torch.rand(64)
        noise = torch.randn_like(x)
        x_t = torch.lerp(x, noise, t[:, None, None, None])
        loss = (network(x_t, t, labels=labels) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: error of the noise {loss.detach():.3f}")


def main() -> list[dict[str, object]]:
    torch.manual_seed(0)
    network = hd_zoo.create_model("dit_nano_2", classes=10)
    train_elsewhere(network)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hd_zoo.save_pretrained(hd_zoo.NoisePrediction(network), folder / "teacher")
        settings = load_recipe("digits", smoke=True)
        run(settings, folder / "run", teacher_weights=folder / "teacher")
        rows: list[dict[str, object]] = json.loads((folder / "run/evaluation.json").read_text())["rows"]
        return rows


if __name__ == "__main__":
    main()
