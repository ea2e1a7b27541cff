"""check_teacher: one line for whatever is missing or wrong with a teacher from anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_helpers import randomised

from hd_zoo import DiffusedNoise, Guidance, add_interval, check_teacher, create_model, to_student


class Foreign:
    """A teacher written by hand, correct unless told otherwise."""

    def __init__(self, answer: Any = None, **stated: Any) -> None:
        self.answer = answer if answer is not None else lambda x: -x
        said = {"sample_shape": (2, 4), "classes": 3, "null_label": None, "takes_r": False, **stated}
        for name, value in said.items():
            if value != "missing":
                setattr(self, name, value)

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor) -> Any:
        assert labels.dtype == torch.long
        assert t.shape == labels.shape == x.shape[:1]
        return self.answer(x)


def test_what_keeps_the_contract() -> None:
    network = randomised(create_model("dit_nano_2", classes=3))
    guided = Guidance(network, 2.0, null={"labels": 3})
    for teacher in (network, guided, DiffusedNoise(network), to_student(network), add_interval(network, "time_embed")):
        check_teacher(teacher)
    check_teacher(create_model("mlp_2d"))
    check_teacher(Foreign())
    check_teacher(Foreign(classes=0), {"labels": torch.arange(2)})


def test_the_random_numbers_are_left_alone() -> None:
    state = torch.get_rng_state()
    check_teacher(create_model("mlp_2d", device="cpu"), None)
    torch.set_rng_state(state)
    expected = torch.randn(3)
    torch.set_rng_state(state)
    check_teacher(Foreign())
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (3, r"a teacher must be callable, teacher\(x, t, \*\*cond\) -> velocity; a int is not"),
        (Foreign(sample_shape="missing"), r"Foreign has no sample_shape \(the shape of one sample"),
        (Foreign(sample_shape=(2, 0)), r"Foreign\.sample_shape must be a tuple of ints >= 1; got \(2, 0\)"),
        (Foreign(sample_shape=32), r"sample_shape must be a tuple of ints >= 1; got 32"),
        (Foreign(classes="missing"), "Foreign has no classes"),
        (Foreign(classes=True), "classes must be an int >= 0; got True"),
        (Foreign(null_label="missing"), "Foreign has no null_label"),
        (Foreign(null_label="none"), "null_label must be an int >= 0 or None; got 'none'"),
        (Foreign(takes_r="missing"), "Foreign has no takes_r"),
        (Foreign(takes_r=None), "takes_r must be True or False; got None"),
        (Foreign(classes=0), r"fails when called with x \(2, 2, 4\), t \(2,\): TypeError: .*labels"),
        (Foreign(lambda x: {"sample": x}), "Foreign must return a tensor; got dict"),
        (Foreign(lambda x: x[:, :1]), r"must return a velocity of x's shape \(2, 2, 4\); got \(2, 1, 4\)"),
        (Foreign(lambda x: x / 0), "returns NaN or infinity"),
        (Foreign(lambda x: x @ x), r"fails when called with x \(2, 2, 4\), t \(2,\), labels: RuntimeError"),
    ],
)
def test_what_does_not(teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_teacher(teacher)
    assert "\n" not in str(caught.value)
