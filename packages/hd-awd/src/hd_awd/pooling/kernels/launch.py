"""From tensors to kernels: chooses a plan, allocates, launches, and merges what was split."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from hd_awd.pooling.inputs import Incoming, PoolInputs
from hd_awd.pooling.kernels import one_pass, two_pass
from hd_awd.pooling.kernels.plan import TWO_PASS, Plan, make_plan, power_of_two
from hd_awd.pooling.kernels.traffic import MERGE_C
from hd_awd.pooling.scores import centred, logits

OFFSETS = 2**31 - 1  # within a sample the kernels count in 32 bits
# A product that feeds a sum is one instruction. Said here because Triton's default is about to change.
OPTIONS = {"enable_fp_fusion": True}


def pool_forward(inputs: PoolInputs, want_weights: bool, plan: Plan | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`hd_awd.pooling.inputs.Path`; ``plan`` is made from the shape if not given."""
    inputs = _ready(inputs)
    tokens, queries = inputs.tokens, inputs.queries
    plan = plan or _plan("forward", inputs, want_weights)
    batch, num_tokens, width, num_queries = inputs.sizes
    pooled = queries.new_empty(batch, num_queries, width)
    lse = queries.new_empty(batch, num_queries)
    if batch == 0:
        return pooled, lse, queries.new_empty((0, num_queries, num_tokens) if want_weights else (0,))
    with _device(tokens):
        if plan.passes == 1:
            scores = queries.new_empty(batch, num_queries, num_tokens) if want_weights else None
            _one_pass_forward(plan, inputs, pooled, lse, scores)
            weights = queries.new_empty(0) if scores is None else scores.sub_(lse[..., None]).exp_()
            return pooled, lse, weights
        scores, mean, inverse = _project(plan, inputs, centred(queries)[None])
        scores = logits(scores, inputs.bias, inputs.mask)
        lse = scores.logsumexp(dim=-1)
        lse = lse.masked_fill_(lse == float("-inf"), float("inf"))
        weights = scores.sub_(lse[..., None]).exp_()
        parts = pooled[:, None] if plan.splits == 1 else pooled.new_empty(batch, plan.splits, num_queries, width)
        two_pass.attention_pool_weighted_sum_kernel[_two_pass_grid(plan, tokens)](
            tokens, weights, mean, inverse, parts, num_tokens, plan.tokens_per_split,
            *tokens.stride(), **_chunked(plan, tokens, num_queries),
        )  # fmt: skip
        pooled = parts.sum(dim=1) if plan.splits > 1 else pooled
        return pooled, lse, weights if want_weights else queries.new_empty(0)


