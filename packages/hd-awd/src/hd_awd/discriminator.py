"""The Adaptive Weighted Discriminator (AWD) and its baseline, global average pooling (GAP), in one class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hd_awd.heads import POOLINGS, WEIGHED, PoolingHead, make_mlp

MERGES = ("logits", "concatenate")


class Discriminator(nn.Module):
    """Features of L tapped layers -> one logit per layer; large means real.

    Every pooling starts as the same function: zero queries, or a scorer whose last layer is zero, are the mean.
    What the poolings share has the same values from the same seed.

    Args:
        widths: token width C of each tapped layer (L of them).
        pooling: "attention" (AWD), "scorer" (an MLP scores each token) or "mean" (GAP; the mean is repeated M times).
        merge: "logits" gives one logit per layer; "concatenate" puts all layers' vectors into one MLP and gives one.
        weighed: "vectors" pools tokens and makes a logit of the result; "logits" pools a logit of every single token.
        queries: M, learned queries per layer, >= 1.
        heads: attention heads, a divisor of ``head_width``.
        head_width: d, width of keys and values over all heads.
        hidden: width of the MLPs' hidden layer.
        eps: added to the layer norm's variance, > 0.

    Raises:
        ValueError: for an unknown variant, variants that exclude each other, sizes < 1 or eps <= 0.
    """

    def __init__(
        self,
        widths: Sequence[int],
        pooling: str = "attention",
        *,
        merge: str = "logits",
        weighed: str = "vectors",
        queries: int = 4,
        heads: int = 1,
        head_width: int = 64,
        hidden: int = 128,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("pooling", pooling, POOLINGS),
            ("merge", merge, MERGES),
            ("weighed", weighed, WEIGHED),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        if not widths or min(*widths, queries, heads, head_width, hidden) < 1:
            raise ValueError(
                f"widths must not be empty and all sizes be >= 1; got widths {list(widths)}, queries {queries}, "
                f"heads {heads}, head_width {head_width}, hidden {hidden}"
            )
        if head_width % heads:
            raise ValueError(f"heads must divide head_width; got {heads} and {head_width}")
        if weighed == "logits" and (merge == "concatenate" or heads > 1):
            raise ValueError(
                f'weighed "logits" makes a logit of every token: there are no vectors to concatenate and none to split '
                f"into heads; got merge {merge!r}, heads {heads}"
            )
        if not eps > 0:
            raise ValueError(f"eps must be > 0; got {eps}")
        self.widths, self.pooling, self.merge = tuple(widths), pooling, merge
        self.heads = nn.ModuleList(
            PoolingHead(
                width,
                pooling=pooling,
                weighed=weighed,
                queries=queries,
                heads=heads,
                head_width=head_width,
                hidden=hidden,
                logit=merge == "logits",
                eps=eps,
            )
            for width in widths
        )
        if merge == "concatenate":
            self.mlp = make_mlp(len(widths) * queries * head_width, hidden, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One (B, N, C_l) tensor per layer -> logits (B, L), or (B, 1) if layers are concatenated.

        Differentiable in features and parameters.

        Raises:
            ValueError: if the number of layers or a width differs from ``widths``, or there are no tokens.
        """
        self._check(features)
        pairs = list(zip(self._heads(), features, strict=True))
        if self.merge == "logits":
            return torch.stack([head(tokens) for head, tokens in pairs], dim=1)
        logit: Tensor = self.mlp(torch.cat([head.vectors(tokens) for head, tokens in pairs], dim=1))
        return logit

    @torch.no_grad()
    def token_weights(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Where each layer looks: (B, queries * heads, N) per layer, rows sum to 1; detached, for pictures."""
        self._check(features)
        return [head.pool(tokens)[1] for head, tokens in zip(self._heads(), features, strict=True)]

    def _heads(self) -> list[PoolingHead]:
        return [head for head in self.heads if isinstance(head, PoolingHead)]

    def _check(self, features: Sequence[Tensor]) -> None:
        found = [tuple(tokens.shape) for tokens in features]
        if any(len(shape) != 3 or shape[1] < 1 for shape in found) or tuple(shape[2] for shape in found) != self.widths:
            raise ValueError(
                f"features must be {len(self.widths)} tensors (B, N, C) with N >= 1 and widths "
                f"{list(self.widths)}; got {found}"
            )
