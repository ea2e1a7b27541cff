"""to_student: an exact copy at every r, until it is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo_helpers import draw_batch, randomised

from hd_zoo import DiffusionTransformer, create_model, to_student


@pytest.fixture(params=["mlp_2d", "dit_nano_2", "dit_micro_4", "dit_mini_4"])
def teacher(request: pytest.FixtureRequest) -> nn.Module:
    return randomised(create_model(request.param, classes=4), std=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_student_is_the_teacher_bit_for_bit_at_every_r(teacher: nn.Module, dtype: torch.dtype) -> None:
    student = to_student(teacher.to(dtype))
    x, t, r, labels = draw_batch(teacher)
    expected = teacher(x.to(dtype), t, labels=labels)
    for second in (None, t, r, torch.zeros_like(t)):
        assert torch.equal(student(x.to(dtype), t, second, labels=labels), expected)


def test_the_gradient_reaches_the_interval_embedding_and_r_matters_after_a_step(teacher: nn.Module) -> None:
    student = to_student(teacher)
    x, t, r, labels = draw_batch(teacher)
    student(x, t, r, labels=labels).square().sum().backward()
    last = student.interval_embed.mlp[2]
    assert last.weight.grad.abs().sum() > 0
    with torch.no_grad():
        last.weight.sub_(last.weight.grad / last.weight.grad.norm())
    assert not torch.allclose(student(x, t, r, labels=labels), student(x, t, t, labels=labels))
    assert not torch.allclose(student(x, t, r, labels=labels), teacher(x, t, labels=labels))


def test_no_storage_is_shared_and_every_parameter_is_trainable(teacher: nn.Module) -> None:
    teacher.requires_grad_(False)
    for student in (to_student(teacher), to_student(to_student(teacher).requires_grad_(False))):
        assert all(parameter.requires_grad for parameter in student.parameters())
        mine = {tensor.data_ptr() for tensor in student.state_dict().values()}
        assert not mine & {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_mode_is_kept(teacher: nn.Module) -> None:
    assert not to_student(teacher.eval()).training
    assert to_student(teacher.train()).training


def test_a_student_is_copied_as_it_is(teacher: nn.Module) -> None:
    first = randomised(to_student(teacher), std=0.05)
    second = to_student(first)
    x, t, r, labels = draw_batch(teacher)
    assert torch.equal(second(x, t, r, labels=labels), first(x, t, r, labels=labels))
    randomised(second)
    assert not torch.allclose(second(x, t, r, labels=labels), first(x, t, r, labels=labels))


def test_the_students_blueprint_says_how_r_enters(teacher: nn.Module) -> None:
    student = to_student(teacher)
    assert student.arguments == {**teacher.arguments, "r_embedding": "added"}
    assert student.architecture == teacher.architecture
    assert "r_embedding" not in teacher.arguments


@pytest.mark.parametrize("early", [0, 1, 2])
def test_decoupled_students_with_so_many_early_blocks(early: int) -> None:
    """0 counts as none: every block and the head are shown r."""
    teacher = randomised(create_model("dit_nano_2", classes=4, width=16, depth=2))
    student = to_student(teacher, "decoupled", early_blocks=early)
    assert student.early_blocks == early
    x, t, r, labels = draw_batch(teacher)
    assert torch.equal(student(x, t, labels=labels), teacher(x, t, labels=labels))
    if early == 0:
        torch.testing.assert_close(student(x, t, r, labels=labels), teacher(x, r, labels=labels))
    assert to_student(student, "decoupled").early_blocks == early  # a later stage keeps it
    assert to_student(student, "decoupled", early_blocks=1).early_blocks == 1
    with pytest.raises(ValueError, match='early_blocks is for r_embedding="decoupled"; got 1'):
        to_student(teacher, early_blocks=1)
    with pytest.raises(ValueError, match=r"early_blocks must lie in \[0, depth\]; got 3 of 2"):
        to_student(teacher, "decoupled", early_blocks=3)


def test_errors(teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match="r_embedding must be None, 'added' or 'decoupled'; got 'concatenated'"):
        to_student(teacher, "concatenated")
    with pytest.raises(ValueError, match="create_model, to_student or from_pretrained is needed; got Linear"):
        to_student(nn.Linear(2, 2))
    direct = DiffusionTransformer(image_size=8, channels=1, patch=2, width=8, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="got DiffusionTransformer"):
        to_student(direct)
