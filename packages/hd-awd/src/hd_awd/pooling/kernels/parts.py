"""What all kernels share: how a row of C channels lies over the threads, and how it is read.

Every tile is three-dimensional, (BLOCK_N tokens, QUERIES_PADDED, channels), also where one of the first two is 1:
then one register layout serves loads, products and sums, and nothing is exchanged through shared memory but the
results of the sums over channels. A row (the channels of a token) is held in two parts, ROW_HEAD + ROW_TAIL channels,
both powers of two (1,152 = 1,024 + 128), so that few registers are spent on padding; ROW_TAIL is 0 where ROW_HEAD
covers the row. NUM_QUERIES is M, QUERIES_PADDED the power of two from it on.
"""

import triton
import triton.language as tl


@triton.jit
def channels(START, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Indices START .. START + SIZE - 1 as (1, 1, SIZE).

    The hint gives every thread SIZE / THREADS neighbours: all warps lie along the channels, so that a sum over
    tokens stays within a thread.
    """
    return START + tl.max_contiguous(tl.arange(0, SIZE), SIZE // THREADS)[None, None, :]


@triton.jit
def load_rows(
    base, rows, valid, stride_n, stride_c, START,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """rows and valid (R, 1, 1) or (1, R, 1) -> float32 (R, 1, SIZE) or (1, R, SIZE), zero outside.

    PADDED says whether channels START .. START + SIZE - 1 may pass WIDTH.
    """
    columns = channels(START, SIZE, THREADS)
    inside = valid
    if PADDED:
        inside = valid & (columns < WIDTH)
    return tl.load(base + rows * stride_n + columns * stride_c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(
    base, rows, valid, stride_n, stride_c, values, START,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The counterpart of load; values are cast to base's dtype."""
    columns = channels(START, SIZE, THREADS)
    inside = valid
    if PADDED:
        inside = valid & (columns < WIDTH)
    tl.store(base + rows * stride_n + columns * stride_c, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def subtract(part, shift, START, SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, THREADS: tl.constexpr):
    """part (., ., SIZE) - shift (., .); channels beyond WIDTH become zero."""
    part -= shift[:, :, None]
    if PADDED:
        part = tl.where(channels(START, SIZE, THREADS) < WIDTH, part, 0.0)
    return part


@triton.jit
def load_scores(
    base, batch, begin, end, stride_b, stride_m, stride_n,
    NUM_QUERIES: tl.constexpr, QUERIES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(B, M, N) values of tokens begin .. begin + BLOCK_N - 1 as float32 (BLOCK_N, QUERIES_PADDED); zero outside."""
    rows = begin + tl.arange(0, BLOCK_N)[:, None]
    query = tl.arange(0, QUERIES_PADDED)[None, :]
    inside = (rows < end) & (query < NUM_QUERIES)
    return tl.load(base + batch * stride_b + query * stride_m + rows * stride_n, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_scores(
    base, batch, begin, end, num_tokens, values,
    NUM_QUERIES: tl.constexpr, QUERIES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """values (BLOCK_N, QUERIES_PADDED) -> a contiguous (B, M, N)."""
    rows = begin + tl.arange(0, BLOCK_N)[:, None]
    query = tl.arange(0, QUERIES_PADDED)[None, :]
    inside = (rows < end) & (query < NUM_QUERIES)
    tl.store(base + (batch * NUM_QUERIES + query) * num_tokens + rows, values, mask=inside)


@triton.jit
def allowed(mask, batch, begin, end, stride_b, stride_n, BLOCK_N: tl.constexpr):
    """Which of the tokens begin .. begin + BLOCK_N - 1 take part, (BLOCK_N, 1); ``mask`` (B, N) may be None."""
    rows = begin + tl.arange(0, BLOCK_N)[:, None]
    inside = rows < end
    if mask is not None:
        inside = tl.load(mask + batch * stride_b + rows * stride_n, mask=inside, other=0) != 0
    return inside
