"""The kernels against the definition, at sizes, arguments and plans that nobody chose."""

from __future__ import annotations

import dataclasses

import torch
from awd_helpers import Case, check, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hd_awd.pooling.kernels.plan import Plan

BIASES = [None, (), ("N",), ("M", 1), ("B", 1, "N"), ("B", "M", "N")]
LAYOUTS = ["contiguous", "tokens first", "channels first", "sliced"]


def few(examples: int) -> settings:
    """So many examples, the same in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


def row(width: int, threads: int) -> st.SearchStrategy[tuple[int, int]]:
    """head and tail: powers of two, a channel for every thread, that together cover the row; a tail may be missing."""
    sizes = [threads << shift for shift in range(8)]
    covers = [(head, tail) for head in sizes for tail in [0, *sizes] if tail < head < 4 * width + 4 * threads]
    return st.sampled_from(
        [(head, tail) for head, tail in covers if head + tail >= width and (tail == 0 or head < width)]
    )


def a_plan(data: st.DataObject, case: Case, direction: str) -> Plan:
    _, num_tokens, width, num_queries = case.sizes

    def pick(name: str, options: list[int]) -> int:
        return data.draw(st.sampled_from(options), label=f"{direction} {name}")

    passes, warps = pick("passes", [1, 2]), pick("warps", [1, 2, 4])
    # On a GPU the tile and the state stay small enough to be compiled in reasonable time.
    block_n = pick("block_n", [1, 2, 4, 8] if num_queries <= 4 else [1, 2])
    if passes == 1:
        head, tail = data.draw(row(width, 64 * warps), label=f"{direction} head, tail")
    else:
        head, tail = 64 * warps * pick("chunk", [1, 2]), 0
    each = data.draw(st.integers(1, num_tokens), label=f"{direction} tokens per split")
    return Plan(passes, block_n, head, tail, warps, pick("stages", [1, 2, 3]), each, -(-num_tokens // each))


@few(12)
@given(data=st.data())
def test_any_call_with_any_plan(device: str, data: st.DataObject) -> None:
    def draw(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    sizes = (draw("B", 1, 3), draw("N", 1, 16), draw("C", 1, 150), draw("M", 1, 16))
    case = make_case(
        sizes,
        data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype"),
        device,
        bias=data.draw(st.sampled_from(BIASES), label="bias"),
        masked=data.draw(st.booleans(), label="masked"),
        weights=data.draw(st.booleans(), label="weights"),
        layout=data.draw(st.sampled_from(LAYOUTS), label="layout"),
        eps=data.draw(st.sampled_from([1e-5, 1e-2]), label="eps"),
        seed=draw("seed", 0, 2**31),
    )
    plans = [a_plan(data, case, direction) for direction in ("forward", "backward")]
    if data.draw(st.booleans(), label="only some samples have tokens") and case.mask is not None:
        case = dataclasses.replace(case, mask=case.mask & (torch.arange(sizes[0], device=device) % 2 == 1)[:, None])
    check(case, *plans, scores=data.draw(st.booleans(), label="scores"))


@few(4)
@given(data=st.data())
def test_any_call_with_its_own_plan(device: str, data: st.DataObject) -> None:
    sizes = tuple(
        data.draw(st.integers(1, most), label=name) for name, most in zip("BNCM", (3, 70, 150, 16), strict=True)
    )
    weights = data.draw(st.booleans(), label="weights")
    bias = data.draw(st.sampled_from(BIASES), label="bias")
    check(make_case(sizes, device=device, masked=True, weights=weights, bias=bias, seed=data.draw(st.integers(0, 99))))


@few(4)
@given(data=st.data())
def test_long_rows_with_their_own_plan(device: str, data: st.DataObject) -> None:
    limits = {"B": (1, 2), "N": (1, 9), "C": (513, 4096), "M": (1, 16)}
    sizes = tuple(data.draw(st.integers(*limits[name]), label=name) for name in "BNCM")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    check(make_case(sizes, dtype, device, masked=True, bias=data.draw(st.sampled_from(BIASES), label="bias")))
