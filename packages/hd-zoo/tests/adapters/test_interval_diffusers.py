"""add_interval around diffusers' networks: equal until trained, exact in forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo_helpers import randomised

from hd_zoo import DiffusedNoise, add_interval
from hd_zoo.adapters import DiTNoise, SanaField


def unet(diffusers: Any, **settings: Any) -> Any:
    """A UNet2DModel with attention at its lower level."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16)}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    rest = {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    return diffusers.UNet2DModel(**{**sizes, **blocks, **rest, **settings}).eval()


@pytest.fixture(params=["unet", "unet_with_classes", "dit", "sana", "sana_with_guidance"])
def case(
    request: pytest.FixtureRequest, diffusers: Any, make_dit: Any, make_sana: Any
) -> tuple[nn.Module, dict[str, Any], int, dict[str, Tensor]]:
    """(a field, add_interval's arguments, its channels, its conditions for a batch of 3)."""
    prompt = {"prompt": torch.randn(3, 5, 12)}
    labels = torch.arange(3)
    made: dict[str, Callable[[], tuple[Any, dict[str, Any], int, dict[str, Tensor]]]] = {
        "unet": lambda: (unet(diffusers), {}, 2, {}),
        "unet_with_classes": lambda: (unet(diffusers, num_class_embeds=4), {}, 2, {"class_labels": labels}),
        "dit": lambda: (
            DiffusedNoise(DiTNoise(make_dit())),
            {"at": "network.model.transformer_blocks.*.norm1.emb", "repeated": True},
            4,
            {"labels": labels},
        ),
        "sana": lambda: (SanaField(make_sana()), {"at": "model.time_embed.emb.timestep_embedder"}, 4, prompt),
        "sana_with_guidance": lambda: (
            SanaField(make_sana(guidance_embeds=True)),
            {"at": "model.time_embed.timestep_embedder"},
            4,
            {**prompt, "guidance": torch.full((3,), 4.5)},
        ),
    }
    return made[request.param]()


def points(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tensor([0.35, 0.62, 0.87], dtype=dtype)
    return torch.randn(3, channels, 8, 8, dtype=dtype), t, t * torch.tensor([0.2, 0.9, 0.5], dtype=dtype)


def velocity(field: Any, *point: Tensor, **cond: Any) -> Tensor:
    """The field's answer; diffusers' own models put it into an object."""
    out = field(*point, **cond)
    return out if isinstance(out, Tensor) else out.sample


def contiguous_norms(network: nn.Module) -> None:
    """PyTorch's forward derivative of GroupNorm takes contiguous inputs alone."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))


def embeddings(student: nn.Module) -> Any:
    return next(m.interval_embed for m in student.modules() if getattr(m, "interval_embed", None) is not None)


def test_it_equals_the_teacher_and_the_gradient_reaches_the_new_layers(case: Any) -> None:
    teacher, settings, channels, cond = case
    student = add_interval(teacher, **settings)
    x, t, r = points(channels)
    expected = velocity(teacher, x, t, **cond)
    for second in (None, t, r, torch.zeros_like(t)):
        assert torch.equal(student(x, t, second, **cond), expected)
    assert student.takes_r
    student(x, t, r, **cond).square().sum().backward()
    assert embeddings(student).mlp[2].weight.grad.abs().sum() > 0
    randomised(embeddings(student), std=0.5)
    assert (student(x, t, r, **cond) - student(x, t, t, **cond)).abs().max() > 1e-4
    assert torch.equal(velocity(teacher, x, t, **cond), expected)


@pytest.mark.usefixtures("all_double")
def test_the_jvp_is_a_difference_quotient(case: Any) -> None:
    teacher, settings, channels, cond = case
    cond = {name: value.double() if value.is_floating_point() else value for name, value in cond.items()}
    student = add_interval(teacher.double(), **settings)
    randomised(embeddings(student), std=0.5)
    x, t, r = points(channels, torch.float64)
    tangent = (torch.randn_like(x), torch.full_like(t, 0.7), torch.full_like(r, -1.3))
    contiguous_norms(student)
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda *point: student(*point, **cond), (x, t, r), tangent)
        _, along_r = torch.func.jvp(lambda r: student(x, t, r, **cond), (r,), (torch.ones_like(r),))
    h = 1e-6
    ahead = student(*(p + h * d for p, d in zip((x, t, r), tangent, strict=True)), **cond)
    behind = student(*(p - h * d for p, d in zip((x, t, r), tangent, strict=True)), **cond)
    scale = slope.abs().max().item()
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), atol=1e-5 * scale, rtol=0)
    assert along_r.abs().max() > 1e-4


@pytest.mark.slow
def test_compiled(case: Any) -> None:
    torch._dynamo.reset()
    teacher, settings, channels, cond = case
    student = add_interval(teacher, **settings)
    randomised(embeddings(student), std=0.5)
    x, t, r = points(channels)
    compiled = torch.compile(student, backend="eager")
    torch.testing.assert_close(compiled(x, t, r, **cond), student(x, t, r, **cond), atol=1e-5, rtol=1e-5)


def test_wrong_names_are_answered_by_those_that_work(make_dit: Any, make_sana: Any, diffusers: Any) -> None:
    sana = SanaField(make_sana())
    x, t, r = points(4)
    with pytest.raises(TypeError, match=r"candidates: model\.time_embed\.emb, model\.time_embed\.emb\.timestep"):
        add_interval(sana, "model.time_embed")(x, t, r, prompt=torch.randn(3, 5, 12))
    with pytest.raises(ValueError, match=r"nearest: .*model\.time_embed"):
        add_interval(sana)
    with pytest.raises(ValueError, match=r"nearest: model\.time_embedding"):
        add_interval(nn.ModuleDict({"model": unet(diffusers)}), "time_embedding")
    dit = DiTNoise(make_dit())
    with pytest.raises(RuntimeError, match=r"'model\.transformer_blocks\.0\.norm1\.emb' ran 2 times .*repeated=True"):
        add_interval(dit, "model.transformer_blocks.*.norm1.emb")(x, t, r)
