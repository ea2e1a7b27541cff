"""Every registry entry is tested the same way: forward, backward, JVP; and what the registry refuses."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_helpers import draw_batch, randomised

from hd_zoo import adapters, create_model, from_pretrained, list_models, registry, save_pretrained
from hd_zoo.registry import ARCHITECTURES, build, published_models
from hd_zoo.sources import SOURCES, Source, call, full_table, short_table

# Those for ImageNet are too large to run: test_published_networks.py has them.
SMALL = ["dit_micro_4", "dit_mini_4", "dit_nano_2", "mlp_2d"]
FAMILIES = ("sit_", "dit_", "lightningdit_", "repa_", "meanflow_", "dmf_")
ENTRIES = [(name, r_embedding, classes) for name in SMALL for r_embedding in (None, "added") for classes in (0, 4)]
every_entry = pytest.mark.parametrize(("name", "r_embedding", "classes"), ENTRIES)


def create(name: str, r_embedding: str | None, classes: int) -> nn.Module:
    torch.manual_seed(1)
    return create_model(name, r_embedding=r_embedding, classes=classes)


def test_the_names_are_sorted_and_known() -> None:
    assert list_models() == sorted(list_models())
    assert sorted([*published_models(), *SMALL]) == list_models()  # nothing is left untested
    assert all(name.startswith(FAMILIES) for name in published_models())


def test_every_published_name_is_a_literal_of_the_registry() -> None:
    """So that a search for the name finds its entry."""
    source = inspect.getsource(registry)
    assert all(source.count(f'    "{name}": ') == 1 for name in list_models())


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_is_of_a_model_and_says_what_it_is(source: Source) -> None:
    if source.name is not None:
        network = create_model(source.name, device="meta", **source.settings)
        assert source.name in published_models()
        assert (source.clock == "noise") == network.reversed_time
        assert network.takes_r == source.predicts.startswith("mean velocity")
        assert network.learned_variance == ("variance" in source.predicts or "unused" in source.predicts)
    else:
        assert hasattr(adapters, source.reader)
    assert call(source) in "\n".join(full_table())
    assert source.title in "\n".join(short_table())


@every_entry
def test_forward_and_backward(name: str, r_embedding: str | None, classes: int) -> None:
    network = randomised(create(name, r_embedding, classes), std=0.05)
    x, t, r, labels = draw_batch(network)
    x.requires_grad_()
    out = network(x, t, r, labels=labels)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    out.square().mean().backward()
    assert x.grad.abs().sum() > 0
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@every_entry
def test_r_is_ignored_by_teachers_and_equals_t_by_default(name: str, r_embedding: str | None, classes: int) -> None:
    network = randomised(create(name, r_embedding, classes), std=0.05)
    x, t, r, labels = draw_batch(network)
    plain = network(x, t, labels=labels)
    assert torch.equal(network(x, t, t, labels=labels), plain)
    other = network(x, t, r, labels=labels)
    assert torch.equal(other, plain) == (r_embedding is None)


@every_entry
def test_the_jvp_along_a_trajectory_against_central_differences(
    name: str, r_embedding: str | None, classes: int
) -> None:
    """d/dt u along (v, 0, 1), as MeanFlow needs it, and along r alone; float64."""
    network = randomised(create(name, r_embedding, classes).double(), std=0.05)
    x, t, r, labels = draw_batch(network, count=2, dtype=torch.float64)
    velocity = torch.randn_like(x)

    def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return network(x, t, r, labels=labels)

    zero, one, step = torch.zeros_like(t), torch.ones_like(t), 1e-4
    for tangent in ((velocity, one, zero), (torch.zeros_like(x), zero, one)):
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, found = torch.func.jvp(u, (x, t, r), tangent)
            ahead = u(*(a + step * d for a, d in zip((x, t, r), tangent, strict=True)))
            behind = u(*(a - step * d for a, d in zip((x, t, r), tangent, strict=True)))
        expected = (ahead - behind) / (2 * step)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
        depends = tangent[1].any() or r_embedding is not None
        assert (found.abs().max() > 1e-4) == bool(depends)


@pytest.mark.parametrize("name", SMALL)
def test_the_same_seed_gives_the_same_network_and_overrides_count(name: str, tmp_path: Any) -> None:
    one, other = create(name, None, 3), create(name, None, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.null_label == 3
    deeper = create_model(name, depth=1, r_embedding="added")
    assert len(deeper.blocks) == 1
    assert deeper.interval_embed is not None
    again = from_pretrained(save_pretrained(deeper, tmp_path))
    assert again.arguments == deeper.arguments


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dit_nano", {}, r"unknown model 'dit_nano' \(did you mean 'dit_nano_2'\?\); known: dit_b_2, .*dit_micro_4, "),
        ("zzz", {}, "unknown model 'zzz'; known: "),
        (
            "dit_nano_2",
            {"clases": 3},
            r"unknown argument 'clases' for 'transformer' \(did you mean 'classes'\?\)",
        ),
        ("dit_nano_2", {"self": 3}, "unknown argument 'self'"),
        ("mlp_2d", {"num_heads": 3}, "unknown argument 'num_heads' for 'mlp'"),
        ("mlp_2d", {"width": "64"}, "argument 'width' of 'mlp' must be int; got '64'"),
        ("dit_nano_2", {"width": 64.0}, "'width' of 'transformer' must be int; got 64.0"),
        ("dit_nano_2", {"classes": True}, "'classes' of 'transformer' must be int; got True"),
        ("dit_nano_2", {"r_embedding": 1}, "'r_embedding' of 'transformer' must be .*; got 1"),
        ("dit_nano_2", {"time_scale": "1"}, "'time_scale' of 'transformer' must be float; got '1'"),
        ("dit_nano_2", {"depth": None}, "'depth' of 'transformer' must be int; got None"),
        ("dit_nano_2", {"patch": 3}, "multiple of patch"),
        ("mlp_2d", {"features": 0}, "must be >= 1"),
    ],
)
def test_what_cannot_be_built(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **arguments)


def test_a_whole_number_will_do_where_a_float_is_wanted() -> None:
    assert create_model("mlp_2d", time_scale=2).time_embed.scale == 2


def test_build_knows_its_architectures_alone() -> None:
    with pytest.raises(
        ValueError, match=r"unknown architecture 'os\.system'; known: added_interval, diffusers, mlp, transformer"
    ):
        build("os.system", {})
    with pytest.raises(ValueError, match=r"cannot build 'transformer': .*image_size"):
        build("transformer", {})
    with pytest.raises(ValueError, match="cannot build 'mlp'"):
        build("mlp", {"width": 2**62}, device="meta")
    assert set(ARCHITECTURES) == {"added_interval", "mlp", "transformer"}


def test_a_meta_build_draws_no_random_numbers_and_holds_no_memory() -> None:
    state = torch.get_rng_state()
    network = build("mlp", {"width": 2**20}, device="meta")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in network.parameters())
