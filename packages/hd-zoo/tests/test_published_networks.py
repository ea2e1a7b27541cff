"""The published networks: their papers' sizes and costs on the meta device, and small real ones of each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo_helpers import draw_batch, randomised

from hd_zoo import (
    DiffusedNoise,
    DiffusionTransformer,
    create_model,
    from_pretrained,
    model_cost,
    save_pretrained,
)
from hd_zoo.networks import attention
from hd_zoo.registry import published_models

# Arithmetic and size in the appendix of arXiv 2212.09748: 10^9 multiply-adds ("Gflops") and millions of parameters.
PAPER = {
    "s_8": (0.36, 33),
    "s_4": (1.41, 33),
    "s_2": (6.06, 33),
    "b_8": (1.42, 131),
    "b_4": (5.56, 130),
    "b_2": (23.01, 130),
    "l_8": (5.01, 459),
    "l_4": (19.70, 458),
    "l_2": (80.71, 458),
    "xl_8": (7.39, 676),
    "xl_4": (29.05, 675),
    "xl_2": (118.64, 675),
}
DITS = [f"{family}_{size}" for family in ("dit", "sit") for size in PAPER]
LIGHTNING = [f"lightningdit_{size}_{patch}" for size in ("b", "l", "xl") for patch in (1, 2)]
R_EMBEDDINGS = (None, "added", "decoupled")

LATER = ["repa_xl_2", "meanflow_b_2", "meanflow_b_4", "meanflow_l_2", "meanflow_xl_2", "dmf_xl_2"]

# What makes a small network of each family; the settings that distinguish it stay.
SMALL = {
    "sit_s_2": {"image_size": 8, "width": 32, "depth": 2, "num_heads": 2, "classes": 3, "frequencies": 16},
    "dit_s_2": {"image_size": 8, "width": 32, "depth": 2, "num_heads": 2, "classes": 3, "frequencies": 16},
    "lightningdit_b_1": {"image_size": 4, "width": 32, "depth": 2, "num_heads": 2, "classes": 3, "frequencies": 16},
}
every_family = pytest.mark.parametrize("name", SMALL)
every_r_embedding = pytest.mark.parametrize("r_embedding", R_EMBEDDINGS)


@pytest.fixture
def small() -> Callable[..., Any]:
    """A small network of a family, away from its zero-initialised start."""

    def create(name: str, r_embedding: str | None = None, **changes: Any) -> nn.Module:
        return randomised(create_model(name, r_embedding=r_embedding, **{**SMALL[name], **changes}), std=0.05)

    return create


def counted(network: Any, batch: int = 2, *, with_r: bool = False) -> float:
    """Multiply-adds per sample as torch counts them in a forward pass; every output has its input's shape."""
    x, t = torch.empty(batch, *network.sample_shape, device="meta"), torch.empty(batch, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = network(x, t, t if with_r else None, labels=torch.zeros(batch, dtype=torch.long, device="meta"))
    assert out.shape == x.shape
    assert out.is_meta
    return counter.get_total_flops() / 2 / batch


def test_the_registry_has_all_of_them() -> None:
    assert sorted([*DITS, *LIGHTNING, *LATER]) == published_models()


@pytest.mark.slow
@pytest.mark.parametrize("name", DITS)
def test_sizes_and_costs_are_the_papers(name: str) -> None:
    gflops, millions = PAPER[name.split("_", 1)[1]]
    network = create_model(name, device="meta")
    cost = model_cost(network)
    # The published networks store the fixed positions as a parameter.
    assert cost.parameters + network.positions.numel() == pytest.approx(1e6 * millions, rel=0.005)
    assert cost.multiply_adds == pytest.approx(1e9 * gflops, rel=0.015)
    assert cost.multiply_adds == counted(network)
    assert cost.weight_bytes == 4 * cost.parameters == 2 * model_cost(network, dtype=torch.bfloat16).weight_bytes


def test_the_largest_counted_with_its_positions() -> None:
    """675.1 million; counted by hand from the equations of the paper, one term per part."""
    for name in ("dit_xl_2", "sit_xl_2"):
        network = create_model(name, device="meta")
        c, inputs, outputs, tokens = 1152, 4 * 2 * 2, 2 * 4 * 2 * 2, 16 * 16
        block = (3 * c * c + 3 * c) + (c * c + c) + (4 * c * c + 4 * c) + (4 * c * c + c) + (6 * c * c + 6 * c)
        ends = (inputs * c + c) + (c * outputs + outputs) + (2 * c * c + 2 * c)
        condition = (256 * c + c) + (c * c + c) + 1001 * c
        assert model_cost(network).parameters == 28 * block + ends + condition
        total = 28 * block + ends + condition + tokens * c
        assert round(total / 1e5) == 6751


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightning_networks_cost_what_a_dit_of_the_size_costs(name: str) -> None:
    """SwiGLU has two thirds of the hidden width; 16 pixels a side in patches of 1 are as many tokens as 32 in 2."""
    _, size, patch = name.split("_")
    gflops, millions = PAPER[f"{size}_{2 * int(patch)}"]
    network = create_model(name, device="meta")
    cost = model_cost(network)
    assert cost.parameters + network.positions.numel() == pytest.approx(1e6 * millions, rel=0.005)
    assert cost.multiply_adds == pytest.approx(1e9 * gflops, rel=0.015)
    assert cost.multiply_adds == counted(network)


@every_r_embedding
@pytest.mark.parametrize("name", ["sit_xl_2", "dit_b_4", "lightningdit_l_2"])
def test_the_cost_of_students_behind_converters_too(name: str, r_embedding: str | None) -> None:
    network = create_model(name, device="meta", r_embedding=r_embedding)
    cost = model_cost(DiffusedNoise(network))
    assert cost == model_cost(network)
    assert cost.multiply_adds == counted(network, with_r=True)
    assert cost.parameters == sum(one.numel() for one in network.parameters())


def test_only_transformers_are_counted() -> None:
    with pytest.raises(ValueError, match="a DiffusionTransformer is needed; got MLPField"):
        model_cost(create_model("mlp_2d"))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"depth": 6},
    "wide": {"width": 256},
    "few_tokens": {"patch": 4},
    "narrow_mlp": {"mlp_ratio": 2.0},
    "silu": {"activation": "silu"},
    "swiglu": {"activation": "swiglu"},
    "rms": {"norm": "rms"},
    "rotary": {"rotary": True},
    "qk_layer": {"qk_norm": "layer"},
    "qk_rms": {"qk_norm": "rms", "norm": "rms"},
    "qk_rms_alone": {"qk_norm": "rms"},
    "lightning": {"activation": "swiglu", "norm": "rms", "rotary": True},
    "lightning_qk": {"activation": "swiglu", "norm": "rms", "rotary": True, "qk_norm": "rms"},
    "variance": {"learned_variance": True},
    "reversed": {"reversed_time": True},
    "added": {"r_embedding": "added"},
    "decoupled": {"r_embedding": "decoupled"},
}
# RMSNorm keeps float32 copies of half-precision inputs on a CPU, and not on every device: float32 alone there.
HALF = [name for name, settings in SETTINGS.items() if "rms" not in settings.values()]


