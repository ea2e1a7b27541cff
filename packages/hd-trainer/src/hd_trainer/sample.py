"""Draw images with the weights of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hd_trainer.checks import check_number, check_seed, check_whole
from hd_trainer.engine import draws
from hd_trainer.engine.parallel import check_single_process, choose_device
from hd_trainer.errors import UserError
from hd_trainer.evaluation import in_batches
from hd_trainer.files import make_folder, npz_in_progress
from hd_trainer.images import save_grid, to_levels
from hd_trainer.networks import GuidanceSettings, is_student, read_network, sampler
from hd_trainer.progress import progress
from hd_trainer.run_folder import last_stage

MAX_COUNT, MAX_SAMPLING_STEPS = 100_000, 10_000
#: Images that are in memory at a time while an .npz is written.
NPZ_BATCH = 100


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
    """Write a grid of ``count`` images, ten in a row, to ``out`` (PNG); or the images as ADM's .npz, for any number.

    A student is sampled by ``steps`` equal jumps (default 1), a teacher by Euler's method (default 50 steps). Of a
    run's folder the last finished stage is taken.

    Raises:
        UserError: for missing weights, an unknown label, impossible numbers or a place that cannot be written.
    """
    check_single_process()
    check_whole(high=MAX_COUNT, count=count)
    if steps is not None:
        check_whole(high=MAX_SAMPLING_STEPS, steps=steps)
    check_seed(seed)
    check_number(high=1e4, guidance_scale=guidance_scale)
    guidance = GuidanceSettings(scale=guidance_scale)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give --out the name of a picture, e.g. {out / 'samples.png'}")
    place = choose_device(device)
    network: Any = read_network(last_stage(folder), place)
    if len(network.sample_shape) != 3:
        raise UserError(f"the network in {folder} makes no images but vectors {tuple(network.sample_shape)}")
    _check_labels(labels, network.classes)
    student = is_student(network)
    if student and guidance_scale != 1:
        raise UserError("guidance_scale is for teachers: a student has its teacher's guidance in its weights")
    make_folder(out.parent)
    chosen = torch.tensor(labels or range(max(network.classes, 1)))
    wanted = {"labels": chosen.repeat(-(-count // len(chosen)))[:count].to(place)} if network.classes else {}
    null = {"labels": network.null_label} if network.classes else {}
    draw, calls = sampler(network, steps or (1 if student else 50), guidance, null)
    if out.suffix == ".npz":
        _write_npz(out, network.sample_shape, draw, wanted, count, seed, place)
        print(f"Wrote {out}: {count} images")
        return
    noise = draws.picture_noise(network.sample_shape, draws.evaluation_seed(seed), count, place)
    # Long work is done in small parts, so that the bar can tell how long it will take.
    batch = max(10, min(250, 50_000 // calls))
    bar = progress(total=count, desc="sampling", unit="image", disable=count <= batch)
    try:
        images = in_batches(draw, noise, wanted, batch, bar.update)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the network in {folder} is not sampled by labels alone: {' '.join(str(error).split())}"
        ) from error
    finally:
        bar.close()
    if not bool(torch.isfinite(images).all()):
        raise UserError(f"the network in {folder} has diverged: its samples are not finite; train it again")
    save_grid(images, out)
    print(f"Wrote {out}: {count} images")


def _check_labels(labels: tuple[int, ...], classes: int) -> None:
    bad = [label for label in labels if not 0 <= label < classes]
    if bad:
        accepted = f"lie in 0..{classes - 1}" if classes else "not be given: the network has no classes"
        raise UserError(f"labels must {accepted}; got {', '.join(map(str, bad))}")


def _write_npz(
    out: Path,
    shape: tuple[int, ...],
    draw: Callable[[Tensor, dict[str, Tensor]], Tensor],
    cond: dict[str, Tensor],
    count: int,
    seed: int,
    device: torch.device,
) -> None:
    """``arr_0`` (count, H, W, C) uint8 and, of a network with classes, ``arr_1`` (count,) int64; batch by batch."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"an .npz holds pictures of 1 or 3 channels; the network makes {channels} (latents)")

    def parts() -> Iterator[np.ndarray]:
        for first in progress(range(0, count, NPZ_BATCH), desc="sampling", unit="batch", disable=count <= NPZ_BATCH):
            number = min(NPZ_BATCH, count - first)
            noise = draws.picture_noise(shape, draws.evaluation_seed(seed) + first, number, device)
            images = draw(noise, {name: value[first : first + number] for name, value in cond.items()})
            if not bool(torch.isfinite(images).all()):
                raise UserError("the network has diverged: its samples are not finite; train it again")
            yield to_levels(images.float(), 256).permute(0, 2, 3, 1).cpu().numpy()

    with npz_in_progress(out) as add:
        add("arr_0", (count, height, width, channels), "uint8", parts())
        if "labels" in cond:
            add("arr_1", (count,), "int64", [cond["labels"].cpu().numpy()])
