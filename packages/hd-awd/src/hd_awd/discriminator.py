"""The Adaptive Weighted Discriminator (AWD) and its baseline, global average pooling (GAP), in one class.

Shape letters: B batch, N tokens, C token width, M queries, L tapped layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hd_awd.pooling import attention_pool

POOLINGS = ("attention", "mean")


class PoolingHead(nn.Module):
    """One layer's logit: normalise, pool to M vectors, project, MLP [HD's AWD; the exact head is ours].

        s_nm = q_m . W_k LN(h_n) / sqrt(d)       a_.m = softmax_n(s_.m)
        z_m  = sum_n a_nm W_v LN(h_n)            logit = MLP(z_1 .. z_M)

    Neither projection is ever applied to a token: W_k and LN's affine part are folded into the queries, W_v
    is applied to the pooled vectors. Queries start at zero, where attention is exactly the mean, W_k at
    random, so that the queries' first gradient is not zero. Arguments as in :class:`Discriminator`.
    """

    def __init__(self, width: int, *, pooling: str, queries: int, head_width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.pooling, self.eps = pooling, eps
        self.norm = nn.LayerNorm(width, eps=eps)
        self.value = nn.Linear(width, head_width)
        self.mlp = nn.Sequential(nn.Linear(queries * head_width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.count = queries
        # Drawn for both poolings, so that what they share is the same from the same seed, in later heads too.
        key = nn.Linear(width, head_width, bias=False)
        if pooling == "attention":
            self.key = key
            self.queries = nn.Parameter(torch.zeros(queries, head_width))

    def folded_queries(self) -> Tensor:
        """gamma * (W_k^T q_m) / sqrt(d), shape (M, C), for "attention" alone.

        LN's beta shifts all scores of a query alike, so it cancels in the softmax.
        """
        return (self.queries @ self.key.weight) * self.norm.weight / math.sqrt(self.queries.shape[1])

    def pool(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, N, C) -> (pooled (B, M, C) of LN without affine, weights (B, M, N)).

        Pooled in tokens' dtype, weights and arithmetic in float32 or better.
        """
        if self.pooling == "attention":
            return attention_pool(tokens, self.folded_queries(), eps=self.eps, return_weights=True)
        batch, count, width = tokens.shape
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        mean = F.layer_norm(wide, (width,), eps=self.eps).mean(dim=1, keepdim=True)
        weights = wide.new_full((batch, self.count, count), 1 / count)
        return mean.to(tokens.dtype).expand(-1, self.count, -1), weights

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, C) -> logit (B,)."""
        pooled = self.pool(tokens)[0]
        pooled = pooled * self.norm.weight + self.norm.bias
        return self.mlp(self.value(pooled).flatten(1))[:, 0]


class Discriminator(nn.Module):
    """Features of tapped layers -> one logit per layer; large means real.

    Args:
        widths: token width C of each tapped layer (L of them).
        pooling: "attention" (AWD) or "mean" (GAP). Both have the same parameters but for queries and keys,
            and the same values of the shared ones from the same seed; at initialisation they are the same
            function.
        queries: M, learned queries per layer, >= 1. With "mean" the mean is repeated M times.
        head_width: d, width of keys and values.
        hidden: width of the MLP's hidden layer.
        eps: added to the layer norm's variance, > 0.

    Raises:
        ValueError: for an unknown pooling, sizes < 1 or eps <= 0.
    """

    def __init__(
        self,
        widths: Sequence[int],
        pooling: str = "attention",
        *,
        queries: int = 4,
        head_width: int = 64,
        hidden: int = 128,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
        if not widths or min(*widths, queries, head_width, hidden) < 1:
            raise ValueError(
                f"widths must not be empty and all sizes be >= 1; got widths {list(widths)}, "
                f"queries {queries}, head_width {head_width}, hidden {hidden}"
            )
        if not eps > 0:
            raise ValueError(f"eps must be > 0; got {eps}")
        self.widths, self.pooling = tuple(widths), pooling
        self.heads = nn.ModuleList(
            PoolingHead(width, pooling=pooling, queries=queries, head_width=head_width, hidden=hidden, eps=eps)
            for width in widths
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One (B, N, C_l) tensor per layer -> logits (B, L), differentiable in features and parameters.

        Raises:
            ValueError: if the number of layers or a width differs from ``widths``, or there are no tokens.
        """
        self._check(features)
        return torch.stack([head(tokens) for head, tokens in zip(self.heads, features, strict=True)], dim=1)

    @torch.no_grad()
    def token_weights(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Where each layer looks: one (B, M, N) tensor per layer, rows sum to 1; detached, for pictures."""
        self._check(features)
        heads = (head for head in self.heads if isinstance(head, PoolingHead))
        return [head.pool(tokens)[1] for head, tokens in zip(heads, features, strict=True)]

    def _check(self, features: Sequence[Tensor]) -> None:
        found = [tuple(tokens.shape) for tokens in features]
        if any(len(shape) != 3 or shape[1] < 1 for shape in found) or tuple(shape[2] for shape in found) != self.widths:
            raise ValueError(
                f"features must be {len(self.widths)} tensors (B, N, C) with N >= 1 and widths "
                f"{list(self.widths)}; got {found}"
            )
