"""The kernels against the definition in float64, over shapes, dtypes and plans; every argument given or none."""

from __future__ import annotations

import itertools

import pytest
import torch
from awd_helpers import check, compute, launcher, make_case, planned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, N, C, M: a single token, rows shorter than any tile, N with a remainder, M with and without padding.
SMALL = [(2, 1, 5, 1), (2, 7, 5, 16), (2, 13, 1, 3), (2, 18, 64, 4), (2, 21, 72, 3), (2, 18, 130, 1)]
LARGE = [(2, 7, 130, 16), (2, 10, 384, 4), (2, 7, 1152, 4), (1, 5, 1152, 1)]
PLANS = {"one pass": (1, 1), "one pass, split": (1, 3), "two passes": (2, 1), "two passes, split": (2, 3)}


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [*((sizes, torch.float32) for sizes in SMALL + LARGE), *itertools.product([SMALL[4], LARGE[2]], DTYPES[1:])],
    ids=str,
)
def test_default_plan(device: str, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(make_case(sizes, dtype, device), scores=False)


@pytest.mark.parametrize(
    ("sizes", "plan"),
    [
        *itertools.product(SMALL, PLANS),
        *itertools.product(LARGE, ["one pass", "two passes"]),
        (LARGE[2], "one pass, split"),  # the merge takes its channels in two chunks
    ],
    ids=str,
)
def test_every_plan_with_every_argument(device: str, sizes: tuple[int, int, int, int], plan: str) -> None:
    case = make_case(sizes, torch.float32, device, bias=("B", "M", "N"), masked=True, weights=True)
    check(case, *planned(case, *PLANS[plan]))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sizes", [(2, 13, 72, 3)], ids=str)
def test_every_plan_in_half_precision(
    device: str,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    plan: str,
) -> None:
    case = make_case(sizes, dtype, device, bias=("M", "N"), masked=True, weights=True)
    check(case, *planned(case, *PLANS[plan]))


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_without_arguments(device: str, plan: str) -> None:
    case = make_case((2, 22, 130, 3), torch.float32, device)
    check(case, *planned(case, *PLANS[plan]), scores=False)


@pytest.mark.parametrize(
    ("sizes", "passes"),
    [
        ((1, 3, 1152, 8), (1, 2)),
        ((1, 3, 1280, 16), (2, 2)),  # rows of whole chunks
        ((1, 3, 2240, 16), (2, 2)),
        ((1, 3, 2240, 2), (1, 1)),
        ((1, 3, 4096, 1), (1, 1)),
        ((1, 3, 4096, 4), (1, 2)),
        ((1, 3, 4095, 16), (2, 2)),
    ],
    ids=str,
)
def test_long_rows_by_their_default_plan(
    device: str, sizes: tuple[int, int, int, int], passes: tuple[int, int]
) -> None:
    launch = launcher()
    case = make_case(sizes, torch.float32, device, bias=("N",), masked=True, weights=True)
    if device == "cpu":
        found = [launch._plan(direction, case.inputs, True).passes for direction in ("forward", "backward")]
        assert tuple(found) == passes
    check(case)


def test_default_plan_splits_a_long_sample(device: str) -> None:
    launch = launcher()
    case = make_case((1, 131, 40, 3), torch.float32, device, bias=("N",), masked=True, weights=True)
    assert launch._plan("forward", case.inputs, True).splits > 1
    assert launch._plan("backward", case.inputs, True).splits > 1
    check(case)


@pytest.mark.parametrize("num_queries", [2, 5, 8, 9, 15])
def test_numbers_of_queries(device: str, num_queries: int) -> None:
    case = make_case((2, 6, 24, num_queries), torch.float32, device, weights=True)
    check(case)
    check(case, *planned(case, 2))


def test_results_do_not_depend_on_the_plan(device: str) -> None:
    """Rounding apart: the oracle's tolerance would hide a small but steady difference between the paths."""
    case = make_case((2, 21, 72, 4), torch.float32, device, bias=("M", "N"), masked=True, weights=True)
    first, *others = (compute(case, *planned(case, *plan)) for plan in PLANS.values())
    for other in others:
        for name, value in first.items():
            scale = value[value.isfinite()].abs().max().item()
            torch.testing.assert_close(other[name], value, atol=3e-6 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
