"""Attention pooling in PyTorch without a graph: forward and backward by hand, a block of tokens at a time.

A block, some samples or some tokens of a few large ones, is centred, scored and summed while it is in the processor's
cache, so that main memory is read once for the forward pass and read and written once for the backward pass, and no
more than one block (two, for a backward pass in 16 bits) is ever held in float32 beside the tokens. Blocks share their
memory: fresh pages cost more than the arithmetic. Of the ways to write each thin product the fastest of those measured
was taken; they differ by up to four times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from hd_awd.pooling.inputs import Incoming, PoolInputs
from hd_awd.pooling.scores import centred as without_mean
from hd_awd.pooling.scores import logits

THREAD_ELEMENTS = 1 << 19  # 2 MB in float32: about a core's caches, and well above the cost of launching operations


def pool_forward(inputs: PoolInputs, want_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`hd_awd.pooling.inputs.Path`."""
    batch, num_tokens, width, num_queries = inputs.sizes
    tokens, bias, mask, dtype = inputs.tokens, inputs.bias, inputs.mask, inputs.dtype
    queries = without_mean(inputs.queries.to(dtype))
    pooled = tokens.new_empty((batch, num_queries, width), dtype=dtype)
    lse = pooled.new_empty((batch, num_queries))
    weights = pooled.new_empty((batch, num_queries, num_tokens) if want_weights else (0,))
    samples, rows, memory = _block(tokens, dtype)
    with torch.autocast(tokens.device.type, enabled=False):
        for block in _slices(batch, samples):
            # The softmax over tokens goes on from part to part (Milakov and Gimelshein 2018).
            z, total = pooled[block].zero_(), lse[block].zero_()
            top = torch.full_like(total, float("-inf"))
            for part in _slices(num_tokens, rows):
                centred, inverse = _centre(tokens[block, part], memory, inputs.eps)
                scores = (centred @ queries.T * inverse).transpose(1, 2).contiguous()
                scores = logits(scores, *_of(block, part, bias, mask))
                if want_weights:
                    weights[block, :, part] = scores
                largest = torch.maximum(top, scores.amax(dim=-1))
                shift = largest.masked_fill(largest == float("-inf"), 0.0)  # -inf - -inf would be NaN
                decay = (top - shift).exp_()
                share = scores.sub_(shift[..., None]).exp_()
                total.mul_(decay).add_(share.sum(dim=-1))
                z.mul_(decay[..., None]).baddbmm_(share.mul_(inverse.transpose(1, 2)), centred)
                top = largest
            z.div_(total.masked_fill(total == 0, 1.0)[..., None])
            total.log_().add_(top).masked_fill_(total == float("-inf"), float("inf"))
            if want_weights:
                weights[block].sub_(lse[block, :, None]).exp_()
    return pooled, lse, weights


def pool_backward(inputs: PoolInputs, incoming: Incoming) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`hd_awd.pooling.inputs.Path`; the equations are those of ``attention_pool_bwd_kernel``."""
    batch, num_tokens, width, num_queries = inputs.sizes
    tokens, bias, mask = inputs.tokens, inputs.bias, inputs.mask
    grad_weights, lse, delta = incoming.grad_weights, incoming.lse, incoming.delta
    queries, dz = without_mean(inputs.queries.to(inputs.dtype)), without_mean(incoming.grad_pooled)
    grad_tokens = torch.empty_like(tokens) if incoming.want_tokens else tokens.new_empty(0)
    grad_queries = dz.new_zeros(queries.shape)
    grad_scores = dz.new_empty((batch, num_queries, num_tokens) if incoming.want_bias else (0,))
    samples, rows, memory = _block(tokens, dz.dtype)
    with torch.autocast(tokens.device.type, enabled=False):
        for block, part in itertools.product(_slices(batch, samples), _slices(num_tokens, rows)):
            centred, inverse = _centre(tokens[block, part], memory, inputs.eps)
            scale = inverse.transpose(1, 2)
            vectors = torch.cat([dz[block], queries.expand(len(centred), -1, -1)], dim=1)
            g, score = (torch.bmm(vectors, centred.transpose(1, 2)) * scale).split(num_queries, dim=1)
            a = (logits(score, *_of(block, part, bias, mask)) - lse[block, :, None]).exp_()
            ds = a * ((g if grad_weights is None else g + grad_weights[block, :, part]) - delta[block, :, None])
            if incoming.want_bias:
                grad_scores[block, :, part] = ds
            pulls = torch.cat([a, ds], dim=1) * scale
            grad_queries += torch.bmm(pulls[:, num_queries:], centred).sum(dim=0)
            if not incoming.want_tokens:
                continue
            along = (a * g + ds * score).sum(dim=1)[..., None] * inverse.square() / -width
            if grad_tokens.dtype == dz.dtype:
                gradient = torch.bmm(pulls.transpose(1, 2), vectors, out=grad_tokens[block, part])
                gradient.addcmul_(centred, along)
            else:
                gradient = torch.bmm(pulls.transpose(1, 2), vectors)
                grad_tokens[block, part] = gradient.addcmul_(centred, along)
    return grad_tokens, grad_queries, grad_scores


def _centre(tokens: Tensor, memory: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h - mean (b, n, C), in the memory and its dtype, and 1 / sigma (b, n, 1)."""
    centred = memory[: tokens.numel()].view(tokens.shape)
    if tokens.dtype == centred.dtype:
        torch.sub(tokens, tokens.mean(dim=-1, keepdim=True), out=centred)
    else:
        centred.copy_(tokens)
        centred.sub_(centred.mean(dim=-1, keepdim=True))
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return centred, norm.square_().div_(centred.shape[-1]).add_(eps).rsqrt_()


def _of(block: slice, part: slice, bias: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Bias and mask of the block's samples and tokens."""
    return None if bias is None else bias[block, :, part], None if mask is None else mask[block, part]


def _block(tokens: Tensor, dtype: torch.dtype) -> tuple[int, int, Tensor]:
    """Samples, and tokens of each, that are worked on together; and memory for them.

    A cache full on a CPU, all elsewhere. A batched product gives each thread its own samples: as many for every one.
    """
    batch, num_tokens, width = tokens.shape
    samples, rows = batch, num_tokens
    if tokens.device.type == "cpu":
        threads = torch.get_num_threads()
        samples = min(batch, threads * max(1, round(THREAD_ELEMENTS / (num_tokens * width))))
        parts = round(samples * num_tokens * width / (threads * THREAD_ELEMENTS))
        rows = -(-num_tokens // max(1, parts))
    return samples, rows, tokens.new_empty(samples * rows * width, dtype=dtype)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, max(1, size)))
