"""Attention pooling in PyTorch without a graph: forward and backward by hand, a few samples at a time.

A block of samples is centred, scored and summed while it is in the processor's cache, so that main memory is
read once for the forward pass and read and written once for the backward pass, and no more than one block is ever
held in float32 beside the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20  # 4 MB in float32: below most last-level caches, above the cost of launching operations


def pool_forward(
    tokens: Tensor, queries: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float, want_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as in :func:`hd_awd.attention_pool`, bias already of shape (B, M, N).

    Returns:
        pooled (B, M, C), lse (B, M) = log sum_n exp(s), +inf for a sample without a token, and weights (B, M, N),
        without elements if not wanted; all in float32 or better.
    """
    batch, count, width = tokens.shape
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    queries = queries.to(dtype)
    pooled = tokens.new_empty((batch, len(queries), width), dtype=dtype)
    lse = pooled.new_empty(pooled.shape[:2])
    weights = pooled.new_empty((batch, len(queries), count) if want_weights else (0,))
    with torch.autocast(tokens.device.type, enabled=False):
        for block in _blocks(tokens):
            centred, inverse = _statistics(tokens[block], dtype, eps)
            # Queries first: a thin matrix on the left is the faster of the two orders.
            scores = (queries @ centred.flatten(0, 1).T).unflatten(1, centred.shape[:2]).transpose(0, 1)
            logits = _logits(scores * inverse[:, None], bias, mask, block)
            total = logits.logsumexp(dim=-1)
            total.masked_fill_(total == float("-inf"), float("inf"))
            a = logits.sub_(total[..., None]).exp_()
            lse[block] = total
            if want_weights:
                weights[block] = a
            torch.bmm(a.mul_(inverse[:, None]), centred, out=pooled[block])
    return pooled, lse, weights


def pool_backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    eps: float,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations of :func:`hd_awd.pooling.kernels.one_pass.backward`; ``delta`` (B, M) = sum_n a (dz . x + da).

    Returns:
        the gradients of tokens (in their dtype), of queries and of the (B, M, N) scores, the latter two in float32
        or better, the last without elements if not wanted.
    """
    width, amount = tokens.shape[-1], len(queries)
    queries = _centred(queries.to(grad_pooled.dtype))
    dz = _centred(grad_pooled)
    grad_tokens = torch.empty_like(tokens)
    grad_queries = dz.new_zeros(queries.shape)
    grad_scores = dz.new_empty((len(tokens), amount, tokens.shape[1]) if want_bias else (0,))
    with torch.autocast(tokens.device.type, enabled=False):
        for block in _blocks(tokens):
            centred, inverse = _statistics(tokens[block], dz.dtype, eps)
            scale = inverse[:, None]
            vectors = torch.cat([dz[block], queries.expand(len(centred), -1, -1)], dim=1)
            g, score = (torch.bmm(vectors, centred.transpose(1, 2)) * scale).split(amount, dim=1)
            a = (_logits(score, bias, mask, block) - lse[block, :, None]).exp_()
            ds = a * ((g if grad_weights is None else g + grad_weights[block]) - delta[block, :, None])
            if want_bias:
                grad_scores[block] = ds
            along = (a * g + ds * score).sum(dim=1) * inverse**2 / -width
            pulls = torch.cat([a, ds], dim=1) * scale
            grad_queries.addmm_(pulls[:, amount:].transpose(0, 1).flatten(1), centred.flatten(0, 1))
            gradient = torch.bmm(pulls.transpose(1, 2), vectors).addcmul_(centred, along[..., None])
            grad_tokens[block] = gradient
    return grad_tokens, grad_queries, grad_scores


def _centred(vectors: Tensor) -> Tensor:
    return vectors - vectors.mean(dim=-1, keepdim=True)


def _statistics(tokens: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """h - mean (b, N, C), and 1 / sigma (b, N), in ``dtype``."""
    tokens = tokens.to(dtype)
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    return centred, (torch.linalg.vector_norm(centred, dim=-1).square_() / tokens.shape[-1] + eps).rsqrt_()


def _logits(scores: Tensor, bias: Tensor | None, mask: Tensor | None, block: slice) -> Tensor:
    """scores + bias, -inf where masked, for the samples of a block."""
    if bias is not None:
        scores = scores + bias[block].to(scores.dtype)
    return scores if mask is None else scores.masked_fill(~mask[block, None], float("-inf"))


def _blocks(tokens: Tensor) -> Iterator[slice]:
    """Samples that are worked on together: a cache full of them on a CPU, all of them elsewhere."""
    batch, count, width = tokens.shape
    size = max(1, BLOCK_ELEMENTS // (count * width)) if tokens.device.type == "cpu" else max(1, batch)
    return (slice(start, start + size) for start in range(0, batch, size))
