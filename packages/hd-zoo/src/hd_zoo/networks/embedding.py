"""Times, labels and positions as vectors, and the condition that every network of the zoo makes of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hd_zoo.field import check_times, labels_or_null

R_EMBEDDINGS = ("added", "decoupled")


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 10_000.0, *, inclusive: bool = False) -> Tensor:
    """(B,) times -> (B, width) cosines and sines at ``width / 2`` frequencies from 1 down to about 1 / max_period.

    ``inclusive``: the last frequency is 1 / max_period exactly, as in diffusers' DiT, and not one short of it.
    In t's dtype but never below float32: half precision cannot tell neighbouring times apart.
    """
    half = width // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    exponents = torch.arange(half, device=t.device, dtype=t.dtype) / (half - 1 if inclusive else half)
    angles = t[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_embedding(width: int, height: int, columns: int) -> Tensor:
    """Fixed sine-cosine positions of a ``height x columns`` grid, row-major: (height * columns, width).

    Float32. The first half of the channels encodes the column, the second the row, as in DiT.
    """
    omega = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(columns), indexing="ij")
    halves = []
    for positions in (cols, rows):
        angles = positions.reshape(-1, 1).double() * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def rotary_table(width: int, height: int, columns: int) -> Tensor:
    """Cosines and sines of rotary positions (arXiv 2104.09864) on a grid, row-major: (2, height * columns, width).

    Float32, for heads of ``width`` channels, a multiple of 4. Neighbouring channels form a pair that turns by one
    angle; the first half of the pairs turns with the row, the second with the column, as in LightningDiT.
    """
    omega = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(columns), indexing="ij")
    angles = torch.cat([axis.reshape(-1, 1).double() * omega for axis in (rows, cols)], dim=1)
    angles = angles.repeat_interleave(2, dim=1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(h: Tensor, table: Tensor) -> Tensor:
    """Turn pairs of channels of h (..., N, D) by the angles of ``table`` (2, N, D), in the table's precision."""
    cosine, sine = table
    turned = torch.stack([-h[..., 1::2], h[..., 0::2]], dim=-1).flatten(-2)
    return (h * cosine + turned * sine).to(h.dtype)


class TimeEmbedding(nn.Module):
    """Times -> (B, width): sinusoids through a two-layer MLP. ``zero_init``: its output is zero at first."""

    def __init__(
        self, width: int, frequencies: int, scale: float, *, zero_init: bool = False, inclusive: bool = False
    ) -> None:
        super().__init__()
        self.frequencies, self.scale, self.inclusive = frequencies, scale, inclusive
        first, last = nn.Linear(frequencies, width), nn.Linear(width, width)
        nn.init.normal_(first.weight, std=0.02)
        nn.init.normal_(last.weight, std=0.02)
        if zero_init:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, t: Tensor) -> Tensor:
        weight = next(self.mlp.parameters())
        waves = sinusoidal_embedding(self.scale * t, self.frequencies, inclusive=self.inclusive)
        return self.mlp(waves.to(weight.dtype))


class ConditionedField(nn.Module):
    """What the networks of the zoo share: embeddings of t, of the interval, and of a label, summed to a condition."""

    sample_shape: tuple[int, ...]
    classes: int
    r_embedding: str | None
    time_embed: TimeEmbedding
    interval_embed: TimeEmbedding | None
    label_embed: nn.Embedding | None

    def _make_embeddings(
        self,
        width: int,
        classes: int,
        r_embedding: str | None,
        time_scale: float,
        frequencies: int,
        inclusive: bool = False,
    ) -> None:
        self.classes, self.r_embedding = classes, r_embedding
        self.time_embed = TimeEmbedding(width, frequencies, time_scale, inclusive=inclusive)
        added = r_embedding == "added"
        self.interval_embed = TimeEmbedding(width, frequencies, time_scale, zero_init=True) if added else None
        self.label_embed = nn.Embedding(classes + 1, width) if classes else None

    @property
    def takes_r(self) -> bool:
        """Whether r enters: True for a student, False for a teacher, which ignores it."""
        return self.r_embedding is not None

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", or None for an unconditional network."""
        return self.classes if self.classes else None

    def conditions(self, x: Tensor, t: Tensor, r: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, width) for the early and for the late part of the network: one and the same unless decoupled.

        Raises:
            ValueError: if x, t, r or labels do not fit.
        """
        if x.shape[1:] != self.sample_shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.sample_shape))}); got {tuple(x.shape)}")
        check_times(x, t, r)
        seen = [self.time_embed(t)]
        if self.interval_embed is not None:
            seen[0] = seen[0] + self.interval_embed(torch.zeros_like(t) if r is None else t - r)
        if self.r_embedding == "decoupled" and r is not None:
            seen.append(self.time_embed(r))
        if self.label_embed is not None:
            label = self.label_embed(labels_or_null(labels, x, self.classes))
            seen = [one + label for one in seen]
        elif labels is not None:
            raise ValueError("labels were given to an unconditional network (classes = 0)")
        return seen[0], seen[-1]


def check_condition(classes: int, r_embedding: str | None, frequencies: int, time_scale: float) -> None:
    """Raise ValueError for settings that no :class:`ConditionedField` can have."""
    if classes < 0:
        raise ValueError(f"classes must be >= 0; got {classes}")
    if r_embedding not in (None, *R_EMBEDDINGS):
        raise ValueError(f"r_embedding must be None, {' or '.join(map(repr, R_EMBEDDINGS))}; got {r_embedding!r}")
    if frequencies < 2 or frequencies % 2:
        raise ValueError(f"frequencies must be even and >= 2; got {frequencies}")
    if not 0 < time_scale < math.inf:
        raise ValueError(f"time_scale must be > 0 and finite; got {time_scale}")
