"""Poisoned memory, and results that are bitwise the same: from run to run, and whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from awd_helpers import compute, make_case, planned

PLANS = pytest.mark.parametrize(("passes", "splits"), [(1, 1), (1, 3), (2, 1), (2, 3)])


def test_fresh_memory_is_poisoned(device: str) -> None:
    like = torch.zeros(4, device=device)
    for fresh in (torch.empty(4, device=device), like.new_empty(4), torch.empty_like(like)):
        assert fresh.isnan().all()
    assert torch.empty(4, dtype=torch.bfloat16, device=device).isnan().all()


@PLANS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_agree_bitwise(device: str, passes: int, splits: int, dtype: torch.dtype) -> None:
    case = make_case((2, 14, 72, 3), dtype, device, bias=("M", "N"), masked=True, weights=True)
    plans = planned(case, passes, splits)
    first, second = (compute(case, *plans) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@PLANS
def test_a_sample_does_not_depend_on_its_neighbours(device: str, passes: int, splits: int) -> None:
    case = make_case((3, 14, 72, 3), device=device, bias=("B", "M", "N"), masked=True, weights=True)
    plans = planned(case, passes, splits)
    together = compute(case, *plans)
    for index in range(3):
        alone = compute(case.sample(index), *plans)
        for name, value in alone.items():
            if name != "grad_queries":  # a sum over the batch
                assert torch.equal(value[0], together[name][index]), name


def test_the_queries_gradient_is_the_sum_over_samples(device: str) -> None:
    case = make_case((3, 14, 72, 3), device=device, masked=True)
    plans = planned(case, 1, 2)
    parts = torch.stack([compute(case.sample(index), *plans)["grad_queries"] for index in range(3)])
    torch.testing.assert_close(compute(case, *plans)["grad_queries"], parts.sum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("batch", [16, 1])
def test_many_runs_agree_bitwise(cuda: str, batch: int) -> None:
    """What races would show: 200 times forward and backward, with one program per sample and with many."""
    from hd_awd import attention_pool

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, 256, 1152, generator=generator).to(cuda, torch.bfloat16).requires_grad_()
    queries = (0.05 * torch.randn(4, 1152, generator=generator)).to(cuda).requires_grad_()
    weight = torch.randn(batch, 4, 1152, generator=generator).to(cuda, torch.bfloat16)

    def run() -> tuple[torch.Tensor, ...]:
        pooled = attention_pool(tokens, queries, backend="triton")
        return pooled.detach(), *torch.autograd.grad(pooled, (tokens, queries), weight)

    first = run()
    assert all(one.isfinite().all() for one in first)
    for _ in range(200):
        assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))
