"""hd-trainer with a teacher of your own: a U-Net in a file, trained to predict noise with a cosine schedule.

    python examples/own_teacher.py    # trains it for seconds, then both stages in their short form
    hdistill run digits --smoke --teacher examples/own_teacher.py:teacher --distribution.discriminator.layers

No package knows this network. The function `teacher` returns it behind a converter of hd-zoo, which makes a velocity of
the predicted noise; `--teacher` takes `file.py:function`. Its student gets the time r by an embedding that is added to
what `time_mlp` returns, and the discriminator looks at its levels: `downs`, `mid` and `ups`.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import hd_zoo
from hd_trainer import load_recipe, run
from hd_trainer.data import load_data, read_all
from hd_zoo.wrappers.convert import alphas_cumprod

WEIGHTS = Path("runs/own_teacher.safetensors")
STEPS, WIDTH, CLASSES = 1000, 32, 10


class Block(nn.Module):
    """A convolution that is told the time and the class."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.condition = nn.Linear(WIDTH, out)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return F.silu(self.conv(self.norm(h)) + self.condition(c)[:, :, None, None])


class UNet(nn.Module):
    """Noise of grey 8x8 images at step i of the diffusion, shown as i / 1000."""

    # What a teacher says of itself: the shape of a sample, its classes, the label for "no class", and that it
    # ignores r.
    sample_shape, classes, null_label, takes_r = (1, 8, 8), CLASSES, CLASSES, False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 3, WIDTH // 2))
        self.time_mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label_embed = nn.Embedding(CLASSES + 1, WIDTH)
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.downs = nn.ModuleList([Block(WIDTH, WIDTH), Block(WIDTH, 2 * WIDTH)])
        self.mid = Block(2 * WIDTH, 2 * WIDTH)
        self.ups = nn.ModuleList([Block(4 * WIDTH, WIDTH), Block(2 * WIDTH, WIDTH)])
        self.head = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        waves = t[:, None] * self.frequencies
        c = self.time_mlp(torch.cat([waves.sin(), waves.cos()], dim=1)) + self.label_embed(labels)
        h = self.stem(x)
        skips = []
        for down in self.downs:
            h = down(h, c)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.mid(h, c)
        for up in self.ups:
            h = up(torch.cat([F.interpolate(h, scale_factor=2.0), skips.pop()], dim=1), c)
        return self.head(h)


def teacher() -> nn.Module:
    """What `--teacher examples/own_teacher.py:teacher` calls: the trained network as a velocity field."""
    network = UNet()
    network.load_state_dict(load_file(WEIGHTS))
    return hd_zoo.DiffusedNoise(network, STEPS, schedule="squaredcos_cap_v2")


def train_elsewhere(steps: int = 200) -> None:
    """Somebody's training: DDPM's loss (arXiv 2006.11239) with the cosine schedule of arXiv 2102.09672."""
    network, batch = UNet(), read_all(load_data("digits").train)
    signal = torch.tensor(alphas_cumprod("squaredcos_cap_v2", STEPS))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(steps):
        index, i = torch.randint(len(batch), (64,)), torch.randint(STEPS, (64,))
        x, noise = batch.x[index], torch.randn(64, 1, 8, 8)
        labels = batch.cond["labels"][index].where(torch.rand(64) > 0.1, torch.tensor(CLASSES))
        share = signal[i][:, None, None, None]
        answer = network(share.sqrt() * x + (1 - share).sqrt() * noise, i / STEPS, labels)
        loss = (answer - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: error of the noise {loss.detach():.3f}")
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(network.state_dict(), WEIGHTS)


def main() -> list[dict[str, object]]:
    torch.manual_seed(0)
    train_elsewhere()
    settings = load_recipe("digits", smoke=True)
    # The recipe's layers are those of its own network; without a name evenly spaced blocks are taken.
    discriminator = dataclasses.replace(settings.distribution.discriminator, layers=())
    settings = dataclasses.replace(
        settings,
        teacher_source=f"{__file__}:teacher",
        distribution=dataclasses.replace(settings.distribution, discriminator=discriminator),
    )
    out = Path("runs/own_teacher")
    run(settings, out)
    rows: list[dict[str, object]] = json.loads((out / "evaluation.json").read_text())["rows"]
    return rows


if __name__ == "__main__":
    main()
