"""Attention pooling that reads its tokens twice: where M x C of state, or a row, does not fit into registers.

The first pass takes products of every normalised token with M vectors, the second sums tokens (or writes their
gradients) one chunk of channels at a time; the softmax stands between them, on (B, M, N) numbers. The second read
comes from the cache where a sample fits into it.
"""

import triton
import triton.language as tl

from hd_awd.pooling.kernels.parts import load_rows, load_scores, store_rows, store_scores, subtract


@triton.jit
def attention_pool_project_kernel(
    tokens, vectors, products, mean, inverse, num_tokens, eps, tokens_b, tokens_n, tokens_c, vectors_b,
    WIDTH: tl.constexpr, NUM_QUERIES: tl.constexpr, QUERIES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, FIRST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (b, block of tokens): v_m . LN(h_n) into ``products`` (B, M, N), mean and 1/sigma (B, N) of each token.

    ``vectors`` (B, M, C) float32, centred over channels but for rounding, its batch stride may be 0. Sums are taken of
    h less the mean of its FIRST channels, which are read once more for it, so that a large common offset of a token
    cancels before it can cost digits.
    """
    batch, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N
    rows, columns, query = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C), tl.arange(0, QUERIES_PADDED)
    base, v = tokens + batch * tokens_b + rows[:, None] * tokens_n, vectors + batch * vectors_b + query[None, :] * WIDTH
    first = tl.arange(0, FIRST)[None, :]
    inside = (rows < num_tokens)[:, None] & (first < WIDTH)
    first = tl.load(base + first * tokens_c, mask=inside, other=0.0)
    shift = tl.sum(first.to(tl.float32), axis=1) / min(FIRST, WIDTH)
    total = tl.zeros([BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    product = tl.zeros([BLOCK_N, QUERIES_PADDED], tl.float32)
    vector_total = tl.zeros([QUERIES_PADDED], tl.float32)
    for chunk in tl.range(0, WIDTH, BLOCK_C, num_stages=STAGES):
        c = chunk + columns
        x = tl.load(base + c[None, :] * tokens_c, mask=(rows < num_tokens)[:, None] & (c < WIDTH)[None, :], other=0.0)
        x = tl.where((c < WIDTH)[None, :], x.to(tl.float32) - shift[:, None], 0.0)
        w = tl.load(v + c[:, None], mask=(query < NUM_QUERIES)[None, :] & (c < WIDTH)[:, None], other=0.0)
        total += tl.sum(x, axis=1)
        square += tl.sum(x * x, axis=1)
        product += tl.dot(x, w, input_precision="ieee")
        vector_total += tl.sum(w, axis=0)
    total /= WIDTH
    scale = tl.rsqrt(tl.maximum(square / WIDTH - total * total, 0.0) + eps)
    product = (product - total[:, None] * vector_total[None, :]) * scale[:, None]
    store_scores(products, batch, start, num_tokens, num_tokens, product, NUM_QUERIES, QUERIES_PADDED, BLOCK_N)
    tl.store(mean + batch * num_tokens + rows, shift + total, mask=rows < num_tokens)
    tl.store(inverse + batch * num_tokens + rows, scale, mask=rows < num_tokens)


@triton.jit
def attention_pool_weighted_sum_kernel(
    tokens, weights, mean, inverse, parts, num_tokens, tokens_per_split, tokens_b, tokens_n, tokens_c,
    WIDTH: tl.constexpr, NUM_QUERIES: tl.constexpr, QUERIES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, PADDED: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (b, split, chunk): sum_n a_mn LN(h_n) over its tokens into ``parts`` (B, splits, M, C) float32."""
    batch, split, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK_C
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    base, query = tokens + batch * tokens_b, tl.arange(0, QUERIES_PADDED)[None, :, None]
    sample = NUM_QUERIES * num_tokens  # elements of a sample in a contiguous (B, M, N)
    z = tl.zeros([QUERIES_PADDED, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_N)[:, None]
        rows = token[:, :, None]
        mu = tl.load(mean + batch * num_tokens + token, mask=token < end, other=0.0)
        scale = tl.load(inverse + batch * num_tokens + token, mask=token < end, other=0.0)
        a = load_scores(weights, batch, start, end, sample, num_tokens, 1, NUM_QUERIES, QUERIES_PADDED, BLOCK_N)
        a *= scale
        x = load_rows(base, rows, rows < end, tokens_n, tokens_c, chunk, BLOCK_C, WIDTH, PADDED, THREADS)
        x = subtract(x, mu, chunk, BLOCK_C, WIDTH, PADDED, THREADS)
        z += tl.sum(a[:, :, None] * x, axis=0)
    out = parts + (batch * tl.num_programs(1) + split) * NUM_QUERIES * WIDTH
    store_rows(out, query, query < NUM_QUERIES, WIDTH, 1, z[None], chunk, BLOCK_C, WIDTH, PADDED, THREADS)


@triton.jit
def attention_pool_two_pass_bwd_kernel(
    tokens, queries, grad_pooled, weights, grad_scores, mean, inverse, along, grad_tokens, grad_queries,
    num_tokens, tokens_per_split, tokens_b, tokens_n, tokens_c, grad_b, grad_n, grad_c,
    WIDTH: tl.constexpr, NUM_QUERIES: tl.constexpr, QUERIES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, PADDED: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (b, split, chunk): its piece of dh, and its part of dq, (B, splits, M, C) float32.

    As in :func:`hd_awd.pooling.kernels.one_pass.attention_pool_bwd_kernel`, with a, ds and mean_c(dx x) = ``along``
    (B, N) given. ``queries`` (M, C) and ``grad_pooled`` (B, M, C) are centred over channels, float32 contiguous;
    ``grad_tokens`` may be None.
    """
    batch, split, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK_C
    begin = split * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, num_tokens)
    base, query = tokens + batch * tokens_b, tl.arange(0, QUERIES_PADDED)[None, :, None]
    sample = NUM_QUERIES * num_tokens  # elements of a sample in a contiguous (B, M, N)
    if grad_tokens is not None:
        out = grad_tokens + batch * grad_b
        q = load_rows(queries, query, query < NUM_QUERIES, WIDTH, 1, chunk, BLOCK_C, WIDTH, PADDED, THREADS)
        dz = grad_pooled + batch * NUM_QUERIES * WIDTH
        dz = load_rows(dz, query, query < NUM_QUERIES, WIDTH, 1, chunk, BLOCK_C, WIDTH, PADDED, THREADS)
    dq = tl.zeros([QUERIES_PADDED, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_N)[:, None]
        rows = token[:, :, None]
        mu = tl.load(mean + batch * num_tokens + token, mask=token < end, other=0.0)
        scale = tl.load(inverse + batch * num_tokens + token, mask=token < end, other=0.0)
        ds = load_scores(grad_scores, batch, start, end, sample, num_tokens, 1, NUM_QUERIES, QUERIES_PADDED, BLOCK_N)
        ds *= scale
        x = load_rows(base, rows, rows < end, tokens_n, tokens_c, chunk, BLOCK_C, WIDTH, PADDED, THREADS)
        x = subtract(x, mu, chunk, BLOCK_C, WIDTH, PADDED, THREADS)
        dq += tl.sum(ds[:, :, None] * x, axis=0)
        if grad_tokens is not None:
            a = load_scores(weights, batch, start, end, sample, num_tokens, 1, NUM_QUERIES, QUERIES_PADDED, BLOCK_N)
            a *= scale
            k = tl.load(along + batch * num_tokens + token, mask=token < end, other=0.0) * scale * scale
            grad = tl.sum(a[:, :, None] * dz + ds[:, :, None] * q, axis=1)[:, None, :] - k[:, :, None] * x
            store_rows(out, rows, rows < end, grad_n, grad_c, grad, chunk, BLOCK_C, WIDTH, PADDED, THREADS)
    parts = grad_queries + (batch * tl.num_programs(1) + split) * NUM_QUERIES * WIDTH
    store_rows(parts, query, query < NUM_QUERIES, WIDTH, 1, dq[None], chunk, BLOCK_C, WIDTH, PADDED, THREADS)
