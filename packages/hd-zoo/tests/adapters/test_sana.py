"""Sana as a teacher and as a two-time student."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hd_zoo import Guidance, sample_jumps
from hd_zoo.adapters import SanaField, load_sana, to_sana_student


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    mask = torch.ones(3, 6)
    mask[0, 3:] = 0
    return {
        "x": torch.randn(3, 4, 8, 8, dtype=dtype),
        "t": torch.tensor([0.3, 0.6, 1.0], dtype=dtype),
        "prompt": torch.randn(3, 6, 12, dtype=dtype),
        "prompt_mask": mask,
    }


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
    unmasked = {**given, "prompt_mask": None}
    assert (field(**unmasked) - expected)[0].abs().max() > 1e-4, "the mask matters where it hides tokens"
    torch.testing.assert_close(field(**unmasked)[1:], expected[1:])
    changed = {**given, "prompt": given["prompt"].clone()}
    changed["prompt"][0, 3:] += 1
    torch.testing.assert_close(field(**changed), expected)
    changed["prompt"][0, 0] += 1
    assert (field(**changed) - expected)[0].abs().max() > 1e-4, "the other tokens matter"


def test_one_time_per_sample(make_sana: Any) -> None:
    field, given = SanaField(make_sana()), batch()
    with pytest.raises(ValueError, match=r"t must have shape \(3,\); got \(2,\)"):
        field(**{**given, "t": given["t"][:2]})
    with pytest.raises(ValueError, match=r"r must have shape \(3,\); got \(1,\)"):
        field(**given, r=given["t"][:1])


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
    assert (teacher(**given, guidance=2 * guidance) - expected).abs().max() > 1e-4
    student = to_sana_student(teacher)
    torch.testing.assert_close(student(**given, r=given["t"] / 3, guidance=guidance), expected)


@pytest.mark.parametrize(
    ("takes", "guidance", "message"),
    [
        (True, None, "guidance must be of shape (3,); got None"),
        (True, torch.ones(2), "guidance must be of shape (3,); got (2,)"),
        (True, 4.5, "guidance must be of shape (3,); got ('float',)"),
        (False, torch.ones(3), "guidance must be None, as the model has no guidance_embeds; got (3,)"),
    ],
    ids=["missing", "another batch", "a number", "superfluous"],
)
@pytest.mark.parametrize("student", [False, True])
def test_guidance_as_the_model_wants_it(
    make_sana: Any, takes: bool, guidance: Any, message: str, student: bool
) -> None:
    field = SanaField(make_sana(guidance_embeds=takes))
    field = to_sana_student(field) if student else field
    with pytest.raises(ValueError, match=re.escape(message)):
        field(**batch(), guidance=guidance)


def test_an_output_that_is_no_velocity_is_refused(make_sana: Any) -> None:
    with pytest.raises(ValueError, match="out_channels must be 4; got 8"):
        SanaField(make_sana(out_channels=8))


@pytest.mark.parametrize("training", [False, True])
def test_a_student_is_in_its_teachers_mode(make_sana: Any, training: bool) -> None:
    student = to_sana_student(SanaField(make_sana()).train(training))
    assert all(module.training == training for module in student.modules())


@pytest.mark.parametrize("settings", [{}, {"patch_size": 2}, {"timestep_scale": 0.001}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_student_starts_as_the_teacher_and_shares_nothing(
    make_sana: Any, settings: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    teacher, given = SanaField(make_sana(**settings)).to(dtype).requires_grad_(False), batch(dtype)
    student = to_sana_student(teacher)
    with torch.no_grad():
        for r in (None, torch.zeros_like(given["t"]), given["t"] / 3, given["t"]):
            # Kernels round in their own ways; a cast to float32 in between would show at 1e-8.
            torch.testing.assert_close(student(**given, r=r), teacher(**given), atol=tolerance, rtol=0)
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert (teacher.takes_r, student.takes_r) == (False, True)
    assert (student.sample_shape, student.classes, student.null_label) == ((4, 8, 8), 0, None)


def test_a_student_of_a_student_is_a_copy(trained: Any) -> None:
    student, given = trained(), batch()
    again = to_sana_student(student.requires_grad_(False))
    assert again.state_dict().keys() == student.state_dict().keys()
    torch.testing.assert_close(again(**given, r=given["t"] / 3), student(**given, r=given["t"] / 3))
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in student.parameters()}


def test_a_student_trains_and_its_teacher_stays(make_sana: Any) -> None:
    teacher, given = SanaField(make_sana()).requires_grad_(False), batch()
    student, before = to_sana_student(teacher), teacher(**given)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    interval = student.model.time_embed.interval.mlp
    for first_gets_a_gradient in (False, True):  # it stands behind the last layer, which is zero at first
        optimizer.zero_grad()
        student(**given, r=given["t"] / 3).square().mean().backward()
        assert all(parameter.grad is not None for parameter in student.parameters())
        assert interval[2].weight.grad.abs().sum() > 0
        assert (interval[0].weight.grad.abs().sum() > 0) == first_gets_a_gradient
        optimizer.step()
    assert (student(**given, r=given["t"] / 3) - before).abs().max() > 1e-3
    assert torch.equal(teacher(**given), before)


def test_r_matters_once_trained_through_the_interval_alone(trained: Any) -> None:
    field, given = trained(timestep_scale=0.1), batch()
    torch.testing.assert_close(field(**given), field(**given, r=given["t"]), msg="no r means r = t")
    assert (field(**given, r=given["t"] / 2) - field(**given)).abs().max() > 1e-3
    shown = []
    field.model.time_embed.interval.register_forward_hook(lambda module, inputs, output: shown.append(inputs[0]))
    field(**given, r=given["t"] / 4)
    torch.testing.assert_close(shown[0], 100 * 0.75 * given["t"])


@pytest.mark.usefixtures("all_double")
@pytest.mark.parametrize("masked", [False, True])
def test_its_derivative_is_exact(trained: Any, masked: bool) -> None:
    field, given = trained(timestep_scale=0.01).double(), batch(torch.float64)
    x, t = given["x"], given["t"] * 0.8
    cond = {"prompt": given["prompt"], "prompt_mask": given["prompt_mask"] if masked else None}

    def call(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return field(x, t, r, **cond)

    inputs, ways = (x, t, t / 2), (torch.randn_like(x), torch.ones_like(t), torch.full_like(t, 0.3))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, tangent = torch.func.jvp(call, inputs, ways)
        step = 1e-6
        ahead, behind = (call(*(one + s * way for one, way in zip(inputs, ways, strict=True))) for s in (step, -step))
    assert tangent.abs().max() > 0.1
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), atol=1e-6, rtol=1e-6)


def test_inside_guidance(trained: Any) -> None:
    field, given = trained(), batch()
    x, t = given["x"], given["t"]
    cond = {"prompt": given["prompt"], "prompt_mask": given["prompt_mask"]}
    null = {"prompt": torch.randn(6, 12), "prompt_mask": torch.tensor([1.0, 1, 0, 0, 0, 0])}
    guided = Guidance(field, 2.5, guidance_interval=(0.2, 0.7), null=null)
    with torch.no_grad():
        with_prompt = field(x, t, t / 2, **cond)
        without = field(x, t, t / 2, **{name: value.expand_as(cond[name]) for name, value in null.items()})
        expected = without + 2.5 * (with_prompt - without)
        expected[2] = with_prompt[2]  # its time lies outside the interval
        found = guided(x, t, t / 2, **cond)
    assert (found - with_prompt)[:2].abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_jumps(trained: Any) -> None:
    field, given = trained(), batch()
    x, cond = given["x"], {"prompt": given["prompt"], "prompt_mask": given["prompt_mask"]}
    one, half, zero = torch.ones(3), torch.full((3,), 0.5), torch.zeros(3)
    with torch.no_grad():
        expected = x - field(x, one, zero, **cond)
        torch.testing.assert_close(sample_jumps(field, x, **cond), expected)
        middle = x - 0.5 * field(x, one, half, **cond)
        expected = middle - 0.5 * field(middle, half, zero, **cond)
        torch.testing.assert_close(sample_jumps(field, x, times=(1.0, 0.5, 0.0), **cond), expected)


def test_a_folder_is_a_teacher(make_sana: Any, tmp_path: Path) -> None:
    model, given = make_sana(), batch()
    model.save_pretrained(tmp_path)
    field = load_sana(tmp_path)
    assert torch.equal(field(**given), SanaField(model)(**given))
    assert not any(parameter.requires_grad for parameter in field.parameters())
    assert field.takes_r is False
    half = load_sana(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    shown = {name: value.bfloat16() if name in ("x", "prompt") else value for name, value in given.items()}
    student = to_sana_student(half)
    torch.testing.assert_close(student(**shown, r=given["t"] / 3), half(**shown))
    assert student(**shown).dtype == torch.bfloat16
