"""A small residual MLP as a field on vectors: 2-D data, closed-form tests, capacity studies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hd_zoo.field import check_times, labels_or_null
from hd_zoo.transformer import TimeEmbedding, check_embedding


class MLPField(nn.Module):
    """A field on vectors: ``model(x, t, r=None, labels=None) -> velocity``, x of shape (B, features).

    Args:
        features: dimension of the data.
        width, depth: hidden width and number of residual layers.
        classes: number of classes; label ``classes`` is the null class. 0 makes the network unconditional.
        interval: None (a teacher: r is ignored) or "added" (zero-initialised embedding of t - r: a student).
        time_scale: factor on t and (t - r) before the sinusoids; it multiplies du/dt.
        frequencies: number of sinusoids in the time embeddings.

    Raises:
        ValueError: for impossible sizes, or inputs whose shapes or labels do not fit.
    """

    def __init__(
        self,
        *,
        features: int = 2,
        width: int = 128,
        depth: int = 3,
        classes: int = 0,
        interval: str | None = None,
        time_scale: float = 1.0,
        frequencies: int = 64,
    ) -> None:
        super().__init__()
        if min(features, width, depth) < 1 or classes < 0:
            raise ValueError(
                f"features, width and depth must be >= 1, classes >= 0; got {features}, {width}, {depth} and {classes}"
            )
        if interval not in (None, "added"):
            raise ValueError(f'interval must be None or "added"; got {interval!r}')
        check_embedding(frequencies, time_scale)
        self.features, self.classes, self.interval = features, classes, interval
        self.input = nn.Linear(features, width)
        self.time_embed = TimeEmbedding(width, frequencies, time_scale)
        self.interval_embed = (
            TimeEmbedding(width, frequencies, time_scale, zero_init=True) if interval == "added" else None
        )
        self.label_embed = nn.Embedding(classes + 1, width) if classes else None
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.modulations = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, features)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def sample_shape(self) -> tuple[int]:
        """Shape of one sample, (features,)."""
        return (self.features,)

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", or None for an unconditional network."""
        return self.classes if self.classes else None

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
        """x (B, features), t and r (B,) in [0, 1], labels (B,) int64; None: the null class."""
        if x.ndim != 2 or x.shape[1] != self.features:
            raise ValueError(f"x must have shape (B, {self.features}); got {tuple(x.shape)}")
        check_times(x, t, r)
        condition = self.time_embed(t)
        if self.interval_embed is not None:
            condition = condition + self.interval_embed(torch.zeros_like(t) if r is None else t - r)
        if self.label_embed is not None:
            condition = condition + self.label_embed(labels_or_null(labels, x, self.classes))
        elif labels is not None:
            raise ValueError("labels were given to an unconditional network (classes = 0)")
        condition = F.silu(condition)
        h = self.input(x)
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            h = h + block(F.silu(h + modulation(condition)))
        return self.head(F.silu(h))
