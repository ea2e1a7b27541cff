"""Attention pooling written as its definition: the oracle that every faster path is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_pool_reference(
    tokens: Tensor, queries: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Normalise, score, softmax, sum, in tokens' dtype; arguments as in :func:`hd_awd.attention_pool`.

    Returns:
        pooled (B, M, C) and weights (B, M, N).
    """
    normalised = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
    scores = torch.einsum("bnc,mc->bmn", normalised, queries)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = scores.softmax(dim=-1).masked_fill(nothing, 0.0)
    return torch.einsum("bmn,bnc->bmc", weights, normalised), weights
