"""What the kernels are given: masks, biases of every broadcast shape, strides, offsets, scales, empty batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from awd_helpers import check, compute, launcher, make_case, planned

from hd_awd.pooling.inputs import Incoming

SIZES = (3, 11, 40, 3)
BIASES = [(), ("N",), ("M", 1), ("B", 1, 1), ("B", "M", "N")]  # which strides are zero
PASSES = pytest.mark.parametrize("passes", [1, 2])


@PASSES
@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_bias(device: str, passes: int, bias: tuple[Any, ...]) -> None:
    case = make_case(SIZES, device=device, bias=bias)
    check(case, *planned(case, passes))


@PASSES
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mask_alone(device: str, passes: int, splits: int, dtype: torch.dtype) -> None:
    case = make_case(SIZES, dtype, device, masked=True)
    check(case, *planned(case, passes, splits))


@PASSES
def test_a_split_without_a_token(device: str, passes: int) -> None:
    """Whole splits are masked: the first, one in the middle, the last, all."""
    case = make_case((5, 16, 24, 3), device=device, bias=("N",), weights=True)
    mask = torch.ones(5, 4, 4, dtype=torch.bool)
    mask[0, 0] = mask[1, 2] = mask[2, 3] = mask[3, :3] = mask[4] = False
    case = dataclasses.replace(case, mask=mask.reshape(5, 16).to(device))
    plans = planned(case, passes, 4, block_n=4)
    assert all(plan.splits == 4 for plan in plans)
    check(case, *plans)


@PASSES
def test_a_bias_of_minus_infinity_is_a_mask(device: str, passes: int) -> None:
    """At single tokens, in a whole split, in a whole sample; for one query alone."""
    case = make_case((3, 16, 24, 3), device=device, masked=True, weights=True)
    case.mask[0, :4] = False
    infinite = torch.zeros(3, 1, 16, device=device).masked_fill(~case.mask[:, None], float("-inf"))
    plans = planned(case, passes, 4, block_n=4)
    by_mask, by_bias = compute(case, *plans), compute(dataclasses.replace(case, bias=infinite, mask=None), *plans)
    assert all(torch.equal(value, by_bias[name]) for name, value in by_mask.items())


@PASSES
def test_a_sample_without_a_token_is_exactly_zero(device: str, passes: int) -> None:
    case = make_case(SIZES, device=device, masked=True, weights=True)
    found = compute(case, *planned(case, passes, 2))
    assert torch.all(found["lse"][-1] == float("inf"))
    for name in ("pooled", "weights", "grad_tokens", "grad_scores"):
        assert torch.all(found[name][-1] == 0), name
    masked = ~case.mask[0]
    assert torch.all(found["grad_tokens"][0, masked] == 0)
    assert torch.all(found["weights"][0, :, masked] == 0)


@PASSES
@pytest.mark.parametrize("layout", ["tokens first", "channels first", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(device: str, passes: int, layout: str, dtype: torch.dtype) -> None:
    """A slice has NaN on all sides: an index that is off by one is seen in the result."""
    case = make_case(SIZES, dtype, device, bias=("B", "M", "N"), masked=True, weights=True, layout=layout)
    assert not case.tokens.is_contiguous()
    assert case.tokens.isfinite().all()
    twisted = {
        "bias": case.full_bias.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "mask": case.mask.T.contiguous().T,
        "grad_weights": case.grad_weights.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }
    check(dataclasses.replace(case, **twisted), *planned(case, passes, 2))


@PASSES
def test_strides_of_a_longer_row(device: str, passes: int) -> None:
    """A row in two parts: their second part is strided too."""
    case = make_case((2, 5, 72, 3), device=device, layout="sliced")
    check(case, *planned(case, passes))


@PASSES
@pytest.mark.parametrize("offset", [1e2, 1e3])
def test_a_large_mean_costs_digits_in_proportion(device: str, passes: int, offset: float) -> None:
    """A token 1e3 sigma from zero is stored to 6e-5 sigma; the mean is taken out before anything is squared."""
    case = make_case((2, 9, 130, 4), device=device, offset=offset, weights=True)
    check(case, *planned(case, passes), scale=offset / 10)


@PASSES
@pytest.mark.parametrize("width", [130, 1152])
def test_queries_far_from_zero_cost_no_digits(device: str, passes: int, width: int) -> None:
    """A query's mean has no effect on a normalised token: it is taken out before the products."""
    case = make_case((1, 6, width, 3), device=device, weights=True)
    case = dataclasses.replace(case, queries=case.queries + 10)
    check(case, *planned(case, passes))


@PASSES
@pytest.mark.parametrize("eps", [1e-5, 0.5, 30.0])
def test_eps_counts_beside_the_variance(device: str, passes: int, eps: float) -> None:
    case = make_case(SIZES, device=device, eps=eps)
    check(case, *planned(case, passes))


