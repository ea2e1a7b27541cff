"""diffusers' DiT as a field, and as this package's own transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hd_zoo import (
    DiffusedNoise,
    Guidance,
    from_pretrained,
    layer_name,
    sample_ode,
    save_pretrained,
    seeded_noise,
    to_student,
)
from hd_zoo.adapters import DiTNoise, from_diffusers_dit, load_diffusers_dit


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(5, 4, 8, 8, dtype=dtype), torch.linspace(0.05, 0.9, 5, dtype=dtype), torch.arange(5) * 2


def check_equal(theirs: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and gradients in x, relative to the largest."""
    ours = from_diffusers_dit(theirs)
    x, t, labels = batch(dtype)
    x.requires_grad_()
    found, expected = ours(x, t, labels=labels), DiTNoise(theirs)(x, t, labels=labels)
    assert found.shape == x.shape
    assert expected.std() > 0.1
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=0)
    one, two = (torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(one, two, atol=tolerance * two.abs().max().item(), rtol=0)


SETTINGS = [
    {},
    {"head_width": 72},
    {"head_width": 12, "num_attention_heads": 3},
    {"head_width": 4, "num_attention_heads": 1, "patch_size": 4},
    {"out_channels": 4, "num_layers": 2},
    {"out_channels": None, "num_layers": 2},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_diffusers(make_dit: Any, settings: dict[str, Any]) -> None:
    check_equal(make_dit(**settings), torch.float32, 1e-5)


@pytest.mark.usefixtures("all_double")
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_diffusers_in_double(make_dit: Any, settings: dict[str, Any]) -> None:
    check_equal(make_dit(**settings).double(), torch.float64, 1e-10)


def test_the_default_epsilon_is_close(make_dit: Any) -> None:
    """Converted official weights name 1e-5 for a norm that was trained with 1e-6, which is what ours has."""
    check_equal(make_dit(norm_eps=1e-5), torch.float32, 1e-4)


def test_one_time_per_sample(make_dit: Any) -> None:
    network, x = DiTNoise(make_dit()), torch.randn(3, 4, 8, 8)
    with pytest.raises(ValueError, match=r"t must have shape \(3,\); got \(\)"):
        network(x, torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"r must have shape \(3,\); got \(2,\)"):
        network(x, torch.rand(3), torch.rand(2))


def test_no_label_is_the_null_class(make_dit: Any) -> None:
    network = DiTNoise(make_dit())
    x, t, _ = batch(torch.float32)
    torch.testing.assert_close(network(x, t), network(x, t, labels=torch.full((5,), 10)))


def test_no_label_is_dropped_in_training_mode(make_dit: Any) -> None:
    network = DiTNoise(make_dit())
    x, t = torch.randn(64, 4, 8, 8), torch.full((64,), 0.5)
    labels = torch.arange(64) % 10
    assert torch.equal(network.train()(x, t, labels=labels), network.eval()(x, t, labels=labels))


def test_the_converted_network_is_a_copy(make_dit: Any) -> None:
    theirs = make_dit().train()
    ours = from_diffusers_dit(theirs)
    assert ours.training
    assert not {p.data_ptr() for p in theirs.parameters()} & {p.data_ptr() for p in ours.parameters()}
    assert ours.null_label == DiTNoise(theirs).null_label == 10
    assert not from_diffusers_dit(theirs.eval()).training
    assert {tensor.dtype for tensor in from_diffusers_dit(make_dit().bfloat16()).state_dict().values()} == {
        torch.bfloat16
    }


def test_times_and_channels_as_the_wrapped_model_wants_them(make_dit: Any) -> None:
    model = make_dit()
    x, t, labels = batch(torch.float32)
    expected = model(x, timestep=1000 * t, class_labels=labels).sample
    assert expected.shape == (5, 8, 8, 8)
    found = DiTNoise(model)(x, t, t / 2, labels=labels)
    torch.testing.assert_close(found, expected[:, :4], msg="the noise without its variance; r is ignored")


def test_a_folder_is_a_velocity_field(make_dit: Any, tmp_path: Path) -> None:
    model = make_dit()
    model.save_pretrained(tmp_path)
    field = load_diffusers_dit(tmp_path)
    x, t, labels = batch(torch.float32)
    torch.testing.assert_close(field(x, t, labels=labels), DiffusedNoise(DiTNoise(model))(x, t, labels=labels))
    assert not any(parameter.requires_grad for parameter in field.parameters())


@pytest.mark.parametrize("r_embedding", ["added", "decoupled"])
def test_a_student_starts_as_the_teacher_and_both_survive_a_file(
    make_dit: Any, r_embedding: str, tmp_path: Path
) -> None:
    teacher = DiffusedNoise(from_diffusers_dit(make_dit()))
    student = to_student(teacher, r_embedding)
    x, t, labels = batch(torch.float32)
    torch.testing.assert_close(student(x, t, t, labels=labels), teacher(x, t, labels=labels), atol=1e-4, rtol=1e-4)
    again = from_pretrained(save_pretrained(student, tmp_path))
    assert torch.equal(again(x, t, t / 2, labels=labels), student.eval()(x, t, t / 2, labels=labels))


def test_the_converted_teacher_survives_a_file(make_dit: Any, tmp_path: Path) -> None:
    model = make_dit()
    teacher = DiffusedNoise(from_diffusers_dit(model))
    again = from_pretrained(save_pretrained(teacher, tmp_path))
    x, t, labels = batch(torch.float32)
    assert isinstance(again, DiffusedNoise)
    assert torch.equal(again(x, t, labels=labels), teacher(x, t, labels=labels))
    expected = DiffusedNoise(DiTNoise(model))(x, t, labels=labels)
    torch.testing.assert_close(again(x, t, labels=labels), expected, atol=1e-4, rtol=1e-4)


def test_a_student_trains_and_its_teacher_stays(make_dit: Any) -> None:
    teacher = DiffusedNoise(from_diffusers_dit(make_dit())).requires_grad_(False)
    student = to_student(teacher)
    x, t, labels = batch(torch.float32)
    before = teacher(x, t, labels=labels)
    for r in (torch.zeros_like(t), t / 3, t):
        torch.testing.assert_close(student(x, t, r, labels=labels), before, atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in student.parameters())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(x, t, t / 3, labels=labels).square().mean().backward()
    last = student.network.interval_embed.mlp[2].weight
    assert last.grad.abs().sum() > 0
    optimizer.step()
    with torch.no_grad():
        after = student(x, t, t / 3, labels=labels)
        assert (after - before).abs().max() > 1e-3
        assert (student(x, t, t, labels=labels) - after).abs().max() > 1e-6, "r matters now"
    assert torch.equal(teacher(x, t, labels=labels), before)


def test_what_does_not_convert_is_named(make_dit: Any) -> None:
    model = make_dit()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias += 1
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.1\.norm1\.emb\.timestep_embedder\.linear_1\.bias differs"
    ):
        from_diffusers_dit(model)
    with pytest.raises(ValueError, match="image_size must be a positive multiple of patch"):
        from_diffusers_dit(make_dit(sample_size=9))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"activation_fn": "gelu"}, "gelu-approximate"),
        ({"attention_bias": False}, "attention_bias"),
        ({"norm_elementwise_affine": True}, "affine"),
        ({"norm_eps": 1e-2}, "norm_eps must be at most 1e-5 to convert; got 0.01"),
        ({"out_channels": 6}, "out_channels must be in_channels or twice as many to convert; got 6"),
        ({"num_embeds_ada_norm": 0}, "num_embeds_ada_norm must be >= 1 to convert; got 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_convert_are_named(make_dit: Any, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        from_diffusers_dit(make_dit(**settings))


@pytest.mark.parametrize(
    "part", ["timestep_embedder.linear_2.weight", "class_embedder.embedding_table.weight"], ids=["time", "label"]
)
def test_every_blocks_embedding_is_compared(make_dit: Any, part: str) -> None:
    model = make_dit()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.get_parameter(part)[0] += 1e-3
    with pytest.raises(ValueError, match=rf"transformer_blocks\.2\.norm1\.emb\.{part} differs"):
        from_diffusers_dit(model)


def test_diffusers_dit_is_a_full_teacher(make_dit: Any) -> None:
    """What it says of itself, and guidance and sampling with it; it ignores r."""
    field = DiffusedNoise(DiTNoise(make_dit())).eval()
    guided = Guidance(field, 2.0, null={"labels": field.null_label}, channels=3)
    for one in (field, guided):
        assert (one.sample_shape, one.classes, one.null_label, one.takes_r) == ((4, 8, 8), 10, 10, False)
    assert layer_name(guided, "model.transformer_blocks.1") == "field.network.model.transformer_blocks.1"
    assert layer_name(guided, "model.transformer_blocks.1") in dict(guided.named_modules())
    labels = torch.tensor([1, 2])
    noise = seeded_noise(guided.sample_shape, [0, 1])
    samples = sample_ode(guided, noise, 3, labels=labels)
    assert samples.isfinite().all()
    assert not torch.allclose(samples, sample_ode(field, noise, 3, labels=labels))
    x, t, labels = batch(torch.float32)
    assert torch.equal(field(x, t, t / 2, labels=labels), field(x, t, labels=labels))
