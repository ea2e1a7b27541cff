"""The Adaptive Weighted Discriminator (AWD) and its baseline, global average pooling (GAP), in one class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hd_awd.config import DiscriminatorConfig, Merge, Pooling, PoolOver, is_size
from hd_awd.heads import PoolingHead, make_mlp

RENAMED = {"heads": "layer_heads"}  # modules of weights that were saved before: then, now


class Discriminator(nn.Module):
    """Features of L tapped layers -> one logit per layer; large means real.

    Every pooling starts as the same function: zero queries, or a scorer whose last layer is zero, are the mean.
    What the poolings share has the same values from the same seed.

    Args:
        widths: token width C of each tapped layer, a sequence of L ints.
        pooling: "attention" (AWD), "scorer" (an MLP scores each token) or "mean" (GAP; the mean is repeated M times).
        merge: "logits" gives one logit per layer; "concatenate" puts all layers' vectors into one MLP and gives one.
        pool_over: "features" pools tokens and makes a logit of the result; "logits" pools a logit of every token.
        num_queries: M, learned queries per layer, >= 1.
        num_heads: H, attention heads of a query, a divisor of ``head_width``.
        head_width: d, width of keys and values over all attention heads.
        hidden: width of the MLPs' hidden layer.
        eps: added to the layer norm's variance, > 0.

    Weights saved before ``heads`` became ``layer_heads`` are still loaded.

    Raises:
        ValueError: for an unknown variant, variants that exclude each other, sizes that are no ints >= 1, or eps <= 0.
    """

    def __init__(
        self,
        widths: Sequence[int],
        pooling: Pooling = "attention",
        *,
        merge: Merge = "logits",
        pool_over: PoolOver = "features",
        num_queries: int = 4,
        num_heads: int = 1,
        head_width: int = 64,
        hidden: int = 128,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.widths = checked_widths(widths)
        self.config = DiscriminatorConfig(
            pooling=pooling,
            merge=merge,
            pool_over=pool_over,
            num_queries=num_queries,
            num_heads=num_heads,
            head_width=head_width,
            hidden=hidden,
            eps=eps,
        )
        self.pooling, self.merge = pooling, merge
        self.layer_heads = nn.ModuleList(
            PoolingHead(
                width,
                pooling=pooling,
                pool_over=pool_over,
                num_queries=num_queries,
                num_heads=num_heads,
                head_width=head_width,
                hidden=hidden,
                logit=merge == "logits",
                eps=eps,
            )
            for width in self.widths
        )
        if merge == "concatenate":
            self.mlp = make_mlp(len(self.widths) * num_queries * head_width, hidden, 1)
        self.register_load_state_dict_pre_hook(rename_old_weights)

    @classmethod
    def from_config(cls, widths: Sequence[int], config: DiscriminatorConfig) -> Discriminator:
        """The discriminator with these settings in front of layers of these widths."""
        return cls(widths, **vars(config))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One (B, N, C_l) tensor per layer -> logits (B, L), or (B, 1) if layers are concatenated.

        Differentiable in features and parameters.

        Raises:
            ValueError: if the number of layers or a width differs from ``widths``, or there are no tokens.
        """
        self._check(features)
        pairs = list(zip(self._heads_by_layer(), features, strict=True))
        if self.merge == "logits":
            return torch.stack([head(tokens) for head, tokens in pairs], dim=1)
        logit: Tensor = self.mlp(torch.cat([head.vectors(tokens) for head, tokens in pairs], dim=1))
        return logit

    @torch.no_grad()
    def token_weights(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Where each layer looks: (B, M H, N) per layer, rows sum to 1; detached, for pictures."""
        self._check(features)
        return [head.pool(tokens)[1] for head, tokens in zip(self._heads_by_layer(), features, strict=True)]

    def _heads_by_layer(self) -> list[PoolingHead]:
        return [head for head in self.layer_heads if isinstance(head, PoolingHead)]

    def _check(self, features: Sequence[Tensor]) -> None:
        layers = [features] if isinstance(features, Tensor) else list(features)
        found = [tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__ for tokens in layers]
        shapes = [tuple(tokens.shape) for tokens in layers if isinstance(tokens, Tensor) and tokens.ndim == 3]
        fits = len(shapes) == len(found) and tuple(shape[2] for shape in shapes) == self.widths
        if isinstance(features, Tensor) or not fits or any(shape[1] < 1 for shape in shapes):
            raise ValueError(
                f"features must be a list of {len(self.widths)} tensors (B, N, C) with N >= 1 and widths "
                f"{list(self.widths)}; got {'the tensor ' if isinstance(features, Tensor) else ''}{found}"
            )


def checked_widths(widths: Any) -> tuple[int, ...]:
    """The widths as a tuple; anything but ints >= 1, at least one, is refused.

    Raises:
        ValueError: says what is accepted and what was given.
    """
    accepted = "widths must be a sequence of ints >= 1, one for each layer, such as [64]"
    if isinstance(widths, (str, Mapping)) or not isinstance(widths, Iterable):
        raise ValueError(f"{accepted}; got {widths!r}")
    found = tuple(widths)
    if not found or not all(is_size(width) for width in found):
        raise ValueError(f"{accepted}; got {list(found)!r}")
    return tuple(int(width) for width in found)


def rename_old_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded: names from before they were changed become today's, by RENAMED."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        first, dot, rest = name[len(prefix) :].partition(".")
        if first in RENAMED:
            state_dict[f"{prefix}{RENAMED[first]}{dot}{rest}"] = state_dict.pop(name)