def pool_backward(inputs: PoolInputs, incoming: Incoming, plan: Plan | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`hd_awd.pooling.inputs.Path`; every program's part of dq is summed in a fixed order."""
    given, inputs = inputs.tokens, _ready(inputs)
    tokens, queries, bias, mask = inputs.tokens, inputs.queries, inputs.bias, inputs.mask
    written = torch.empty_like(tokens) if incoming.want_tokens else None  # within the kernels' reach, as the tokens are
    plan = plan or _plan("backward", inputs, incoming.grad_weights is not None)
    batch, num_tokens, width, num_queries = inputs.sizes
    grad_scores = queries.new_empty((batch, num_queries, num_tokens) if incoming.want_bias else (0,))
    if batch == 0:
        return _laid_out_as(given, written), torch.zeros_like(queries), grad_scores
    parts = queries.new_empty(batch * plan.splits, num_queries, width)
    grad_pooled, lse, delta = (one.contiguous() for one in (incoming.grad_pooled, incoming.lse, incoming.delta))
    grad_weights = None if incoming.grad_weights is None else incoming.grad_weights.contiguous()
    with _device(tokens):
        if plan.passes == 1:
            one_pass.attention_pool_bwd_kernel[(batch, plan.splits)](
                tokens, queries, grad_pooled, lse, delta, bias, mask, grad_weights, written, parts,
                grad_scores if incoming.want_bias else None, num_tokens, plan.tokens_per_split, inputs.eps,
                *tokens.stride(), *_strides(bias, 3), *_strides(mask, 2), *_strides(written, 3),
                **_whole_rows(plan, tokens, num_queries),
            )  # fmt: skip
            return _laid_out_as(given, written), parts.sum(dim=0), grad_scores
        queries, dz = centred(queries), centred(grad_pooled)
        both, mean, inverse = _project(plan, inputs, torch.cat([queries.expand_as(dz), dz], dim=1))
        score, g = both.split(num_queries, dim=1)
        a = (logits(score, bias, mask) - lse[..., None]).exp_()
        ds = a * ((g if grad_weights is None else g + grad_weights) - delta[..., None])
        along = (a * g + ds * score).sum(dim=1) / width
        two_pass.attention_pool_two_pass_bwd_kernel[_two_pass_grid(plan, tokens)](
            tokens, queries, dz, a, ds, mean, inverse, along, written, parts, num_tokens, plan.tokens_per_split,
            *tokens.stride(), *_strides(written, 3), **_chunked(plan, tokens, num_queries),
        )  # fmt: skip
        return _laid_out_as(given, written), parts.sum(dim=0), ds if incoming.want_bias else grad_scores


def _one_pass_forward(plan: Plan, inputs: PoolInputs, pooled: Tensor, lse: Tensor, scores: Tensor | None) -> None:
    """Fills ``pooled``, ``lse`` and, if not None, ``scores``."""
    batch, num_tokens, width, num_queries = inputs.sizes
    tokens, bias, mask = inputs.tokens, inputs.bias, inputs.mask
    z, total = pooled, lse
    if plan.splits > 1:
        z = pooled.new_empty(batch, plan.splits, num_queries, width)
        total = lse.new_empty(batch, plan.splits, num_queries)
    one_pass.attention_pool_fwd_kernel[(batch, plan.splits)](
        tokens, inputs.queries, bias, mask, z, total, scores, num_tokens, plan.tokens_per_split, inputs.eps,
        *tokens.stride(), *_strides(bias, 3), *_strides(mask, 2), **_whole_rows(plan, tokens, num_queries),
    )  # fmt: skip
    if plan.splits > 1:
        block = min(MERGE_C, power_of_two(width))
        one_pass.attention_pool_merge_kernel[(batch * num_queries, -(-width // block))](
            z, total, pooled, lse, plan.splits, NUM_QUERIES=num_queries, WIDTH=width, BLOCK_C=block, **OPTIONS
        )


def _project(plan: Plan, inputs: PoolInputs, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v_m . LN(h_n) (B, M, N), mean and 1/sigma (B, N); vectors (B or 1, M, C), of any number M."""
    tokens, num_queries = inputs.tokens, vectors.shape[1]
    batch, num_tokens, width, _ = inputs.sizes
    products = vectors.new_empty(batch, num_queries, num_tokens)
    mean, inverse = vectors.new_empty(batch, num_tokens), vectors.new_empty(batch, num_tokens)
    two_pass.attention_pool_project_kernel[(batch, -(-num_tokens // TWO_PASS["project_n"]))](
        tokens, vectors, products, mean, inverse, num_tokens, inputs.eps,
        *tokens.stride(), vectors.stride(0) * (len(vectors) > 1),
        WIDTH=width, NUM_QUERIES=num_queries, QUERIES_PADDED=max(16, power_of_two(num_queries)),
        BLOCK_N=TWO_PASS["project_n"], BLOCK_C=TWO_PASS["project_c"], FIRST=TWO_PASS["project_first"],
        STAGES=plan.stages, num_warps=TWO_PASS["warps"], **OPTIONS,
    )  # fmt: skip
    return products, mean, inverse


def _whole_rows(plan: Plan, tokens: Tensor, num_queries: int) -> dict[str, Any]:
    """Compile-time arguments of the one-pass kernels."""
    row = {"ROW_HEAD": plan.row_head, "ROW_TAIL": plan.row_tail}
    return _sizes(plan, tokens, num_queries) | row


def _chunked(plan: Plan, tokens: Tensor, num_queries: int) -> dict[str, Any]:
    """Compile-time arguments of the two-pass kernels that walk over tokens."""
    row = {"BLOCK_C": plan.row_head, "PADDED": tokens.shape[2] % plan.row_head != 0}
    return _sizes(plan, tokens, num_queries) | row


def _sizes(plan: Plan, tokens: Tensor, num_queries: int) -> dict[str, Any]:
    return {
        "WIDTH": tokens.shape[2],
        "NUM_QUERIES": num_queries,
        "QUERIES_PADDED": power_of_two(num_queries),
        "BLOCK_N": plan.block_n,
        "THREADS": plan.warps * _lanes(tokens.device),
        "STAGES": plan.stages,
        "num_warps": plan.warps,
        **OPTIONS,
    }


def _two_pass_grid(plan: Plan, tokens: Tensor) -> tuple[int, int, int]:
    return len(tokens), plan.splits, -(-tokens.shape[2] // plan.row_head)


def _strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if tensor is None else tensor.stride()


def _ready(inputs: PoolInputs) -> PoolInputs:
    """As the kernels take them: queries float32 and contiguous, the others within reach of 32 bits."""
    bias, mask = (None if one is None else _reachable(one) for one in (inputs.bias, inputs.mask))
    queries = inputs.queries.float().contiguous()
    return dataclasses.replace(inputs, tokens=_reachable(inputs.tokens), queries=queries, bias=bias, mask=mask)


def _reachable(tensor: Tensor) -> Tensor:
    """Tokens, bias or mask, copied only where a sample's far end is out of reach of 32 bits."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    return tensor.contiguous() if extent > OFFSETS else tensor


def _laid_out_as(tokens: Tensor, gradient: Tensor | None) -> Tensor:
    """The gradient with the strides that the shape function gives it; without elements for None."""
    if gradient is None:
        return tokens.new_empty(0)
    expected = torch.empty_like(tokens, device="meta").stride()
    return gradient if gradient.stride() == expected else torch.empty_like(tokens).copy_(gradient)


def _plan(direction: str, inputs: PoolInputs, weights: bool) -> Plan:
    """The default plan; ``weights``: whether weights are returned, or differentiated."""
    extras = inputs.bias is not None or inputs.mask is not None or weights
    lanes, processors = _device_facts(inputs.tokens.device)
    sizes = (*inputs.sizes, inputs.tokens.element_size())
    return make_plan(direction, *sizes, extras=extras, lanes=lanes, processors=processors)


def _lanes(device: torch.device) -> int:
    return _device_facts(device)[0]


@functools.cache
def _device_facts(device: torch.device) -> tuple[int, int]:
    """(threads of a warp, multiprocessors); in the interpreter a small device, so that splits occur."""
    if device.type != "cuda":
        return 32, 8
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "warp_size", 32), properties.multi_processor_count


def _device(tokens: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tokens.device) if tokens.is_cuda else contextlib.nullcontext()
