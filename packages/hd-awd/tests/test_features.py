"""FeatureTap: what it returns, in which order, with which graph, and how it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from awd_helpers import ConvNet, TokenNet
from torch import Tensor, nn

from hd_awd import FeatureTap, as_tokens


def hook_count(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def test_tokens_of_a_transformer() -> None:
    token_net = TokenNet().requires_grad_(False)
    x = torch.randn(2, 5, 3)
    features = FeatureTap(token_net, ["embed", "blocks.1"])(x)
    embedded = token_net.embed(x)
    assert torch.equal(features[0], embedded)
    assert torch.equal(features[1], token_net.blocks[1](token_net.blocks[0](embedded)))


def test_a_convolutional_map_becomes_tokens_row_by_row() -> None:
    conv_net = ConvNet().requires_grad_(False)
    x = torch.randn(2, 2, 4, 6)
    tokens = FeatureTap(conv_net, ["first"])(x)[0]
    feature = conv_net.first(x)
    assert tokens.shape == (2, 24, 3)
    for row in range(4):
        for column in range(6):
            assert torch.equal(tokens[:, 6 * row + column], feature[:, :, row, column])


def test_a_tuple_stands_for_its_first_entry_and_a_vector_is_one_token() -> None:
    conv_net = ConvNet().requires_grad_(False)
    x = torch.randn(2, 2, 4, 4)
    stage, vector = FeatureTap(conv_net, ["stages.0", "last"])(x)
    expected = conv_net.stages[0](conv_net.first(x).tanh())[0]
    assert torch.equal(stage, expected.flatten(2).transpose(1, 2))
    assert torch.equal(vector, conv_net(x)[:, None])


@pytest.mark.parametrize("names", [["stages.1", "first", "last"], ["last", "first", "stages.1"]])
def test_features_come_in_the_order_of_the_names(names: list[str]) -> None:
    conv_net = ConvNet().requires_grad_(False)
    x = torch.randn(2, 2, 4, 4)
    alone = [FeatureTap(conv_net, [name])(x)[0] for name in names]
    together = FeatureTap(conv_net, names)(x)
    assert [tuple(f.shape) for f in together] == [tuple(f.shape) for f in alone]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_run_also_returns_the_plain_output() -> None:
    conv_net = ConvNet().requires_grad_(False)
    x, t, shift = torch.randn(2, 2, 4, 4), torch.rand(2), torch.randn(2, 3)
    tap = FeatureTap(conv_net, ["stages.0"])
    output, features = tap.run(x, t, shift=shift)
    assert torch.equal(output, conv_net(x, t, shift=shift))
    assert torch.equal(features[0], tap(x, t, shift=shift)[0])
    assert not torch.equal(features[0], tap(x)[0])


def test_gradient_flows_into_the_input_and_not_into_the_frozen_network() -> None:
    conv_net = ConvNet().requires_grad_(False)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    tap = FeatureTap(conv_net.double(), ["stages.1", "last"])

    def total(x: Tensor) -> Tensor:
        return sum(feature.square().sum() for feature in tap(x))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(total, (x,))
    total(x).backward()
    assert torch.all(x.grad != 0)
    assert all(parameter.grad is None for parameter in conv_net.parameters())


def test_a_network_that_is_not_frozen_is_in_the_graph() -> None:
    conv_net = ConvNet().requires_grad_(False)
    conv_net.requires_grad_(True)
    FeatureTap(conv_net, ["first"])(torch.randn(1, 2, 3, 3))[0].sum().backward()
    assert conv_net.first.weight.grad.abs().sum() > 0
    assert conv_net.last.weight.grad is None


def test_hooks_are_there_during_the_call_alone() -> None:
    conv_net = ConvNet().requires_grad_(False)
    seen = []
    conv_net.last.register_forward_hook(lambda module, args, output: seen.append(hook_count(conv_net)))
    tap = FeatureTap(conv_net, ["first", "stages.0"])
    assert hook_count(conv_net) == 1
    tap(torch.randn(1, 2, 3, 3))
    assert seen == [3]
    assert hook_count(conv_net) == 1


def test_hooks_are_removed_after_an_exception() -> None:
    conv_net = ConvNet().requires_grad_(False)
    tap = FeatureTap(conv_net, ["first", "last"])
    with pytest.raises(RuntimeError, match="channels"):
        tap(torch.randn(1, 5, 3, 3))
    assert hook_count(conv_net) == 0
    with pytest.raises(TypeError):
        tap()
    assert hook_count(conv_net) == 0
    assert len(tap(torch.randn(1, 2, 3, 3))) == 2


def test_a_missing_name_lists_the_nearest() -> None:
    conv_net = ConvNet().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no module 'stages\.7'; nearest: .*stages\.[01]"):
        FeatureTap(conv_net, ["first", "stages.7"])
    with pytest.raises(ValueError, match=r"no module 'frist'; nearest: first,"):
        FeatureTap(conv_net, ["frist"])
    with pytest.raises(ValueError, match="nearest: none"):
        FeatureTap(nn.Identity(), ["x"])


def test_the_list_of_near_names_stays_short() -> None:
    deep = nn.Sequential(*(nn.Sequential(nn.Identity(), nn.Identity()) for _ in range(40)))
    with pytest.raises(ValueError, match=r"no module '39\.2'") as caught:
        FeatureTap(deep, ["39.2"])
    near = str(caught.value).split("nearest: ")[1].split(", ")
    assert len(near) <= 8
    assert {"39.0", "39.1"} <= set(near)


@pytest.mark.parametrize(
    ("names", "message"), [([], "non-empty"), ("first", "non-empty"), (["first", "first"], "not repeat")]
)
def test_names_that_make_no_sense(names: Any, message: str) -> None:
    conv_net = ConvNet().requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        FeatureTap(conv_net, names)


def test_a_module_that_does_not_run() -> None:
    conv_net = ConvNet().requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'unused' did not run in this call.*exactly once"):
        FeatureTap(conv_net, ["first", "unused"])(torch.randn(1, 2, 3, 3))
    assert hook_count(conv_net) == 0


def test_a_module_that_runs_twice() -> None:
    shared = nn.Linear(3, 3)
    network = nn.Sequential(shared, nn.Tanh(), shared)
    with pytest.raises(RuntimeError, match="'0' ran 2 times in this call"):
        FeatureTap(network, ["0"])(torch.randn(2, 3))


def test_two_calls_do_not_mix() -> None:
    conv_net = ConvNet().requires_grad_(False)
    tap, (one, two) = FeatureTap(conv_net, ["first"]), torch.randn(2, 1, 2, 3, 3)
    first = tap(one)[0].clone()
    second = tap(two)[0]
    assert not torch.equal(first, second)
    assert torch.equal(tap(one)[0], first)


@pytest.mark.parametrize(
    ("feature", "error", "message"),
    [
        ({"hidden": torch.randn(2, 3)}, TypeError, "the block puts out dict, not a tensor"),
        ((), TypeError, "puts out tuple"),
        ((None, torch.randn(2, 3)), TypeError, "puts out NoneType"),
        (torch.randn(2), ValueError, r"the block puts out shape \(2,\)"),
        (torch.randn(1, 2, 3, 4, 5, 6), ValueError, r"\(1, 2, 3, 4, 5, 6\)"),
    ],
)
def test_outputs_that_are_no_tokens(feature: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_tokens(feature, "the block")


def test_tokens_are_passed_as_they_are() -> None:
    tokens = torch.randn(2, 3, 4)
    assert as_tokens(tokens) is tokens
    assert as_tokens([tokens, 1]) is tokens
