"""Attention pooling that reads its tokens once: a program keeps M x C of state in registers and walks over tokens.

Shapes as in :mod:`hd_awd.pooling.kernels.parts`; symbols as in :func:`hd_awd.attention_pool`. A tile of BLOCK_N rows is
normalised in registers, scored, and added to the running sums (online softmax, Milakov and Gimelshein 2018).
"""

import triton
import triton.language as tl

from hd_awd.pooling.kernels.parts import allowed, load_rows, load_scores, store_rows, store_scores, subtract


@triton.jit
def attention_pool_fwd_kernel(
    tokens, queries, bias, mask, pooled, lse, scores, num_tokens, tokens_per_split, eps,
    tokens_b, tokens_n, tokens_c, bias_b, bias_m, bias_n, mask_b, mask_n,
    WIDTH: tl.constexpr, NUM_QUERIES: tl.constexpr, QUERIES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    ROW_HEAD: tl.constexpr, ROW_TAIL: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (b, split): z and log-sum-exp of its tokens, (B, splits, M, C) and (B, splits, M) float32.

    ``queries`` (M, C) float32 contiguous. Without a single token z is 0 and lse is +inf. ``scores`` (B, M, N), if
    not None, takes s, -inf where masked.
    """
    HEAD_PADDED: tl.constexpr = ROW_HEAD > WIDTH
    TAIL_PADDED: tl.constexpr = ROW_HEAD + ROW_TAIL > WIDTH
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    base = tokens + batch * tokens_b

    query = tl.arange(0, QUERIES_PADDED)[None, :, None]
    is_query = query < NUM_QUERIES
    # A query's mean has no effect on a normalised token but for rounding, which grows with it.
    q_head = load_rows(queries, query, is_query, WIDTH, 1, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
    q_mean = tl.sum(q_head, axis=2)
    z_head = tl.zeros([QUERIES_PADDED, ROW_HEAD], tl.float32)
    if ROW_TAIL > 0:
        q_tail = load_rows(queries, query, is_query, WIDTH, 1, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
        q_mean += tl.sum(q_tail, axis=2)
        q_tail -= (q_mean / WIDTH)[:, :, None]
        z_tail = tl.zeros([QUERIES_PADDED, ROW_TAIL], tl.float32)
    q_head -= (q_mean / WIDTH)[:, :, None]
    top = tl.full([QUERIES_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES_PADDED], tl.float32)

    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_N)[:, None, None]
        valid = rows < end
        h_head = load_rows(base, rows, valid, tokens_n, tokens_c, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
        mean = tl.sum(h_head, axis=2)
        if ROW_TAIL > 0:
            h_tail = load_rows(base, rows, valid, tokens_n, tokens_c, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
            mean += tl.sum(h_tail, axis=2)
        mean /= WIDTH
        h_head = subtract(h_head, mean, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
        square = tl.sum(h_head * h_head, axis=2)
        score = tl.sum(h_head * q_head, axis=2)
        if ROW_TAIL > 0:
            h_tail = subtract(h_tail, mean, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
            square += tl.sum(h_tail * h_tail, axis=2)
            score += tl.sum(h_tail * q_tail, axis=2)
        inverse = tl.rsqrt(square / WIDTH + eps)
        score *= inverse
        if bias is not None:
            score += load_scores(bias, batch, start, end, bias_b, bias_m, bias_n, NUM_QUERIES, QUERIES_PADDED, BLOCK_N)
        score = tl.where(allowed(mask, batch, start, end, mask_b, mask_n, BLOCK_N), score, float("-inf"))
        if scores is not None:
            store_scores(scores, batch, start, end, num_tokens, score, NUM_QUERIES, QUERIES_PADDED, BLOCK_N)

        largest = tl.maximum(top, tl.max(score, axis=0))
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf would be NaN
        decay = tl.exp(top - shift)
        share = tl.exp(score - shift[None, :])
        total = total * decay + tl.sum(share, axis=0)
        share *= inverse
        # The tail first: in the other order ptxas 12.9 spills for sm_100.
        if ROW_TAIL > 0:
            z_tail = z_tail * decay[:, None] + tl.sum(share[:, :, None] * h_tail, axis=0)
        z_head = z_head * decay[:, None] + tl.sum(share[:, :, None] * h_head, axis=0)
        top = largest

    index = batch * tl.num_programs(1) + split
    divisor = tl.where(total == 0, 1.0, total)[None, :, None]
    z = pooled + index * NUM_QUERIES * WIDTH
    store_rows(z, query, is_query, WIDTH, 1, z_head[None] / divisor, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
    if ROW_TAIL > 0:
        z_tail = z_tail[None] / divisor
        store_rows(z, query, is_query, WIDTH, 1, z_tail, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
    flat = tl.arange(0, QUERIES_PADDED)
    value = tl.where(total == 0, float("inf"), top + tl.log(total))
    tl.store(lse + index * NUM_QUERIES + flat, value, mask=flat < NUM_QUERIES)


@triton.jit
def attention_pool_merge_kernel(
    parts, part_lse, pooled, lse, splits, NUM_QUERIES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Program (b m, chunk of channels): the splits' z and lse put together, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    batch, query = row // NUM_QUERIES, row % NUM_QUERIES
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    top = float("-inf")
    for split in range(splits):
        value = tl.load(part_lse + (batch * splits + split) * NUM_QUERIES + query)
        top = tl.where(value == float("inf"), top, tl.maximum(top, value))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    z = tl.zeros([BLOCK_C], tl.float32)
    for split in range(splits):
        index = (batch * splits + split) * NUM_QUERIES + query
        value = tl.load(part_lse + index)
        share = tl.where(value == float("inf"), 0.0, tl.exp(value - shift))
        total += share
        z += share * tl.load(parts + index * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    tl.store(pooled + row * WIDTH + columns, z / tl.where(total == 0, 1.0, total), mask=columns < WIDTH)
    tl.store(lse + row, tl.where(total == 0, float("inf"), shift + tl.log(total)), mask=tl.program_id(1) == 0)


@triton.jit
def attention_pool_bwd_kernel(
    tokens, queries, grad_pooled, lse, delta, bias, mask, grad_weights, grad_tokens, grad_queries, grad_scores,
    num_tokens, tokens_per_split, eps,
    tokens_b, tokens_n, tokens_c, bias_b, bias_m, bias_n, mask_b, mask_n, grad_b, grad_n, grad_c,
    WIDTH: tl.constexpr, NUM_QUERIES: tl.constexpr, QUERIES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    ROW_HEAD: tl.constexpr, ROW_TAIL: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (b, split): the gradient of its tokens, and its part of the queries' gradient, (B, splits, M, C).

    With x = LN(h), a = exp(s - lse), g_mn = dz_m . x_n (+ da_mn) and ds = a (g - delta), delta_m = sum_n a_mn g_mn:

        dq_m = sum_n ds_mn x_n          dx_n = sum_m a_mn dz_m + ds_mn q_m
        dh_n = (dx_n - mean_c dx_n - x_n mean_c(dx_n x_n)) / sigma_n

    With q and dz centred over channels mean_c dx is zero, and mean_c(dx x) = sum_m (a dz.x + ds q.x) / C follows from
    sums that are there already. ``delta`` (B, M), ``grad_pooled`` (B, M, C), float32 contiguous; ``grad_weights`` da
    and ``grad_scores`` ds (B, M, N) contiguous float32. These two and ``grad_tokens`` may be None.
    """
    HEAD_PADDED: tl.constexpr = ROW_HEAD > WIDTH
    TAIL_PADDED: tl.constexpr = ROW_HEAD + ROW_TAIL > WIDTH
    batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    base = tokens + batch * tokens_b
    if grad_tokens is not None:
        out = grad_tokens + batch * grad_b
    dz = grad_pooled + batch * NUM_QUERIES * WIDTH
    sample = NUM_QUERIES * num_tokens  # elements of a sample in a contiguous (B, M, N)

    query = tl.arange(0, QUERIES_PADDED)[None, :, None]
    is_query = query < NUM_QUERIES
    q_head = load_rows(queries, query, is_query, WIDTH, 1, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
    dz_head = load_rows(dz, query, is_query, WIDTH, 1, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
    dq_head = tl.zeros([QUERIES_PADDED, ROW_HEAD], tl.float32)
    q_mean, dz_mean = tl.sum(q_head, axis=2), tl.sum(dz_head, axis=2)
    if ROW_TAIL > 0:
        q_tail = load_rows(queries, query, is_query, WIDTH, 1, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
        dz_tail = load_rows(dz, query, is_query, WIDTH, 1, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
        dq_tail = tl.zeros([QUERIES_PADDED, ROW_TAIL], tl.float32)
        q_mean += tl.sum(q_tail, axis=2)
        dz_mean += tl.sum(dz_tail, axis=2)
        q_tail = subtract(q_tail, q_mean / WIDTH, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
        dz_tail = subtract(dz_tail, dz_mean / WIDTH, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
    q_head = subtract(q_head, q_mean / WIDTH, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
    dz_head = subtract(dz_head, dz_mean / WIDTH, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
    flat = tl.arange(0, QUERIES_PADDED)
    # A padded query has lse = +inf: its a and ds are zero.
    log_total = tl.load(lse + batch * NUM_QUERIES + flat, mask=flat < NUM_QUERIES, other=float("inf"))[None, :]
    centre = tl.load(delta + batch * NUM_QUERIES + flat, mask=flat < NUM_QUERIES, other=0.0)[None, :]

    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_N)[:, None, None]
        valid = rows < end
        h_head = load_rows(base, rows, valid, tokens_n, tokens_c, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
        mean = tl.sum(h_head, axis=2)
        if ROW_TAIL > 0:
            h_tail = load_rows(base, rows, valid, tokens_n, tokens_c, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
            mean += tl.sum(h_tail, axis=2)
        mean /= WIDTH
        h_head = subtract(h_head, mean, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
        square = tl.sum(h_head * h_head, axis=2)
        score = tl.sum(h_head * q_head, axis=2)
        g = tl.sum(h_head * dz_head, axis=2)
        if ROW_TAIL > 0:
            h_tail = subtract(h_tail, mean, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
            square += tl.sum(h_tail * h_tail, axis=2)
            score += tl.sum(h_tail * q_tail, axis=2)
            g += tl.sum(h_tail * dz_tail, axis=2)
        inverse = tl.rsqrt(square / WIDTH + eps)
        score, g = score * inverse, g * inverse
        logit, total = score, g
        if bias is not None:
            logit += load_scores(bias, batch, start, end, bias_b, bias_m, bias_n, NUM_QUERIES, QUERIES_PADDED, BLOCK_N)
        if grad_weights is not None:
            total += load_scores(
                grad_weights, batch, start, end, sample, num_tokens, 1, NUM_QUERIES, QUERIES_PADDED, BLOCK_N
            )
        a = tl.where(allowed(mask, batch, start, end, mask_b, mask_n, BLOCK_N), tl.exp(logit - log_total), 0.0)
        ds = a * (total - centre)
        if grad_scores is not None:
            store_scores(grad_scores, batch, start, end, num_tokens, ds, NUM_QUERIES, QUERIES_PADDED, BLOCK_N)

        # From here on every factor of x = h_head * inverse carries the inverse, and so does dh.
        along = (tl.sum(a * g + ds * score, axis=1) / WIDTH)[:, None, None] * (inverse * inverse)[:, :, None]
        a, ds = (a * inverse)[:, :, None], (ds * inverse)[:, :, None]
        dq_head += tl.sum(ds * h_head, axis=0)
        if grad_tokens is not None:
            grad = tl.sum(a * dz_head + ds * q_head, axis=1)[:, None, :] - along * h_head
            store_rows(out, rows, valid, grad_n, grad_c, grad, 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
        if ROW_TAIL > 0:
            dq_tail += tl.sum(ds * h_tail, axis=0)
            if grad_tokens is not None:
                grad = tl.sum(a * dz_tail + ds * q_tail, axis=1)[:, None, :] - along * h_tail
                store_rows(out, rows, valid, grad_n, grad_c, grad, ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)

    dq = grad_queries + (batch * tl.num_programs(1) + split) * NUM_QUERIES * WIDTH
    store_rows(dq, query, is_query, WIDTH, 1, dq_head[None], 0, ROW_HEAD, WIDTH, HEAD_PADDED, THREADS)
    if ROW_TAIL > 0:
        store_rows(dq, query, is_query, WIDTH, 1, dq_tail[None], ROW_HEAD, ROW_TAIL, WIDTH, TAIL_PADDED, THREADS)
