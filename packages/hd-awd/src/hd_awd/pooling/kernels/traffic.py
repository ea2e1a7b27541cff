"""How many bytes a plan moves between memory and the kernels. Needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass

from hd_awd.pooling.kernels.plan import TWO_PASS, Plan, power_of_two

MERGE_C = 1024  # channels of a program that merges splits
FLOAT = 4  # bytes of everything but tokens and their gradient


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call, every load and store of every program counted, in a cache or not.

    Attributes:
        tokens: read of the tokens.
        read: read in all: tokens, queries, incoming gradients, partial sums.
        written: written in all.
    """

    tokens: int
    read: int
    written: int


def bytes_moved(
    direction: str,
    plan: Plan,
    batch: int,
    num_tokens: int,
    width: int,
    num_queries: int,
    itemsize: int,
    *,
    want_tokens: bool = True,
) -> Traffic:
    """What the kernels move for B = batch >= 1, N = num_tokens, C = width, M = num_queries.

    That is without a bias, a mask and weights.
    PyTorch's own operations are not in it: the sum over the programs' parts of the queries' gradient, which reads each
    part once more, and with two passes the softmax, and the sum of pooled parts where a sample is split.

    Args:
        direction: "forward" or "backward".
        plan: from :func:`hd_awd.pooling.kernels.plan.make_plan`.
        itemsize: bytes of a number in the tokens.
        want_tokens: whether the backward pass writes the tokens' gradient.
    """
    tokens, programs = batch * num_tokens * width * itemsize, batch * plan.splits
    state, scores = num_queries * width * FLOAT, num_queries * num_tokens * FLOAT  # of a sample
    gradient = tokens if direction == "backward" and want_tokens else 0
    if plan.passes == 1 and direction == "backward":
        return Traffic(tokens, tokens + programs * (2 * state + 2 * num_queries * FLOAT), gradient + programs * state)
    if plan.passes == 1:
        read, written = tokens + programs * state, programs * (state + num_queries * FLOAT)
        if plan.splits > 1:
            # Each program of the merge reads the parts' log-sum-exp twice: for the largest, then for the sum.
            chunks = -(-width // min(MERGE_C, power_of_two(width)))
            read += programs * (state + 2 * chunks * num_queries * FLOAT)
            written += batch * (state + num_queries * FLOAT)
        return Traffic(tokens, read, written)
    # Two passes: products of every token, its mean and 1 / sigma; then sums, a chunk of channels at a time.
    vectors = 1 if direction == "forward" else 2
    first = batch * num_tokens * min(TWO_PASS["project_first"], width) * itemsize
    read = 2 * tokens + first + batch * -(-num_tokens // TWO_PASS["project_n"]) * vectors * state
    written = batch * (vectors * scores + 2 * num_tokens * FLOAT) + gradient + programs * state
    chunks = -(-width // plan.row_head)
    per_token = 3 if gradient else 2  # mean, 1 / sigma, and what the gradient takes out along the token
    weighings = 2 if gradient else 1
    read += batch * chunks * (weighings * scores + per_token * num_tokens * FLOAT)
    read += programs * 2 * state if gradient else 0
    return Traffic(2 * tokens + first, read, written)
