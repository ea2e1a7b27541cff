"""What the trainer's tests share: tiny settings and networks, the command called in this process, states compared."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import hd_zoo
from hd_awd import DiscriminatorConfig
from hd_meanflow import LogitNormalTimes
from hd_trainer import Settings, load_recipe
from hd_trainer.cli import main
from hd_trainer.context import Context
from hd_trainer.engine.loop import LoopSettings, Task
from hd_trainer.engine.optimizer import OptimizerSettings
from hd_trainer.evaluation import EvaluationSettings, Row
from hd_trainer.networks import ModelSettings, fresh_network
from hd_trainer.stages import distribution, teacher, trajectory
from hd_trainer.stages.discriminator import DiscriminatorSettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings

#: Arguments of the recipe's short form, shorter still: what every test of a finished run stands on.
SHORT = [
    *("run", "digits", "--smoke", "--precision", "fp32"),
    *("--model.width", "32", "--loop.log-every", "2", "--loop.checkpoint-every", "5"),
    *("--teacher.steps", "12", "--teacher.batch", "16"),
    *("--trajectory.steps", "9", "--trajectory.batch", "16"),
    *("--distribution.steps", "7", "--distribution.batch", "16"),
    *("--evaluation.samples", "60", "--evaluation.teacher-steps", "1", "3", "8"),
]


def with_flags(command: Sequence[str], *flags: object) -> list[object]:
    """The command with other values for the flags that it has, which may be given once; new ones come at the end."""
    found: list[object] = []
    taken = True
    for word in command:
        if word.startswith("--"):
            taken = word not in flags
        if taken:
            found.append(word)
    return [*found, *flags]


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr; more or none fails."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"one line on stderr is wanted; got {self.err!r}"
        assert lines[0].startswith("hdistill: ")
        return lines[0]


def hdistill(*arguments: object) -> Answer:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes: to see that nothing was changed."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tiny_settings() -> Settings:
    """Settings for networks that take milliseconds; every loss and option at work."""
    constant = OptimizerSettings(lr=3e-3, warmup=2, schedule="constant")
    return dataclasses.replace(
        load_recipe("digits", smoke=True),
        seed=3,
        device="cpu",
        precision="fp32",
        model=ModelSettings(width=16, depth=2),
        loop=LoopSettings(log_every=3, checkpoint_every=4),
        teacher=TeacherSettings(steps=7, batch=8, optimizer=OptimizerSettings(lr=3e-3, warmup=2)),
        trajectory=TrajectorySettings(
            steps=7,
            batch=8,
            optimizer=OptimizerSettings(lr=3e-3, warmup=2, weight_decay=0.01),
            times=LogitNormalTimes(interval_share=0.5, endpoint_share=0.5),
        ),
        distribution=DistributionSettings(
            steps=7,
            batch=8,
            student_update_every=3,
            optimizer=OptimizerSettings(lr=3e-3, warmup=1),
            fake_score_optimizer=constant,
            discriminator=DiscriminatorSettings(
                layers=("blocks.0", "blocks.1"),
                network=DiscriminatorConfig(num_queries=2, head_width=8, hidden=8),
                optimizer=constant,
            ),
        ),
        evaluation=EvaluationSettings(samples=20, teacher_steps=(1, 3), timing_repeats=1),
    )


def perturbed_teacher(settings: Settings, context: Context) -> nn.Module:
    """A frozen teacher whose every layer matters: a new one has zeros in it and predicts zero."""
    made = fresh_network(settings.model, context)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made.requires_grad_(False).eval()


def prepare_task(
    stage: str, settings: Settings, context: Context, network: nn.Module, start: nn.Module | None = None, **changes: Any
) -> Task:
    """The stage's real task, its settings changed; stage 2 starts from ``start`` or a fresh student."""
    own = dataclasses.replace(getattr(settings, stage), **changes)
    if stage == "teacher":
        return teacher.prepare(own, context, fresh_network(settings.model, context))
    if stage == "trajectory":
        return trajectory.prepare(own, context, network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = start or hd_zoo.to_student(network)
    return distribution.prepare(own, context, network, start)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states agree to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(act: Callable[[], Any], modules: dict[str, nn.Module]) -> set[str]:
    """Names of the modules whose state ``act()`` changed in any bit."""
    before = {name: snapshot(module) for name, module in modules.items()}
    act()
    return {name for name, module in modules.items() if not same(before[name], snapshot(module))}


def row(name: str = "teacher", **changes: Any) -> Row:
    """A row of the table, every entry of its kind."""
    facts: dict[str, Any] = {
        "steps": 50,
        "calls": 100,
        "samples": 1_437,
        "fd": 7.256,
        "kid": 0.01234,
        "precision": 0.5,
        "recall": 0.25,
        "accuracy": 1.0,
        "nearest": 2.5,
        "deviation": 0.6,
        "images_per_second": 12_345.6,
    }
    return Row(name=name, **{**facts, **changes})


def drawn(number: int, size: tuple[int, int] = (12, 12), seed: int = 0) -> list[Image.Image]:
    """Pictures in colour, no two alike: a disc on a ground, each of random colours and places."""
    random = np.random.default_rng(seed)
    pictures = []
    for _ in range(number):
        ground, colour = (tuple(random.integers(0, 256, 3).tolist()) for _ in range(2))
        picture = Image.new("RGB", size, ground)
        x, y = (random.uniform(0.25, 0.75) * side for side in size)
        radius = min(size) * random.uniform(0.1, 0.25)
        ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        pictures.append(picture)
    return pictures


def save_pictures(folder: Path, pictures: list[Image.Image], suffix: str = ".png") -> list[Path]:
    """Write the pictures as 000.png, 001.png ...; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:03d}{suffix}" for index in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths


#: A U-Net that predicts the noise of a diffusion with a cosine schedule, as somebody writes one in a file.
UNET = """
import torch
from torch import nn

import hd_zoo

WIDTH = 8


class UNet(nn.Module):
    sample_shape, classes, null_label, takes_r = (1, 8, 8), {classes}, {null}, False

    def __init__(self):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.labels = nn.Embedding({classes} + 1, WIDTH)
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.downs = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)])
        self.mid = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(), nn.Dropout({dropout}))
        self.ups = nn.ModuleList([nn.ConvTranspose2d(WIDTH, WIDTH, 4, stride=2, padding=1)])
        self.head = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x, t, labels=None):
        c = self.time_mlp(t[:, None])
        if labels is not None:
            c = c + self.labels(labels)
        h = self.stem(x) + c[:, :, None, None]
        return self.head(h + self.ups[0](self.mid(self.downs[0](h))))


