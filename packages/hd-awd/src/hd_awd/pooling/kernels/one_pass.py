"""Attention pooling that reads its tokens once: a program keeps M x C of state in registers and walks over tokens.

Shapes as in :mod:`hd_awd.pooling.kernels.parts`; symbols as in :func:`hd_awd.attention_pool`. A tile of BLOCK_N rows is
normalised in registers, scored, and added to the running sums (online softmax, Milakov and Gimelshein 2018).
"""

import triton
import triton.language as tl

from hd_awd.pooling.kernels.parts import allowed, load, load_scores, store, store_scores, subtract


@triton.jit
def forward(tokens, queries, bias, mask, pooled, lse, scores, count, tokens_per_split, eps,
            tokens_b, tokens_n, tokens_c, bias_b, bias_m, bias_n, mask_b, mask_n,
            WIDTH: tl.constexpr, COUNT: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr,
            HEAD: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Program (b, split): z and log-sum-exp of its tokens, (B, splits, M, C) and (B, splits, M) float32.

    ``queries`` (M, C) float32 contiguous. Without a single token z is 0 and lse is +inf. ``scores`` (B, M, N), if
    not None, takes s, -inf where masked.
    """
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, count)
    base = tokens + batch * tokens_b

    query = tl.arange(0, QUERIES)[None, :, None]
    # A query's mean has no effect on a normalised token but for rounding, which grows with it.
    q_head = load(queries, query, query < COUNT, WIDTH, 1, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
    q_mean = tl.sum(q_head, axis=2)
    z_head = tl.zeros([QUERIES, HEAD], tl.float32)
    if TAIL > 0:
        q_tail = load(queries, query, query < COUNT, WIDTH, 1, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
        q_mean += tl.sum(q_tail, axis=2)
        q_tail -= (q_mean / WIDTH)[:, :, None]
        z_tail = tl.zeros([QUERIES, TAIL], tl.float32)
    q_head -= (q_mean / WIDTH)[:, :, None]
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)

    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_N)[:, None, None]
        head = load(base, rows, rows < end, tokens_n, tokens_c, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
        mean = tl.sum(head, axis=2)
        if TAIL > 0:
            tail = load(base, rows, rows < end, tokens_n, tokens_c, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
            mean += tl.sum(tail, axis=2)
        mean /= WIDTH
        head = subtract(head, mean, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
        square = tl.sum(head * head, axis=2)
        score = tl.sum(head * q_head, axis=2)
        if TAIL > 0:
            tail = subtract(tail, mean, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
            square += tl.sum(tail * tail, axis=2)
            score += tl.sum(tail * q_tail, axis=2)
        inverse = tl.rsqrt(square / WIDTH + eps)
        score *= inverse
        if bias is not None:
            score += load_scores(bias, batch, start, end, bias_b, bias_m, bias_n, COUNT, QUERIES, BLOCK_N)
        score = tl.where(allowed(mask, batch, start, end, mask_b, mask_n, BLOCK_N), score, float("-inf"))
        if scores is not None:
            store_scores(scores, batch, start, end, count, score, COUNT, QUERIES, BLOCK_N)

        largest = tl.maximum(top, tl.max(score, axis=0))
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf would be NaN
        decay = tl.exp(top - shift)
        share = tl.exp(score - shift[None, :])
        total = total * decay + tl.sum(share, axis=0)
        share *= inverse
        # The tail first: in the other order ptxas 12.9 spills for sm_100.
        if TAIL > 0:
            z_tail = z_tail * decay[:, None] + tl.sum(share[:, :, None] * tail, axis=0)
        z_head = z_head * decay[:, None] + tl.sum(share[:, :, None] * head, axis=0)
        top = largest

    index = batch * tl.num_programs(1) + split
    divisor = tl.where(total == 0, 1.0, total)[None, :, None]
    z = pooled + index * COUNT * WIDTH
    store(z, query, query < COUNT, WIDTH, 1, z_head[None] / divisor, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
    if TAIL > 0:
        z_tail = z_tail[None] / divisor
        store(z, query, query < COUNT, WIDTH, 1, z_tail, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
    flat = tl.arange(0, QUERIES)
    value = tl.where(total == 0, float("inf"), top + tl.log(total))
    tl.store(lse + index * COUNT + flat, value, mask=flat < COUNT)


@triton.jit
def merge(parts, part_lse, pooled, lse, splits, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """Program (b m, chunk of channels): the splits' z and lse put together, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    batch, query = row // COUNT, row % COUNT
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    top = float("-inf")
    for split in range(splits):
        value = tl.load(part_lse + (batch * splits + split) * COUNT + query)
        top = tl.where(value == float("inf"), top, tl.maximum(top, value))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    z = tl.zeros([BLOCK_C], tl.float32)
    for split in range(splits):
        index = (batch * splits + split) * COUNT + query
        value = tl.load(part_lse + index)
        share = tl.where(value == float("inf"), 0.0, tl.exp(value - shift))
        total += share
        z += share * tl.load(parts + index * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    tl.store(pooled + row * WIDTH + columns, z / tl.where(total == 0, 1.0, total), mask=columns < WIDTH)
    tl.store(lse + row, tl.where(total == 0, float("inf"), shift + tl.log(total)), mask=tl.program_id(1) == 0)


@triton.jit
def backward(tokens, queries, grad_pooled, lse, delta, bias, mask, grad_weights, grad_tokens, grad_queries, grad_scores,
             count, tokens_per_split, eps,
             tokens_b, tokens_n, tokens_c, bias_b, bias_m, bias_n, mask_b, mask_n, grad_b, grad_n, grad_c,
             WIDTH: tl.constexpr, COUNT: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr,
             HEAD: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Program (b, split): the gradient of its tokens, and its part of the queries' gradient, (B, splits, M, C).

    With x = LN(h), a = exp(s - lse), g_mn = dz_m . x_n (+ da_mn) and ds = a (g - delta), delta_m = sum_n a_mn g_mn:

        dq_m = sum_n ds_mn x_n          dx_n = sum_m a_mn dz_m + ds_mn q_m
        dh_n = (dx_n - mean_c dx_n - x_n mean_c(dx_n x_n)) / sigma_n

    With q and dz centred over channels mean_c dx is zero, and mean_c(dx x) = sum_m (a dz.x + ds q.x) / C follows from
    sums that are there already. ``delta`` (B, M), ``grad_pooled`` (B, M, C), float32 contiguous; ``grad_weights`` da
    and ``grad_scores`` ds (B, M, N) contiguous float32. These two and ``grad_tokens`` may be None.
    """
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, count)
    base = tokens + batch * tokens_b
    if grad_tokens is not None:
        out = grad_tokens + batch * grad_b
    dz = grad_pooled + batch * COUNT * WIDTH

    query = tl.arange(0, QUERIES)[None, :, None]
    q_head = load(queries, query, query < COUNT, WIDTH, 1, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
    dz_head = load(dz, query, query < COUNT, WIDTH, 1, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
    dq_head = tl.zeros([QUERIES, HEAD], tl.float32)
    q_mean, dz_mean = tl.sum(q_head, axis=2), tl.sum(dz_head, axis=2)
    if TAIL > 0:
        q_tail = load(queries, query, query < COUNT, WIDTH, 1, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
        dz_tail = load(dz, query, query < COUNT, WIDTH, 1, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
        dq_tail = tl.zeros([QUERIES, TAIL], tl.float32)
        q_mean += tl.sum(q_tail, axis=2)
        dz_mean += tl.sum(dz_tail, axis=2)
        q_tail = subtract(q_tail, q_mean / WIDTH, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
        dz_tail = subtract(dz_tail, dz_mean / WIDTH, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
    q_head = subtract(q_head, q_mean / WIDTH, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
    dz_head = subtract(dz_head, dz_mean / WIDTH, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
    flat = tl.arange(0, QUERIES)
    # A padded query has lse = +inf: its a and ds are zero.
    log_total = tl.load(lse + batch * COUNT + flat, mask=flat < COUNT, other=float("inf"))[None, :]
    centre = tl.load(delta + batch * COUNT + flat, mask=flat < COUNT, other=0.0)[None, :]

    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_N)[:, None, None]
        head = load(base, rows, rows < end, tokens_n, tokens_c, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
        mean = tl.sum(head, axis=2)
        if TAIL > 0:
            tail = load(base, rows, rows < end, tokens_n, tokens_c, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
            mean += tl.sum(tail, axis=2)
        mean /= WIDTH
        head = subtract(head, mean, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
        square = tl.sum(head * head, axis=2)
        score = tl.sum(head * q_head, axis=2)
        g = tl.sum(head * dz_head, axis=2)
        if TAIL > 0:
            tail = subtract(tail, mean, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
            square += tl.sum(tail * tail, axis=2)
            score += tl.sum(tail * q_tail, axis=2)
            g += tl.sum(tail * dz_tail, axis=2)
        inverse = tl.rsqrt(square / WIDTH + eps)
        score, g = score * inverse, g * inverse
        logit, total = score, g
        if bias is not None:
            logit += load_scores(bias, batch, start, end, bias_b, bias_m, bias_n, COUNT, QUERIES, BLOCK_N)
        if grad_weights is not None:
            total += load_scores(grad_weights, batch, start, end, COUNT * count, count, 1, COUNT, QUERIES, BLOCK_N)
        a = tl.where(allowed(mask, batch, start, end, mask_b, mask_n, BLOCK_N), tl.exp(logit - log_total), 0.0)
        ds = a * (total - centre)
        if grad_scores is not None:
            store_scores(grad_scores, batch, start, end, count, ds, COUNT, QUERIES, BLOCK_N)

        # From here on every factor of x = head * inverse carries the inverse, and so does dh.
        along = (tl.sum(a * g + ds * score, axis=1) / WIDTH)[:, None, None] * (inverse * inverse)[:, :, None]
        a, ds = (a * inverse)[:, :, None], (ds * inverse)[:, :, None]
        dq_head += tl.sum(ds * head, axis=0)
        if grad_tokens is not None:
            grad = tl.sum(a * dz_head + ds * q_head, axis=1)[:, None, :] - along * head
            store(out, rows, rows < end, grad_n, grad_c, grad, 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
        if TAIL > 0:
            dq_tail += tl.sum(ds * tail, axis=0)
            if grad_tokens is not None:
                grad = tl.sum(a * dz_tail + ds * q_tail, axis=1)[:, None, :] - along * tail
                store(out, rows, rows < end, grad_n, grad_c, grad, HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)

    dq = grad_queries + (batch * tl.num_programs(1) + split) * COUNT * WIDTH
    store(dq, query, query < COUNT, WIDTH, 1, dq_head[None], 0, HEAD, WIDTH, HEAD > WIDTH, THREADS)
    if TAIL > 0:
        store(dq, query, query < COUNT, WIDTH, 1, dq_tail[None], HEAD, TAIL, WIDTH, HEAD + TAIL > WIDTH, THREADS)
