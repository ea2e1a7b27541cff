"""Attention pooling in PyTorch without a graph: forward and backward by hand, a few samples at a time.

A block of samples is normalised, scored and summed while it is in the processor's cache, so that main memory is
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
            normal, _, _ = torch.native_layer_norm(tokens[block].to(dtype), (width,), None, None, eps)
            logits = _logits((normal @ queries.T).transpose(1, 2), bias, mask, block)
            total = logits.logsumexp(dim=-1)
            total.masked_fill_(total == float("-inf"), float("inf"))
            a = logits.sub_(total[..., None]).exp_()
            torch.bmm(a, normal, out=pooled[block])
            lse[block] = total
            if want_weights:
                weights[block] = a
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
    grad_queries = torch.zeros_like(queries)
    grad_scores = dz.new_empty((len(tokens), amount, tokens.shape[1]) if want_bias else (0,))
    with torch.autocast(tokens.device.type, enabled=False):
        for block in _blocks(tokens):
            normal, _, inverse = torch.native_layer_norm(tokens[block].to(dz.dtype), (width,), None, None, eps)
            vectors = torch.cat([dz[block], queries.expand(len(normal), -1, -1)], dim=1)
            g, score = (normal @ vectors.transpose(1, 2)).transpose(1, 2).split(amount, dim=1)
            a = (_logits(score, bias, mask, block) - lse[block, :, None]).exp_()
            ds = a * ((g if grad_weights is None else g + grad_weights[block]) - delta[block, :, None])
            if want_bias:
                grad_scores[block] = ds
            grad_queries.addmm_(ds.transpose(0, 1).flatten(1), normal.flatten(0, 1))
            along = (a * g + ds * score).sum(dim=1)[..., None] / width
            pulls = torch.cat([a, ds], dim=1).transpose(1, 2)
            grad_tokens[block] = normal.mul_(-along).baddbmm_(pulls, vectors).mul_(inverse)
    return grad_tokens, grad_queries, grad_scores


def _centred(vectors: Tensor) -> Tensor:
    return vectors - vectors.mean(dim=-1, keepdim=True)


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
