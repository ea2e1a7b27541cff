"""How many bytes the kernels move: every load and store of the interpreter is counted and given to an argument."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from awd_helpers import Case, launcher, make_case, planned
from torch import Tensor

from hd_awd.pooling.inputs import Incoming
from hd_awd.pooling.kernels.plan import Plan
from hd_awd.pooling.kernels.traffic import bytes_moved

HALF_AND_FLOAT = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
DIRECTIONS = ("forward", "backward")

pytestmark = pytest.mark.usefixtures("interpreter")


class Traffic:
    """Bytes that the interpreter's kernels load and store, by (kernel, argument)."""

    def __init__(self) -> None:
        self._kernel, self._ranges = "", list[tuple[str, int, int]]()
        self.read: Counter[tuple[str, str]] = Counter()
        self.written: Counter[tuple[str, str]] = Counter()
        self.sizes: dict[tuple[str, str], int] = {}  # bytes of the argument
        self.outside = 0  # accesses that lie in no argument

    @property
    def total(self) -> tuple[int, int]:
        """Bytes read and bytes written by all kernels."""
        return self.read.total(), self.written.total()

    def of(self, argument: str) -> tuple[int, int]:
        """Bytes of that argument that all kernels read and wrote."""
        both = [sum(n for (_, name), n in one.items() if name == argument) for one in (self.read, self.written)]
        return both[0], both[1]

    def start(self, kernel: str, names: list[str], values: tuple[Any, ...]) -> None:
        self._kernel, self._ranges = kernel, []
        for name, value in zip(names, values, strict=False):
            if isinstance(value, Tensor) and value.numel():
                extent = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
                begin, self.sizes[kernel, name] = value.data_ptr(), value.numel() * value.element_size()
                self._ranges.append((name, begin, begin + extent * value.element_size()))

    def count(self, counter: Counter[tuple[str, str]], pointers: Any, mask: Any) -> None:
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        data, keep = np.broadcast_arrays(pointers.data, mask.data)
        addresses = data[keep.astype(bool)].astype(np.int64)
        for name, begin, end in self._ranges:
            inside = (addresses >= begin) & (addresses + itemsize <= end)
            if inside.any():
                counter[self._kernel, name] += int(inside.sum()) * itemsize
                addresses = addresses[~inside]
        self.outside += len(addresses)


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts from here on; the interpreter works on CPU tensors in place, so addresses tell which argument is meant."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    found, call, builder = Traffic(), GridExecutor.__call__, InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.start(self.fn.__name__, self.arg_names, args)
        return call(self, *args, **kwargs)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        found.count(found.read, pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        found.count(found.written, pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    with (
        mock.patch.object(GridExecutor, "__call__", counted_call),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
    ):
        yield found


def traffic_of(
    case: Case, direction: str, plan: Plan | None = None, *, tokens: bool = True, scores: bool = False
) -> Traffic:
    """Bytes of one direction of a case; ``tokens`` and ``scores`` say which gradients are wanted."""
    with counted() as traffic:
        if direction == "forward":
            launcher().pool_forward(case.inputs, case.grad_weights is not None, plan)
        else:
            lse, delta = torch.zeros(2, *case.grad_pooled.shape[:2])
            incoming = Incoming(case.grad_pooled, case.grad_weights, lse, delta, tokens, scores)
            launcher().pool_backward(case.inputs, incoming, plan)
    assert traffic.outside == 0, "an access that lies in no argument"
    return traffic


@HALF_AND_FLOAT
@pytest.mark.parametrize(("width", "num_queries"), [(5, 1), (72, 4), (384, 4), (1000, 2), (1152, 1), (1152, 4)])
def test_one_pass_reads_every_token_once(dtype: torch.dtype, width: int, num_queries: int) -> None:
    case = make_case((1, 13, width, num_queries), dtype)
    size = case.tokens.nbytes
    for direction in DIRECTIONS:
        assert launcher()._plan(direction, case.inputs, False).passes == 1
        traffic = traffic_of(case, direction)
        assert traffic.of("tokens") == (size, 0)
        assert traffic.of("grad_tokens") == (0, size if direction == "backward" else 0)


@HALF_AND_FLOAT
def test_all_traffic_of_a_batch_that_fills_the_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the default plan: beside the tokens M C float32 numbers of each sample, read once or written once each."""
    monkeypatch.setattr(launcher(), "_device_facts", lambda device: (32, 1))  # one processor: two samples fill it
    case = make_case((2, 70, 1152, 4), dtype)
    tokens, vectors, rows = case.tokens.nbytes, 2 * 4 * 1152 * 4, 2 * 4 * 4
    assert traffic_of(case, "forward").total == (tokens + vectors, vectors + rows)
    assert traffic_of(case, "backward").total == (tokens + 2 * vectors + 2 * rows, tokens + vectors)


@pytest.mark.parametrize(("passes", "splits"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((2, 13, 72, 3), torch.float32),
        ((3, 7, 5, 1), torch.bfloat16),
        ((1, 37, 300, 5), torch.float32),
        ((1, 6, 1100, 2), torch.bfloat16),
    ],
    ids=str,
)
def test_the_count_by_formula(
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    passes: int,
    splits: int,
) -> None:
    """What ``bytes_moved`` says is what the interpreter counts, with and without the tokens' gradient."""
    case = make_case(sizes, dtype)
    for direction, plan in zip(DIRECTIONS, planned(case, passes, splits), strict=True):
        for tokens in (True, False):
            expected = bytes_moved(direction, plan, *sizes, dtype.itemsize, want_tokens=tokens)
            traffic = traffic_of(case, direction, plan, tokens=tokens)
            assert (traffic.of("tokens")[0], *traffic.total) == (expected.tokens, expected.read, expected.written)


@pytest.mark.parametrize("splits", [1, 3])
def test_splitting_a_sample_reads_no_token_twice(splits: int) -> None:
    case = make_case((2, 11, 72, 3))
    for direction, plan in zip(DIRECTIONS, planned(case, 1, splits), strict=True):
        assert plan.splits == splits
        traffic = traffic_of(case, direction, plan)
        assert traffic.of("tokens")[0] == case.tokens.nbytes
        assert traffic.of("queries")[0] == 2 * splits * case.queries.nbytes
        assert traffic.of("grad_tokens")[1] == (case.tokens.nbytes if direction == "backward" else 0)


@HALF_AND_FLOAT
@pytest.mark.parametrize(("width", "num_queries"), [(72, 3), (640, 16), (1152, 4), (1408, 16)])
def test_two_passes_read_every_token_twice(dtype: torch.dtype, width: int, num_queries: int) -> None:
    """And its first 16 channels once more, for an estimate of its mean: 2.1 times at most from 160 channels."""
    case = make_case((1, 5, width, num_queries), dtype)
    size = case.tokens.nbytes
    for direction, plan in zip(DIRECTIONS, planned(case, 2), strict=True):
        traffic = traffic_of(case, direction, plan)
        assert traffic.of("tokens") == (2 * size + 16 * size // width, 0)
        assert traffic.of("grad_tokens") == (0, size if direction == "backward" else 0)


@pytest.mark.parametrize(("passes", "splits"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("sizes", [(2, 13, 72, 3), (2, 7, 1, 1), (1, 5, 300, 5)], ids=str)
def test_every_output_is_written_once_and_nothing_else(
    sizes: tuple[int, int, int, int], passes: int, splits: int
) -> None:
    case = make_case(sizes, bias=("M", "N"), masked=True, weights=True)
    for direction, plan in zip(DIRECTIONS, planned(case, passes, splits), strict=True):
        traffic = traffic_of(case, direction, plan, scores=True)
        given = {"tokens", "queries", "bias", "mask", "grad_pooled", "grad_weights"}
        assert traffic.written
        for key, written in traffic.written.items():
            assert key[1] not in given
            assert written == traffic.sizes[key], key


def test_a_mask_and_a_bias_are_read_once() -> None:
    case = make_case((2, 13, 72, 3), bias=("B", "M", "N"), masked=True, weights=True)
    for direction, plan in zip(DIRECTIONS, planned(case, 1, 3), strict=True):
        traffic = traffic_of(case, direction, plan, scores=True)
        assert traffic.of("bias") == (case.bias.nbytes, 0)
        assert traffic.of("mask") == (case.mask.nbytes, 0)
        assert traffic.of("grad_weights")[0] == (case.grad_weights.nbytes if direction == "backward" else 0)


@pytest.mark.parametrize("passes", [1, 2])
def test_traffic_does_not_depend_on_the_values(passes: int) -> None:
    case = make_case((2, 9, 40, 3), masked=True)
    other = dataclasses.replace(case, tokens=torch.zeros_like(case.tokens), mask=torch.zeros_like(case.mask))
    for direction, plan in zip(DIRECTIONS, planned(case, passes, 2), strict=True):
        counts = [(dict(t.read), dict(t.written)) for t in (traffic_of(one, direction, plan) for one in (case, other))]
        assert counts[0] == counts[1]


def test_an_access_outside_an_argument_is_noticed() -> None:
    """The counter itself: the kernel is told of 8 channels, and its output is the first 5 of a longer buffer."""
    parts, pooled = torch.zeros(2, 8), torch.zeros(8)[:5]
    merge = launcher().one_pass.attention_pool_merge_kernel[(1, 1)]
    with counted() as traffic:
        merge(parts, torch.zeros(2), pooled, torch.zeros(1), 2, NUM_QUERIES=1, WIDTH=8, BLOCK_C=16)
    assert traffic.of("parts") == (parts.nbytes, 0)
    assert traffic.of("pooled") == (0, pooled.nbytes)
    assert traffic.outside == 3
