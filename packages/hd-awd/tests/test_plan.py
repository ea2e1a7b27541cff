"""The choice of kernel, tile and grid, over every kind of shape. Needs no Triton."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest

from hd_awd.pooling.kernels.plan import STAGES, TILE_BYTES, TWO_PASS, make_plan, power_of_two
from hd_awd.pooling.kernels.traffic import bytes_moved

EDGES = [power + step for power in (2**k for k in range(5, 13)) for step in (-1, 0, 1) if 1 <= power + step <= 4096]
WIDTHS = sorted({*EDGES, *range(1, 12), 72, 130, 320, 384, 640, 768, 1000, 1152, 1408, 1536, 2240, 3000, 3072, 3073})
NUM_QUERIES = range(1, 17)
SAMPLES = [(1, 1), (1, 31), (1, 64), (1, 1023), (1, 65536), (3, 257), (16, 256), (16, 1024), (300, 4096)]
TARGETS = [(32, 8), (32, 132), (64, 304)]  # lanes and processors

DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "backward"])
ITEMSIZES = pytest.mark.parametrize("itemsize", [2, 4])
LANES = pytest.mark.parametrize("lanes", [32, 64])


def is_power_of_two(value: int) -> bool:
    return value >= 1 and value & (value - 1) == 0


def test_power_of_two() -> None:
    for value in range(1, 5000):
        found = power_of_two(value)
        assert is_power_of_two(found)
        assert found // 2 < value <= found


@DIRECTIONS
@ITEMSIZES
@LANES
def test_a_tile_covers_the_row_and_fills_the_warps(direction: str, itemsize: int, lanes: int) -> None:
    for width, num_queries in itertools.product(WIDTHS, NUM_QUERIES):
        plan = make_plan(direction, 4, 256, width, num_queries, itemsize, lanes=lanes)
        threads = lanes * plan.warps
        case = f"C = {width}, M = {num_queries}: {plan}"
        assert is_power_of_two(plan.row_head) and (plan.row_tail == 0 or is_power_of_two(plan.row_tail)), case  # noqa: PT018
        assert is_power_of_two(plan.block_n), case
        assert is_power_of_two(plan.warps), case
        assert plan.row_head % threads == 0, f"a thread without a channel: {case}"
        assert plan.row_tail % threads == 0, f"a thread without a channel: {case}"
        assert plan.warps <= 16, case
        assert threads <= 512, case
        assert plan.stages == STAGES[lanes], case
        if plan.passes == 1:
            assert plan.row_head + plan.row_tail >= width, case
            assert plan.row_tail < plan.row_head, case
            # No channel too many that a smaller tail, or none, would have saved.
            assert plan.row_tail == 0 or plan.row_head < width, case
            assert plan.row_head + plan.row_tail < 2 * max(width, threads), case
        else:
            assert plan.passes == 2, case
            assert plan.row_tail == 0, case
            assert plan.row_head == max(TWO_PASS["block_c"], threads), case


@DIRECTIONS
@ITEMSIZES
@LANES
def test_tiles_in_flight_fit_into_shared_memory(direction: str, itemsize: int, lanes: int) -> None:
    """Padding included."""
    for width, num_queries in itertools.product(range(1, 4097, 5), (1, 3, 4, 8, 16)):
        plan = make_plan(direction, 4, 256, width, num_queries, itemsize, lanes=lanes)
        size = plan.stages * plan.block_n * (plan.row_head + plan.row_tail) * itemsize
        assert size <= TILE_BYTES, (width, plan)


@DIRECTIONS
@ITEMSIZES
@LANES
@pytest.mark.parametrize("extras", [False, True])
def test_up_to_1152_channels_and_4_queries_take_one_pass(
    direction: str, itemsize: int, lanes: int, extras: bool
) -> None:
    for width, num_queries in itertools.product(range(1, 1153), (1, 2, 3, 4)):
        plan = make_plan(direction, 16, 256, width, num_queries, itemsize, extras=extras, lanes=lanes)
        assert plan.passes == 1, (width, num_queries)


@DIRECTIONS
@ITEMSIZES
def test_a_bias_or_a_mask_leaves_registers_for_itself(direction: str, itemsize: int) -> None:
    """At 768 channels of 16 bits and 4 queries, where few are left; elsewhere never fewer passes."""
    for width, num_queries in itertools.product(WIDTHS, NUM_QUERIES):
        plain, extra = (
            make_plan(direction, 16, 256, width, num_queries, itemsize, extras=extras) for extras in (False, True)
        )
        assert extra.passes >= plain.passes, (width, num_queries)
        if (width, num_queries, itemsize) == (768, 4, 2):
            rows = [(plan.row_head + plan.row_tail) / plan.warps for plan in (plain, extra)]
            held = [(num_queries + plan.block_n) * row for plan, row in zip((plain, extra), rows, strict=True)]
            assert held[1] < held[0]


@DIRECTIONS
@ITEMSIZES
@LANES
def test_a_longer_row_never_takes_fewer_passes(direction: str, itemsize: int, lanes: int) -> None:
    """Of rows that are multiples of 16 channels; others count for a little more."""
    for num_queries in (1, 4, 5, 8, 9, 16):
        passes = [
            make_plan(direction, 4, 256, width, num_queries, itemsize, lanes=lanes).passes
            for width in range(16, 4097, 16)
        ]
        assert passes == sorted(passes), num_queries


@DIRECTIONS
@pytest.mark.parametrize("lanes", [32, 64])
def test_the_largest_state_takes_two_passes(direction: str, lanes: int) -> None:
    """Otherwise the other kernels would never be chosen."""
    assert make_plan(direction, 16, 256, 4096, 16, 4, lanes=lanes).passes == 2


@DIRECTIONS
@ITEMSIZES
def test_splits_share_out_every_token_once(direction: str, itemsize: int) -> None:
    for (lanes, processors), (batch, num_tokens), width, num_queries in itertools.product(
        TARGETS, SAMPLES, (5, 72, 384, 1152, 2240, 4096), (1, 4, 16)
    ):
        plan = make_plan(direction, batch, num_tokens, width, num_queries, itemsize, lanes=lanes, processors=processors)
        case = f"B = {batch}, N = {num_tokens}, C = {width}, M = {num_queries}: {plan}"
        assert plan.splits >= 1, case
        assert plan.splits * plan.tokens_per_split >= num_tokens, f"a token without a program: {case}"
        assert (plan.splits - 1) * plan.tokens_per_split < num_tokens, f"a program without a token: {case}"
        assert plan.tokens_per_split % plan.block_n == 0, f"a tile that crosses a split's end: {case}"
        if plan.splits > 1:
            assert plan.tokens_per_split >= 32, f"a program for too few tokens: {case}"


@DIRECTIONS
def test_a_small_batch_is_split_until_the_device_is_busy(direction: str) -> None:
    def programs(batch: int, num_tokens: int, processors: int) -> int:
        return batch * make_plan(direction, batch, num_tokens, 768, 2, 2, processors=processors).splits

    for processors in (8, 100, 132):
        assert programs(1, 65536, processors) >= 1.5 * processors
        assert programs(1, 65536, processors) <= 2 * processors + 1
        assert programs(8 * processors, 4096, processors) == 8 * processors
    assert programs(1, 1024, 132) > 16
    assert programs(1, 63, 132) == 1


@DIRECTIONS
@ITEMSIZES
def test_a_choice_does_not_depend_on_the_batch(direction: str, itemsize: int) -> None:
    """Only the number of splits does: the kernels that are compiled are the same for every batch."""

    def compiled(batch: int, num_tokens: int, width: int, num_queries: int) -> dict[str, Any]:
        plan = asdict(make_plan(direction, batch, num_tokens, width, num_queries, itemsize))
        return {name: value for name, value in plan.items() if name not in ("splits", "tokens_per_split")}

    for width, num_queries in itertools.product(WIDTHS, NUM_QUERIES):
        one, *others = (compiled(*sizes, width, num_queries) for sizes in ((1, 1), (1, 5000), (300, 256)))
        assert all(other == one for other in others), (width, num_queries)


@DIRECTIONS
def test_more_queries_never_take_fewer_passes(direction: str) -> None:
    for width, itemsize in itertools.product(WIDTHS, (2, 4)):
        passes = [make_plan(direction, 4, 256, width, num_queries, itemsize).passes for num_queries in NUM_QUERIES]
        assert passes == sorted(passes), width


def test_the_same_inputs_give_the_same_plan() -> None:
    for width, num_queries in itertools.product((5, 384, 1152, 4096), (1, 4, 16)):
        first, second = (make_plan("backward", 3, 200, width, num_queries, 2) for _ in range(2))
        assert first == second
        assert hash(first) == hash(second)
    with pytest.raises(FrozenInstanceError):
        first.splits = 2


def test_an_uneven_row_leaves_registers_for_its_addresses() -> None:
    """72 channels take the same row of registers as 80, and a smaller tile."""
    uneven, even = (make_plan("forward", 4, 256, width, 4, 2) for width in (72, 80))
    assert (uneven.warps, uneven.row_head, uneven.row_tail) == (even.warps, even.row_head, even.row_tail)
    assert uneven.block_n < even.block_n


@ITEMSIZES
@pytest.mark.parametrize(("lanes", "processors"), [(32, 108), (32, 132), (32, 148), (32, 170), (64, 304)])
def test_bytes_of_every_row_of_one_pass(itemsize: int, lanes: int, processors: int) -> None:
    """Up to 1,152 channels and 4 queries tokens are read once; from 256 tokens and a sample for each processor on all
    that is read, written or read again is next to nothing beside them."""
    for width, num_queries, batch in itertools.product(WIDTHS, (1, 2, 3, 4), (1, 16, processors + 1)):
        if width > 1152:
            continue
        tokens, sizes = batch * 256 * width * itemsize, (batch, 256, width, num_queries, itemsize)
        forward, backward = (
            bytes_moved(direction, make_plan(direction, *sizes, lanes=lanes, processors=processors), *sizes)
            for direction in ("forward", "backward")
        )
        assert forward.tokens == backward.tokens == tokens
        if batch > processors and width >= 8:  # below, a row's own log-sum-exp counts
            assert forward.read <= 1.05 * tokens
            assert backward.read <= 1.1 * tokens
            assert backward.written <= 1.05 * tokens