def kept_for_backward(network: Any, dtype: torch.dtype, batch: int) -> int:
    """Bytes that autograd saves in one forward pass beside parameters and buffers, each storage once."""
    fixed = {one.untyped_storage().data_ptr() for one in [*network.parameters(), *network.buffers()]}
    kept: dict[int, Tensor] = {}  # holding the tensors, so that no address comes up twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in fixed:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, t = torch.randn(batch, *network.sample_shape, dtype=dtype), torch.linspace(0.5, 0.9, batch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x, t, t / 2)
    return sum(one.untyped_storage().nbytes() for one in kept.values())


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [(name, torch.float32) for name in SETTINGS] + [(name, torch.bfloat16) for name in HALF],
)
def test_activation_bytes_are_what_autograd_keeps(
    settings: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the fused attention, as everywhere but in half precision on a CPU, where two products keep their scores."""
    monkeypatch.setattr(attention, "_fused_backward_is_slow", lambda q: False)
    base = {"image_size": 16, "channels": 4, "patch": 1, "width": 128, "depth": 2, "num_heads": 2, "classes": 3}
    network = DiffusionTransformer(**{**base, **SETTINGS[settings]}).to(dtype)
    kept = kept_for_backward(network, dtype, batch=2) / 2
    assert model_cost(network, dtype=dtype).activation_bytes == pytest.approx(kept, rel=0.1)


def test_training_bytes_are_those_of_adam_with_an_average() -> None:
    network = create_model("sit_s_2", **{**SMALL["sit_s_2"], "image_size": 16, "width": 64})
    cost, batch = model_cost(network), 3
    activations = kept_for_backward(network, torch.float32, batch)
    average = [parameter.clone() for parameter in network.parameters()]
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.randn(batch, *network.sample_shape), torch.rand(batch)).square().sum().backward()
    optimiser.step()
    moments = [state[key] for state in optimiser.state.values() for key in ("exp_avg", "exp_avg_sq")]
    gradients = [parameter.grad for parameter in network.parameters()]
    copies = sum(one.nbytes for one in [*network.parameters(), *gradients, *moments, *average])
    assert cost.training_bytes(batch) == pytest.approx(copies + activations, rel=0.05)
    assert cost.training_bytes(batch) - cost.training_bytes(0) == batch * cost.activation_bytes
    assert cost.training_bytes(0) == copies
    assert cost.training_bytes(0, copies=1) == cost.weight_bytes == sum(one.nbytes for one in average)


@every_r_embedding
@every_family
def test_forward_and_backward(name: str, r_embedding: str | None, small: Callable[..., Any]) -> None:
    network = small(name, r_embedding)
    x, t, r, labels = draw_batch(network)
    x.requires_grad_()
    out = network(x, t, r, labels=labels)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert x.grad.abs().sum() > 0
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@every_family
def test_a_new_network_predicts_zero(name: str) -> None:
    network = create_model(name, **SMALL[name])
    x, t, _, labels = draw_batch(network)
    assert torch.all(network(x, t, labels=labels) == 0)


@every_r_embedding
@every_family
def test_no_r_means_r_is_t(name: str, r_embedding: str | None, small: Callable[..., Any]) -> None:
    network = small(name, r_embedding)
    x, t, r, labels = draw_batch(network)
    plain = network(x, t, labels=labels)
    assert torch.equal(network(x, t, t, labels=labels), plain)
    assert torch.equal(network(x, t, r, labels=labels), plain) == (r_embedding is None)


@every_r_embedding
@every_family
def test_the_jvp_against_central_differences(name: str, r_embedding: str | None, small: Callable[..., Any]) -> None:
    """Along x, along t, along r, and along a trajectory; without a hint about attention."""
    network = small(name, r_embedding).double()
    x, t, r, labels = draw_batch(network, count=2, dtype=torch.float64)
    velocity, zero, one = torch.randn_like(x), torch.zeros_like(t), torch.ones_like(t)

    def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return network(x, t, r, labels=labels)

    step = 1e-4 / network.time_embed.scale
    still = torch.zeros_like(x)
    for tangent in ((velocity, zero, zero), (still, one, zero), (still, zero, one), (velocity, one, zero)):
        _, found = torch.func.jvp(u, (x, t, r), tangent)
        with torch.no_grad():
            ahead, behind = (u(*(a + s * d for a, d in zip((x, t, r), tangent, strict=True))) for s in (step, -step))
        expected = (ahead - behind) / (2 * step)
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, atol=1e-6 * max(scale, 1e-3), rtol=1e-5)
        along_r_alone = bool(tangent[2].any())
        assert (scale > 1e-5) == (not along_r_alone or r_embedding is not None)


@every_r_embedding
@every_family
def test_round_trip_on_disk(name: str, r_embedding: str | None, small: Callable[..., Any], tmp_path: Path) -> None:
    network = small(name, r_embedding).eval()
    found = from_pretrained(save_pretrained(network, tmp_path))
    assert found.arguments == network.arguments
    assert found.state_dict().keys() == network.state_dict().keys()
    x, t, r, labels = draw_batch(network)
    assert torch.equal(found(x, t, r, labels=labels), network(x, t, r, labels=labels))


@every_r_embedding
@every_family
def test_bfloat16(name: str, r_embedding: str | None, small: Callable[..., Any]) -> None:
    network = small(name, r_embedding)
    x, t, r, labels = draw_batch(network)
    expected = network(x, t, r, labels=labels)
    pure = network.bfloat16()(x.bfloat16(), t, r, labels=labels)
    assert pure.dtype == torch.bfloat16
    assert (pure - expected).norm() < 0.03 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "r_embedding"), [("sit_s_2", "added"), ("dit_s_2", None), ("lightningdit_b_1", "decoupled")]
)
def test_compiles_to_one_graph(name: str, r_embedding: str | None, small: Callable[..., Any]) -> None:
    network = small(name, r_embedding).double()
    x, t, r, labels = draw_batch(network, dtype=torch.float64)
    torch.compiler.reset()
    found = torch.compile(network, backend="aot_eager", fullgraph=True)(x, t, r, labels=labels)
    expected = network(x, t, r, labels=labels)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    parameters = list(network.parameters())
    one, other = (torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", published_models())
def test_every_entry_at_its_size_without_data(name: str) -> None:
    """Forward, backward, JVP and 16 bits of the two-time student: shapes and dtypes of everything."""
    network = create_model(name, r_embedding="added", device="meta")
    x, labels = torch.empty(2, *network.sample_shape, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    t = torch.empty(2, device="meta")
    out = network(x, t, t, labels=labels)
    out.sum().backward()
    assert out.shape == x.shape
    assert all(one.grad is not None and one.grad.shape == one.shape for one in network.parameters())
    value, slope = torch.func.jvp(lambda *at: network(*at, labels=labels), (x, t, t), (x, t, t))
    assert value.shape == slope.shape == x.shape
    with torch.no_grad():
        half = network.bfloat16()(x.bfloat16(), t, t, labels=labels)
    assert (half.shape, half.dtype) == (x.shape, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DITS, *LIGHTNING, *LATER[:-1]])
def test_every_entry_in_small(name: str, tmp_path: Path) -> None:
    """Its own patch and family, a few channels: one graph, r = t where r is left out, and the same from a file."""
    patch = int(name.rsplit("_", 1)[1])
    sizes = {"image_size": 4 * patch, "width": 32, "depth": 1, "num_heads": 2, "classes": 3, "frequencies": 16}
    network = randomised(create_model(name, r_embedding="added", **sizes), std=0.05).eval()
    x, t, r = torch.randn(2, *network.sample_shape), torch.tensor([0.4, 0.9]), torch.tensor([0.1, 0.9])
    labels = torch.tensor([1, 3])
    with torch.no_grad():
        expected = network(x, t, r, labels=labels)
        torch.testing.assert_close(network(x, t, labels=labels), network(x, t, t, labels=labels))
        assert not torch.allclose(expected[0], network(x, t, labels=labels)[0])
        torch.compiler.reset()
        found = torch.compile(network, backend="eager", fullgraph=True)(x, t, r, labels=labels)
        torch.testing.assert_close(found, expected)
        assert torch.equal(from_pretrained(save_pretrained(network, tmp_path))(x, t, r, labels=labels), expected)


@every_family
def test_reversed_time_is_a_matter_of_the_clock_and_the_sign(name: str, small: Callable[..., Any]) -> None:
    """The same weights with and without the setting: v(x, t, r) = -w(x, 1 - t, 1 - r)."""
    for r_embedding in R_EMBEDDINGS:
        ours = small(name, r_embedding, reversed_time=True).double()
        theirs = create_model(name, r_embedding=r_embedding, **SMALL[name], reversed_time=False).double()
        theirs.load_state_dict(ours.state_dict())
        x, t, r, labels = draw_batch(ours, dtype=torch.float64)
        found, expected = ours(x, t, r, labels=labels), -theirs(x, 1 - t, 1 - r, labels=labels)
        torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary": True, "width": 24, "num_heads": 4}, "rotary needs a head width that is a multiple of 4; got 6"),
        ({"norm": "batch"}, "norm must be one of layer, rms; got 'batch'"),
        ({"early_blocks": 3}, r"early_blocks must lie in \[0, depth\]; got 3 of 2"),
        ({"early_blocks": -1}, "early_blocks must lie in"),
        ({"qk_norm": "batch"}, "qk_norm must be one of None, layer, rms; got 'batch'"),
        ({"qk_norm": True}, "'qk_norm' of 'transformer' must be .*; got True"),
        ({"qk_norm": "rms", "qk_norm_eps": 0.0}, r"qk_norm_eps must lie in \(0, 1\) and needs qk_norm; got 0.0"),
        ({"qk_norm_eps": 1e-6}, r"qk_norm_eps must lie in \(0, 1\) and needs qk_norm"),
        ({"inclusive_frequencies": True, "frequencies": 2}, "inclusive_frequencies needs frequencies >= 4; got 2"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("sit_s_2", **{**SMALL["sit_s_2"], **changes})


@pytest.mark.parametrize(
    ("depth", "asked", "early"), [(28, None, 20), (7, None, 5), (1, None, 1), (2, None, 1), (3, 0, 0), (3, 3, 3)]
)
def test_decoupled_shows_t_to_the_early_blocks_and_r_to_the_others(
    depth: int, asked: int | None, early: int, small: Callable[..., Any]
) -> None:
    network = small("sit_s_2", "decoupled", depth=depth, width=16, reversed_time=False, early_blocks=asked)
    assert network.early_blocks == early
    seen: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    x, t, r, labels = draw_batch(network)
    network(x, t, r, labels=labels)
    label = network.label_embed(labels)
    conditions = [network.time_embed(one) + label for one in (t, r)]
    for index, condition in enumerate(seen):
        assert torch.equal(condition, conditions[index >= early])