@PASSES
def test_constant_tokens_stay_finite(device: str, passes: int) -> None:
    case = make_case((2, 5, 40, 3), device=device, eps=1e-6)
    case = dataclasses.replace(case, tokens=torch.full_like(case.tokens, 3.0))
    found = compute(case, *planned(case, passes))
    assert torch.all(found["pooled"] == 0)
    assert all(value.isfinite().all() for value in found.values())


@PASSES
@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_scores_far_from_zero_do_not_overflow(device: str, passes: int, shift: float) -> None:
    case = make_case(SIZES, device=device, bias=("B", "M", "N"), weights=True)
    check(dataclasses.replace(case, bias=case.bias + shift), *planned(case, passes, 3), scale=10)


def test_scores_may_fall_and_rise_over_the_tiles(device: str) -> None:
    """The running maximum: it moves with every tile, or it is found at once and stays."""
    case = make_case((2, 24, 40, 3), device=device, bias=("B", "M", "N"), weights=True)
    ramp = torch.linspace(-60, 60, 24, device=device)
    bias = torch.stack([ramp, -ramp])[:, None].expand(2, 3, 24)
    check(dataclasses.replace(case, bias=bias), *planned(case, 1, 1, block_n=4), scale=4)


@PASSES
def test_large_queries_pick_one_token(device: str, passes: int) -> None:
    case = make_case(SIZES, device=device)
    check(dataclasses.replace(case, queries=15 * case.queries), *planned(case, passes), scale=15)


@pytest.mark.parametrize("scores", [False, True])
def test_no_sample_at_all(device: str, scores: bool) -> None:
    case = make_case((0, 5, 24, 3), device=device, weights=True)
    found = compute(case, scores=scores)
    assert torch.all(found["grad_queries"] == 0)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "pooled": (0, 3, 24), "lse": (0, 3), "weights": (0, 3, 5), "grad_tokens": (0, 5, 24), "grad_queries": (3, 24),
        **({"grad_scores": (0, 3, 5)} if scores else {}),
    }  # fmt: skip


def test_a_sample_out_of_reach_of_32_bits_is_copied() -> None:
    """Without memory: what counts are the strides."""
    pytest.importorskip("triton", reason="Triton is not installed")
    reach = 2**31 - 1
    for strides, copied in (((1, reach - 2, 1), False), ((1, reach - 1, 1), True), ((1, 1, reach // 2 + 1), True)):
        tokens = torch.empty_strided((2, 2, 3), strides, device="meta")
        assert (launcher()._reachable(tokens) is tokens) != copied
        assert launcher()._reachable(tokens).is_contiguous() == copied


@pytest.mark.parametrize("layout", ["sliced", "tokens first", "channels first"])
def test_a_copy_for_reach_changes_nothing(device: str, layout: str, monkeypatch: Any) -> None:
    """The kernels get contiguous memory to read and to write, the caller the layout that the shape function names."""
    launch = launcher()
    case = make_case(SIZES, device=device, bias=("M", "N"), masked=True, layout=layout)
    case = dataclasses.replace(case, mask=case.mask.T.contiguous().T)
    strides: list[tuple[int, ...]] = []
    original = launch._strides

    def noted(tensor: Any, dimensions: int) -> tuple[int, ...]:
        strides.append(original(tensor, dimensions))
        return strides[-1]

    monkeypatch.setattr(launch, "_strides", noted)
    for passes in (1, 2):
        monkeypatch.setattr(launch, "OFFSETS", 10)
        check(case, *planned(case, passes))
        found = compute(case, *planned(case, passes))["grad_tokens"]
        assert found.stride() == torch.empty_like(case.tokens).stride()
    contiguous = {torch.empty(size).stride() for size in ((3, 11, 40), (3, 3, 11), (3, 11))}
    assert set(strides) <= contiguous


@PASSES
def test_what_autograd_hands_over_may_have_any_strides(device: str, passes: int) -> None:
    launch = launcher()
    case = make_case(SIZES, device=device)
    plan = planned(case, passes)[1]
    lse, delta = torch.randn(2, 3, 3, device=device) + 4
    found = [
        launch.pool_backward(case.inputs, Incoming(case.grad_pooled, None, *both, True, True), plan)
        for both in ((lse, delta), (lse.T.contiguous().T, delta.T.contiguous().T))
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_inputs_are_left_alone(device: str) -> None:
    case = make_case(SIZES, device=device, bias=("B", "M", "N"), masked=True, weights=True)
    before = {name: getattr(case, name).clone() for name in ("tokens", "queries", "bias", "mask", "grad_weights")}
    for passes in (1, 2):
        compute(case, *planned(case, passes, 2))
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value), name
