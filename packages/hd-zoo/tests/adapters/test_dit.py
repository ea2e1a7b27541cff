"""diffusers' DiT as a field, and as this package's own transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hd_zoo import DiffusedNoise, from_pretrained, save_pretrained, to_student
from hd_zoo.adapters import DiTNoise, from_diffusers_dit, load_diffusers_dit


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(5, 4, 8, 8, dtype=dtype), torch.linspace(0.05, 0.9, 5, dtype=dtype), torch.arange(5) * 2


@pytest.mark.parametrize("settings", [{}, {"head_width": 72}, {"out_channels": 4, "num_layers": 2}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_diffusers(make_dit: Any, settings: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    theirs = make_dit(**settings).to(dtype)
    # diffusers makes its frequencies in float32, whatever the dtype; in double only a fixed point is comparable.
    ours = from_diffusers_dit(theirs)
    x, t, labels = batch(dtype)
    t = torch.zeros_like(t) if dtype == torch.float64 else t
    x.requires_grad_()
    found, expected = ours(x, t, labels=labels), DiTNoise(theirs)(x, t, labels=labels)
    assert found.shape == x.shape
    assert expected.std() > 0.1
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=0)
    one, two = (torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(one, two, atol=tolerance * two.abs().max().item(), rtol=0)


def test_no_label_is_the_null_class(make_dit: Any) -> None:
    network = DiTNoise(make_dit())
    x, t, _ = batch(torch.float32)
    torch.testing.assert_close(network(x, t), network(x, t, labels=torch.full((5,), 10)))


def test_a_folder_is_a_velocity_field(make_dit: Any, tmp_path: Path) -> None:
    model = make_dit()
    model.save_pretrained(tmp_path)
    field = load_diffusers_dit(tmp_path)
    x, t, labels = batch(torch.float32)
    torch.testing.assert_close(field(x, t, labels=labels), DiffusedNoise(DiTNoise(model))(x, t, labels=labels))
    assert not any(parameter.requires_grad for parameter in field.parameters())


@pytest.mark.parametrize("interval", ["added", "decoupled"])
def test_a_student_starts_as_the_teacher_and_both_survive_a_file(make_dit: Any, interval: str, tmp_path: Path) -> None:
    teacher = DiffusedNoise(from_diffusers_dit(make_dit()))
    student = to_student(teacher, interval)
    x, t, labels = batch(torch.float32)
    torch.testing.assert_close(student(x, t, t, labels=labels), teacher(x, t, labels=labels), atol=1e-4, rtol=1e-4)
    again = from_pretrained(save_pretrained(student, tmp_path))
    assert torch.equal(again(x, t, t / 2, labels=labels), student.eval()(x, t, t / 2, labels=labels))


def test_what_does_not_convert_is_named(make_dit: Any) -> None:
    model = make_dit()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias += 1
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.1\.norm1\.emb\.timestep_embedder\.linear_1\.bias differs"
    ):
        from_diffusers_dit(model)
    with pytest.raises(ValueError, match="gelu-approximate"):
        from_diffusers_dit(make_dit(activation_fn="gelu"))
