"""Noise by seed: a sample is a function of its own seed, whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_noise(shape: Sequence[int], seeds: Sequence[int], *, device: str | torch.device = "cpu") -> Tensor:
    """Standard normal noise (len(seeds), *shape), float32, row i a function of ``seeds[i]`` alone.

    It is drawn on the CPU, so that a seed means the same picture on every device and at every batch size.
    """
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(device)


class NoiseStreams:
    """One stream of numbers per sample: what a stochastic sampler adds after the noise at t = 1.

    A seed's stream begins with its :func:`seeded_noise`; these go on behind it. So no number is used twice, within a
    sample or between samples of different seeds.

    Args:
        noise: (B, ...) the state at t = 1; its shape counts, not its values.
        seeds: one per sample.

    Raises:
        ValueError: for another number of seeds than samples.
    """

    def __init__(self, noise: Tensor, seeds: Sequence[int]) -> None:
        if len(seeds) != len(noise):
            raise ValueError(f"seeds must be one per sample, {len(noise)}; got {len(seeds)}")
        self._shape = noise.shape[1:]
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self._draw()  # the noise at t = 1

    def _draw(self) -> Tensor:
        return torch.stack([torch.randn(self._shape, generator=one) for one in self._generators])

    def next(self, like: Tensor) -> Tensor:
        """The next (B, ...) standard normal numbers, drawn in float32 on the CPU, on ``like``'s device and dtype."""
        return self._draw().to(like)
