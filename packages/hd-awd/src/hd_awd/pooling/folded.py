"""Attention pooling with the normalisation folded into the two products: no normalised copy of the tokens.

With LN(h_n) = (h_n - mu_n) / sigma_n and a query q,

    q . LN(h_n)             = (q - mean(q)) . h_n / sigma_n          (sum_c (q - mean(q))_c = 0 removes mu_n)
    sum_n a_n LN(h_n)       = sum_n (a_n / sigma_n) h_n - sum_n a_n mu_n / sigma_n

so the tokens are read for their statistics and for two thin matrix products, O(N C M) work. The mean is
removed after the products, so rounding grows with |mu| / sigma, as it does when tokens are merely stored in
that precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hd_awd.pooling.scores import centred, logits


def attention_pool_folded(
    tokens: Tensor, queries: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Arguments as in :func:`hd_awd.attention_pool`; computed in float32 or better; autograd goes through.

    Returns:
        pooled (B, M, C) and weights (B, M, N), both in float32 or better.
    """
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    queries = queries.to(tokens.dtype)
    variance, mean = torch.var_mean(tokens, dim=-1, correction=0)
    inverse = (variance + eps).rsqrt()
    scores = (tokens @ centred(queries).T * inverse[..., None]).transpose(1, 2)
    if bias is None and mask is None:
        weights = scores.softmax(dim=-1)
    else:
        # Without a single token the weights are zero; a softmax over nothing is NaN, in the backward pass too.
        scores = logits(scores, bias, mask)
        nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
    scaled = weights * inverse[:, None]
    return scaled @ tokens - (scaled @ mean[..., None]), weights
