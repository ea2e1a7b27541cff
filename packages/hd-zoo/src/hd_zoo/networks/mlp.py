"""A small residual MLP as a field on vectors: 2-D data, closed-form tests, capacity studies."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hd_zoo.networks.embedding import ConditionedField, check_condition


class MLPField(ConditionedField):
    """A field on vectors: ``model(x, t, r=None, labels=None) -> velocity``, x of shape (B, features).

    Args:
        features: dimension of the data.
        width, depth: hidden width and number of residual layers.
        classes: number of classes; label ``classes`` is the null class. 0 makes the network unconditional.
        r_embedding: None (a teacher: r is ignored), "added" (zero-initialised embedding of t - r: a student) or
            "decoupled" (the first half of the layers sees t, the others r: a student without new weights).
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
        r_embedding: str | None = None,
        time_scale: float = 1.0,
        frequencies: int = 64,
    ) -> None:
        super().__init__()
        if min(features, width, depth) < 1:
            raise ValueError(f"features, width and depth must be >= 1; got {features}, {width} and {depth}")
        check_condition(classes, r_embedding, frequencies, time_scale)
        self.sample_shape = (features,)
        self.input = nn.Linear(features, width)
        self._make_embeddings(width, classes, r_embedding, time_scale, frequencies)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.modulations = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, features)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
        """x (B, features), t and r (B,) in [0, 1], labels (B,) int64; None: the null class."""
        early, late = (F.silu(condition) for condition in self.conditions(x, t, r, labels))
        h = self.input(x)
        for index, (block, modulation) in enumerate(zip(self.blocks, self.modulations, strict=True)):
            h = h + block(F.silu(h + modulation(early if 2 * index < len(self.blocks) else late)))
        return self.head(F.silu(h))
