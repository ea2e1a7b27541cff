"""The page's pictures as tensors: samples from one noise, the way between two noises, the nearest training samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hd_trainer.context import Context
from hd_trainer.data import Batch, Split, grid_conditions
from hd_trainer.engine import draws
from hd_trainer.evaluation import nearest_training
from hd_trainer.networks import GuidanceSettings, sampler

ROWS_OF_SAMPLES = 8
#: The seeds of the page's pictures are none of the measured ones.
FIRST_SEED = 10**9
#: Of the ends of the rows between two noises.
SEED_BETWEEN = FIRST_SEED + 1_000


def columns(context: Context) -> int:
    """Of a grid: one for each class, at most ten."""
    return min(10, len(context.data.classes) or 10)


def samples(context: Context, network: nn.Module, steps: int, guidance: GuidanceSettings) -> Tensor:
    """A grid's samples, from a noise and conditions that are the same for every network and every run."""
    noise, cond = context.grid_inputs(ROWS_OF_SAMPLES, FIRST_SEED)
    draw, _ = sampler(network, steps, guidance, context.data.null)
    return draw(noise, cond)


def between(context: Context, student: nn.Module, rows: int = 5, columns: int = 9) -> Tensor:
    """(rows * columns, ...) one-step samples: each row goes from one noise to another, its conditions stay.

    The rows' conditions are evenly chosen classes; without classes those of held-out samples.
    """
    cond = grid_conditions(context.data, 1)
    number = len(next(iter(cond.values()))) if cond else rows
    rows = min(rows, number)
    chosen = torch.tensor([index * number // rows for index in range(rows)]).repeat_interleave(columns)
    ends = draws.picture_noise(context.data.shape, SEED_BETWEEN, 2 * rows)
    shares = torch.linspace(0, 1, columns, dtype=torch.float64)
    noise = torch.cat([spherical(ends[2 * row], ends[2 * row + 1], shares) for row in range(rows)])
    draw, _ = sampler(student, 1, GuidanceSettings(), context.data.null)
    return draw(noise.to(context.device), {name: value[chosen].to(context.device) for name, value in cond.items()})


def spherical(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """Points of the arc from a (share 0) to b (share 1), (len(shares), *a.shape), in a's dtype.

        (sin((1 - s) w) a + sin(s w) b) / sin w        w = angle between a and b

    Between two Gaussian noises of many dimensions all of them are as long as noise is (Shoemake 1985).
    """
    first, last = a.double().flatten(), b.double().flatten()
    cosine = (first @ last / (first.norm() * last.norm())).clamp(-1, 1)
    angle = torch.arccos(cosine)
    shares = shares.double()[:, None]
    if angle.sin() < 1e-6:  # one direction: the arc is a straight line
        path = (1 - shares) * first + shares * last
    else:
        path = (torch.sin((1 - shares) * angle) * first + torch.sin(shares * angle) * last) / angle.sin()
    return path.reshape(-1, *a.shape).to(a.dtype)


def nearest(samples: Tensor, split: Split) -> Tensor:
    """The training samples nearest to ``samples`` (N, C, H, W), as the table's column looks for them."""
    _, index = nearest_training(samples.cpu().float(), split)
    return split.read(index).x


def held_out(context: Context) -> Batch:
    """A held-out sample for each column of a grid, on the device."""
    split = context.data.held_out
    if not context.data.classes:
        return split.read(torch.arange(min(10, len(split)))).to(context.device)
    labels = split.cond(torch.arange(len(split)))["labels"]
    wanted = grid_conditions(context.data, 1)["labels"]
    first = [(labels == label).nonzero() for label in wanted]
    # A class without a held-out sample shows the first of all.
    return split.read(torch.tensor([int(one[0, 0]) if len(one) else 0 for one in first])).to(context.device)
