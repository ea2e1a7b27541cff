"""The one place where random numbers begin: each is a function of (seed, stage, step) or of a picture's own seed.

A run that is stopped and resumed therefore draws what it would have drawn, and stores no generator. The losses of the
leaves draw from the generator that a step hands to them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import hd_zoo


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The random numbers of one step of a stage, on the CPU whatever the device, so that a seed means one thing."""
    text = f"{stage}/{seed}/{step}".encode()
    # FNV-1a, 64 bit: Python's own hash of text differs from process to process.
    value = 0xCBF29CE484222325
    for byte in text:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return torch.Generator().manual_seed(value)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, what draws from the global generator is a function of the seed; afterwards it stands where it stood."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def normal(size: int, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal (size, *shape), float32, drawn where the generator is, then moved to the device."""
    return torch.randn(size, *shape, generator=generator).to(device)


def coins(size: int, share: float, generator: torch.Generator) -> Tensor:
    """Boolean (size,): each True with probability ``share``."""
    return torch.rand(size, generator=generator) < share


def step_indices(step: int, batch: int, count: int, seed: int) -> Tensor:
    """Indices (batch,) int64 of training step ``step``: a fresh shuffle of all ``count`` samples every epoch.

    A function of its arguments alone, so that a resumed run sees the very batches it would have seen.
    """
    parts, position = [], step * batch
    while batch > 0:
        epoch, offset = divmod(position, count)
        parts.append(_order(seed, epoch, count)[offset : offset + batch])
        position += len(parts[-1])
        batch -= len(parts[-1])
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    """The shuffle of an epoch; kept, because the next step wants it again."""
    return shuffled(count, seed * 1_000_003 + epoch)


def shuffled(count: int, seed: int) -> Tensor:
    """The numbers 0 .. count - 1 in an order that is a function of the seed, int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def picture_noise(shape: Sequence[int], first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal (count, *shape), float32: picture i is a function of its own seed, ``first + i``."""
    return hd_zoo.seeded_noise(tuple(shape), range(first, first + count), device=device)


def any_of(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of the numbers 0 .. size - 1, with replacement, int64."""
    return torch.randint(size, (count,), generator=generator)


def evaluation_seed(seed: int, sampling_seed: int = 0, count: int = 0) -> int:
    """The first picture's seed of a run: 2^20 apart, so that no two runs share an image's noise.

    Sampling seeds follow one another, ``count`` pictures each: PyTorch's generator knows the low 32 bits of a seed
    alone, so there is no room far away.
    """
    return (seed << 20) + sampling_seed * count