def teacher():
    generator = torch.Generator().manual_seed({seed})
    network = UNet()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return hd_zoo.DiffusedNoise(network, 1000, schedule="squaredcos_cap_v2")
"""

#: Latents of four channels with three classes.
LATENTS = """
import torch

from hd_trainer.data import Dataset, InMemory


def data():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 4, 8, 8, generator=generator), torch.arange(40) % 3
    parts = [InMemory(x=x[part], conditions={"labels": labels[part]}) for part in (slice(0, 30), slice(30, 40))]
    return Dataset(name="latents", train=parts[0], held_out=parts[1], classes=("a", "b", "c"), null={"labels": 3})
"""

#: Our names of weights in a transformer, and the official ones of DiT, SiT, LightningDiT and REPA.
OFFICIAL_NAMES = {
    "patch_embed.": "x_embedder.proj.",
    "time_embed.mlp.": "t_embedder.mlp.",
    "label_embed.": "y_embedder.embedding_table.",
    "head.linear.": "final_layer.linear.",
    "head.norm.": "final_layer.norm_final.",
    "head.modulation.": "final_layer.adaLN_modulation.",
    ".modulation.": ".adaLN_modulation.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2.",
    ".mlp.gate_and_value.": ".mlp.w12.",
    ".mlp.out.": ".mlp.w3.",
}


def write_unet(path: Path, *, classes: int = 10, dropout: float = 0.0, seed: int = 0) -> Path:
    """A file with a network of one's own; its function is ``teacher``."""
    values = {"{classes}": classes, "{null}": classes or None, "{dropout}": dropout, "{seed}": seed}
    text = UNET
    for name, value in values.items():
        text = text.replace(name, str(value))
    path.write_text(text)
    return path


def write_latents(path: Path) -> Path:
    """A file whose function ``data`` returns random latents."""
    path.write_text(LATENTS)
    return path


def save_official(network: nn.Module, path: Path) -> Path:
    """Random weights for a transformer of hd_zoo, in a file as its publishers write one."""
    generator = torch.Generator().manual_seed(2)
    patch, channels = int(network.arguments["patch"]), int(network.arguments["channels"])  # type: ignore[index, union-attr]
    found: dict[str, Tensor] = {}
    for ours, value in network.state_dict().items():
        if ours == "rotary":
            continue
        if ours == "positions":
            found["pos_embed"] = value[None]
            continue
        theirs = (
            "t_embedder.mlp." + ours.removeprefix("time_embed.mlp.") if ours.startswith("time_embed.mlp.") else ours
        )
        for name, official in OFFICIAL_NAMES.items():
            if not theirs.startswith("t_embedder") and (name.startswith(".") or theirs.startswith(name)):
                theirs = theirs.replace(name, official, 1)
        tensor = 0.1 * torch.randn(value.shape, generator=generator)
        if theirs == "x_embedder.proj.weight":  # a convolution there
            tensor = tensor.reshape(len(tensor), patch, patch, channels).permute(0, 3, 1, 2).contiguous()
        found[theirs] = tensor
    torch.save({"ema": found, "model": found}, path)
    return path
