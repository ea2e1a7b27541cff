"""The settings of a discriminator's network, checked once, so that whoever holds them need not check them again."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Literal, get_args

Pooling = Literal["attention", "scorer", "mean"]
Merge = Literal["logits", "concatenate"]
PoolOver = Literal["features", "logits"]


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """All of a discriminator but the widths of the layers it sees.

    Raises:
        ValueError: for an unknown variant, variants that exclude each other, sizes that are no ints >= 1, or eps <= 0.
    """

    pooling: Pooling = "attention"
    """"attention" is AWD, "scorer" weighs tokens by an MLP, "mean" is global average pooling (GAP)"""
    merge: Merge = "logits"
    """"logits": one logit per layer; "concatenate": all layers' vectors into one MLP, one logit"""
    pool_over: PoolOver = "features"
    """"features": tokens are pooled, then judged; "logits": every token is judged, then the logits are pooled"""
    num_queries: int = 4
    """learned queries per layer"""
    num_heads: int = 1
    """attention heads of a query, a divisor of head_width"""
    head_width: int = 64
    """width of keys and values over all attention heads"""
    hidden: int = 128
    """width of the hidden layer of the MLP that makes a logit"""
    eps: float = 1e-6
    """added to the layer norm's variance, > 0"""

    def __post_init__(self) -> None:
        for name, known in (("pooling", Pooling), ("merge", Merge), ("pool_over", PoolOver)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {getattr(self, name)!r}")
        for name in ("num_queries", "num_heads", "head_width", "hidden"):
            check_size(name, getattr(self, name))
        if self.head_width % self.num_heads:
            raise ValueError(f"num_heads must divide head_width; got {self.num_heads} and {self.head_width}")
        if self.pool_over == "logits" and self.num_heads > 1:
            raise ValueError(
                f'pool_over "logits" goes with num_heads 1 alone: it has no vectors to split; '
                f"got num_heads {self.num_heads}"
            )
        if self.pool_over == "logits" and self.merge == "concatenate":
            raise ValueError(
                'pool_over "logits" goes with merge "logits" alone: it has no vectors to concatenate; '
                "got merge 'concatenate'"
            )
        if not (isinstance(self.eps, (int, float)) and self.eps > 0):
            raise ValueError(f"eps must be a number > 0; got {self.eps!r}")


def check_size(name: str, value: object) -> None:
    """Raises ValueError unless the value is a size."""
    if not is_size(value):
        raise ValueError(f"{name} must be an int >= 1; got {value!r}")


def is_size(value: object) -> bool:
    """Whether it is an int >= 1, of Python or of NumPy; True, 64.0 and "64" are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1
