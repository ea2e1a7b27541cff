"""What every path of the pooling takes and gives, stated once.

A path is a module with two functions, the type :class:`Path`: ``blocks`` in PyTorch, ``kernels.launch`` in Triton. The
operators in ``autograd`` take the same arguments one by one, in this order; their schemas are made from here.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PoolInputs:
    """The arguments of :func:`hd_awd.attention_pool` that are computed with.

    Attributes:
        tokens: h (B, N, C); float32, bfloat16, float16 or float64.
        queries: q (M, C), of any floating dtype.
        bias: (B, M, N), added to the scores, or None; -inf takes a token out.
        mask: (B, N) bool, True for tokens that take part, or None for all.
        eps: added to the variance, > 0.
    """

    tokens: Tensor
    queries: Tensor
    bias: Tensor | None
    mask: Tensor | None
    eps: float

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, N, C, M."""
        batch, num_tokens, width = self.tokens.shape
        return batch, num_tokens, width, len(self.queries)

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic, and of all results but the tokens' gradient: float32 or better."""
        return torch.promote_types(self.tokens.dtype, torch.float32)


@dataclasses.dataclass(frozen=True)
class Incoming:
    """What a backward pass is given beside the inputs, in the arithmetic's dtype.

    Attributes:
        grad_pooled: dz (B, M, C), the loss's gradient in the pooled tokens.
        grad_weights: da (B, M, N), its gradient in the weights, or None.
        lse: (B, M), from the forward pass.
        delta: (B, M), sum_n a_mn (dz_m . x_n + da_mn) with x = LN(h), which follows from the forward pass.
        want_tokens: whether the tokens' gradient is wanted.
        want_bias: whether the scores' gradient is wanted, which is the bias's.
    """

    grad_pooled: Tensor
    grad_weights: Tensor | None
    lse: Tensor
    delta: Tensor
    want_tokens: bool
    want_bias: bool


class Path(Protocol):
    """A way to compute the pooling and its gradients."""

    def pool_forward(self, inputs: PoolInputs, want_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
        """pooled z (B, M, C), lse (B, M) = log sum_n exp(s_mn), and weights a (B, M, N), all in ``inputs.dtype``.

        Where a query has no token left, z and a are 0 and lse is +inf. Weights have no elements if not wanted.
        """

    def pool_backward(self, inputs: PoolInputs, incoming: Incoming) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of tokens (in their dtype), of queries (M, C) and of scores (B, M, N).

        The latter two in ``inputs.dtype``; the first and the last without elements if not wanted.
        """


def schema(kind: type[PoolInputs | Incoming]) -> str:
    """The fields as arguments in PyTorch's language of schemas: "Tensor tokens, Tensor queries, Tensor? bias, ..."."""
    types = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float", "bool": "bool"}
    return ", ".join(f"{types[str(field.type)]} {field.name}" for field in dataclasses.fields(kind))
