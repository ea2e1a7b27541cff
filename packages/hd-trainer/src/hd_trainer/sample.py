"""Draw images with the weights of a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import hd_zoo
from hd_trainer.device import choose_device
from hd_trainer.errors import UserError, check_seed
from hd_trainer.files import make_folder
from hd_trainer.images import save_grid
from hd_trainer.stages.common import check_guidance, guided


def sample(
    folder: Path,
    out: Path,
    count: int,
    labels: tuple[int, ...] = (),
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float = 1.0,
    device: str = "auto",
) -> None:
    """Write a grid of ``count`` images, ten in a row, to ``out`` (PNG).

    A student is sampled by ``steps`` equal jumps (default 1), a teacher by Euler's method (default 50 steps).

    Raises:
        UserError: for missing weights, an unknown label, impossible numbers or a place that cannot be written.
    """
    if count < 1 or (steps is not None and steps < 1):
        raise UserError(f"count and steps must be >= 1; got {count} and {steps}")
    check_seed(seed)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give --out the name of a picture, e.g. {out / 'samples.png'}")
    check_guidance(guidance_scale, (0.0, 1.0))
    place = choose_device(device)
    try:
        network: Any = hd_zoo.from_pretrained(folder, device=place)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    if len(network.sample_shape) != 3:
        raise UserError(f"the network in {folder} makes no images but vectors {tuple(network.sample_shape)}")
    bad = [label for label in labels if not 0 <= label < network.classes]
    if bad:
        raise UserError(f"labels must lie in 0..{network.classes - 1}; got {', '.join(map(str, bad))}")
    if network.interval is not None and guidance_scale != 1:
        raise UserError("guidance_scale is for teachers: a student has its teacher's guidance in its weights")
    make_folder(out.parent)
    chosen = torch.tensor(labels or range(max(network.classes, 1)))
    wanted = chosen.repeat(-(-count // len(chosen)))[:count].to(place) if network.classes else None
    noise = hd_zoo.seeded_noise(network.sample_shape, range(seed << 20, (seed << 20) + count), device=place)
    if network.interval is None:
        images = hd_zoo.sample_ode(guided(network, guidance_scale, (0.0, 1.0)), noise, steps or 50, labels=wanted)
    else:
        images = hd_zoo.sample_jumps(network, noise, hd_zoo.uniform_times(steps or 1), labels=wanted)
    save_grid(images, out)
    print(f"Wrote {out}: {count} images")
