"""The contract's checks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hd_meanflow import Field
from hd_meanflow.field import check_interval, check_output, expand_times, select


class Net(nn.Module):
    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        return x


@pytest.mark.parametrize(
    "field",
    [lambda x, t, r=None, **cond: x, Net(), functools.partial(lambda scale, x, t, r=None, **cond: x, 2.0)],
    ids=["lambda", "module", "partial"],
)
def test_any_callable_is_a_field(field: Any) -> None:
    assert isinstance(field, Field)


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_expand_times_scales_each_sample(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    t = torch.arange(shape[0], dtype=torch.float32)
    scaled = expand_times(t, x) * x
    assert scaled.shape == x.shape
    for i in range(shape[0]):
        assert (scaled[i] == i).all()


def test_expand_times_refuses_a_scalar_and_a_column() -> None:
    x = torch.zeros(3, 2)
    for t in (torch.tensor(0.5), torch.rand(3, 1), torch.rand(2)):
        with pytest.raises(ValueError, match=r"times must have shape \(3,\), one per sample; got"):
            expand_times(t, x)


def test_check_interval_accepts_the_closed_triangle_and_an_empty_batch() -> None:
    check_interval(torch.tensor([0.0, 1.0, 1.0, 0.5]), torch.tensor([0.0, 1.0, 0.0, 0.5]))
    check_interval(torch.empty(0), torch.empty(0))


def test_check_interval_reports_the_offence() -> None:
    with pytest.raises(ValueError, match=r"max\(r - t\) = 0\.25"):
        check_interval(torch.tensor([0.5, 0.25]), torch.tensor([0.1, 0.5]))


def test_check_output_names_the_field() -> None:
    x = torch.zeros(2, 3)
    assert check_output(x, x, "the teacher") is x
    with pytest.raises(ValueError, match=r"the teacher must return x's shape \(2, 3\); got \(2,\)"):
        check_output(torch.zeros(2), x, "the teacher")
    with pytest.raises(ValueError, match=r"the student must return a tensor .*; got tuple"):
        check_output((x,), x, "the student")


def test_select_takes_what_is_per_sample_and_passes_the_rest_on() -> None:
    index = torch.tensor([2, 0])
    cond = {
        "label": torch.tensor([10, 11, 12]),
        "text": torch.arange(12).reshape(3, 2, 2),
        "scale": torch.tensor(1.5),
        "table": torch.arange(4),
        "name": "abc",
        "nothing": None,
    }
    chosen = select(cond, index, 3)
    assert chosen["label"].tolist() == [12, 10]
    assert torch.equal(chosen["text"], cond["text"][[2, 0]])
    for name in ("scale", "table", "name", "nothing"):
        assert chosen[name] is cond[name]
