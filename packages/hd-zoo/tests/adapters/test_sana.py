"""Sana as a teacher, as a two-time student, and folded back for diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hd_zoo import Guidance, sample_jumps
from hd_zoo.adapters import SanaField, export_sana_pipeline, load_sana, to_sana_student
from hd_zoo.adapters.sana import fold_interval


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    mask = torch.ones(3, 6)
    mask[0, 3:] = 0
    return {
        "x": torch.randn(3, 4, 8, 8, dtype=dtype),
        "t": torch.tensor([0.3, 0.6, 1.0], dtype=dtype),
        "prompt": torch.randn(3, 6, 12, dtype=dtype),
        "prompt_mask": mask,
    }


@pytest.fixture
def trained(make_sana: Any) -> Any:
    """A student whose interval matters."""
    student = to_sana_student(SanaField(make_sana()))
    with torch.no_grad():
        student.model.time_embed.interval.mlp[2].weight.normal_(std=0.5)
    return student


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_equals_the_wrapped_model(make_sana: Any, scale: float) -> None:
    model, given = make_sana(timestep_scale=scale), batch()
    expected = model(
        given["x"],
        encoder_hidden_states=given["prompt"],
        encoder_attention_mask=given["prompt_mask"],
        timestep=1000 * scale * given["t"],
    ).sample
    field = SanaField(model)
    assert torch.equal(field(**given), expected)
    assert torch.equal(field(**given, r=given["t"] / 2), expected), "a teacher ignores r"
    changed = {**given, "prompt": given["prompt"].clone()}
    changed["prompt"][0, 3:] += 1
    torch.testing.assert_close(field(**changed), expected)


def test_a_distilled_models_guidance(make_sana: Any) -> None:
    model, given = make_sana(guidance_embeds=True), batch()
    guidance = torch.full((3,), 4.5)
    expected = model(
        given["x"],
        encoder_hidden_states=given["prompt"],
        encoder_attention_mask=given["prompt_mask"],
        timestep=1000 * given["t"],
        guidance=guidance * model.config.guidance_embeds_scale,
    ).sample
    teacher = SanaField(model)
    assert torch.equal(teacher(**given, guidance=guidance), expected)
    student = to_sana_student(teacher)
    torch.testing.assert_close(student(**given, r=given["t"] / 3, guidance=guidance), expected)


def test_a_student_starts_as_the_teacher_and_shares_nothing(make_sana: Any) -> None:
    teacher, given = SanaField(make_sana()).requires_grad_(False), batch()
    student = to_sana_student(teacher)
    assert torch.equal(student(**given, r=given["t"] / 3), teacher(**given))
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert (teacher.interval, student.interval) == (None, "added")
    again = to_sana_student(student)
    assert again.state_dict().keys() == student.state_dict().keys()


def test_r_matters_once_trained_and_its_derivative_is_exact(trained: SanaField) -> None:
    field, given = trained.double(), batch(torch.float64)
    x, t, prompt = given["x"], given["t"] * 0.8, given["prompt"]

    def call(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return field(x, t, r, prompt=prompt)

    inputs, ways = (x, t, t / 2), (torch.randn_like(x), torch.ones_like(t), torch.full_like(t, 0.5))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        value, tangent = torch.func.jvp(call, inputs, ways)
        step = 1e-6
        ahead, behind = (call(*(one + s * way for one, way in zip(inputs, ways, strict=True))) for s in (step, -step))
    assert (call(x, t, t) - value).abs().max() > 1e-3
    # Its sinusoids are made in float32, so the difference quotient is coarse.
    scale = tangent.abs().max().item()
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), atol=0.05 * scale, rtol=0.05)


def test_guidance_and_jumps(trained: SanaField) -> None:
    given = batch()
    guided = Guidance(trained, 2.0, null={"prompt": torch.zeros(12)})
    arguments = {"prompt": given["prompt"], "prompt_mask": given["prompt_mask"]}
    assert guided(given["x"], given["t"], **arguments).shape == given["x"].shape
    one = sample_jumps(trained, given["x"], **arguments)
    ones, zeros = torch.ones(3), torch.zeros(3)
    with torch.no_grad():
        torch.testing.assert_close(one, given["x"] - trained(given["x"], ones, zeros, **arguments))


@pytest.mark.parametrize("guided", [False, True])
def test_folding_the_interval_keeps_the_one_step_jump(make_sana: Any, guided: bool) -> None:
    student = to_sana_student(SanaField(make_sana(guidance_embeds=guided)))
    with torch.no_grad():
        student.model.time_embed.interval.mlp[2].weight.normal_(std=0.5)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    given = batch()
    extra = {"guidance": torch.full((3,), 4.5)} if guided else {}
    ones, zeros = torch.ones(3), torch.zeros(3)
    expected = student(given["x"], ones, zeros, prompt=given["prompt"], **extra)
    plain = SanaField(fold_interval(student))
    assert plain.interval is None
    torch.testing.assert_close(plain(given["x"], ones, prompt=given["prompt"], **extra), expected, atol=1e-5, rtol=1e-5)
    assert (student(given["x"], ones, ones, prompt=given["prompt"], **extra) - expected).abs().max() > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_a_folder_is_a_teacher(make_sana: Any, tmp_path: Path) -> None:
    model, given = make_sana(), batch()
    model.save_pretrained(tmp_path)
    field = load_sana(tmp_path)
    assert torch.equal(field(**given), SanaField(model)(**given))
    assert not any(parameter.requires_grad for parameter in field.parameters())


def test_only_a_student_is_exported_and_nothing_is_overwritten(
    make_sana: Any, trained: SanaField, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="a student"):
        export_sana_pipeline(SanaField(make_sana()), tmp_path / "new")
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match="exists"):
        export_sana_pipeline(trained, tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
