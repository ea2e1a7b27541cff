"""add_interval: any network of one time becomes a student that equals it until it is trained."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo_helpers import draw_batch, randomised

from hd_zoo import (
    DiffusedNoise,
    Guidance,
    ReversedTime,
    add_interval,
    create_model,
    from_pretrained,
    layer_name,
    read_config,
    save_pretrained,
    to_student,
)


class TinyUNet(nn.Module):
    """A convolutional network as a user might write it: one level down, one up, time added to the channels."""

    def __init__(self, channels: int = 2, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.last = nn.Conv2d(2 * width, channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.time_embedding = nn.Sequential(nn.Linear(2, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        condition = self.time_embedding(torch.stack([t, t * t], dim=1))[:, :, None, None]
        wide = self.first(x).tanh()
        small = self.middle(self.norm(self.down(wide) + condition).tanh())
        return self.last(torch.cat([wide, self.up(small + condition)], dim=1))


def unet_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tensor([0.3, 0.6, 0.9], dtype=dtype)
    return torch.randn(3, 2, 8, 8, dtype=dtype), t, t * torch.tensor([0.1, 0.9, 0.5], dtype=dtype)


def trained(student: nn.Module) -> nn.Module:
    """The student as after some steps: its r matters."""
    for module in student.modules():
        if getattr(module, "interval_embed", None) is not None:
            randomised(module.interval_embed, std=0.3)
    return student


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_users_unet_is_equal_bit_for_bit_at_every_r(dtype: torch.dtype) -> None:
    teacher = TinyUNet().to(dtype)
    student = add_interval(teacher)
    x, t, r = unet_batch(dtype)
    for second in (None, t, r, torch.zeros_like(t)):
        assert torch.equal(student(x, t, second), teacher(x, t))
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["mlp_2d", "dit_nano_2"])
@pytest.mark.parametrize("classes", [0, 4])
def test_the_packages_networks_are_equal_bit_for_bit_at_every_r(name: str, classes: int) -> None:
    teacher = randomised(create_model(name, classes=classes), std=0.05)
    student: Any = add_interval(teacher, "time_embed")
    x, t, r, labels = draw_batch(teacher)
    for second in (None, t, r, torch.zeros_like(t)):
        assert torch.equal(student(x, t, second, labels=labels), teacher(x, t, labels=labels))
    assert student.takes_r
    assert (student.sample_shape, student.classes, student.null_label) == (
        teacher.sample_shape,
        teacher.classes,
        teacher.null_label,
    )


def test_the_added_embedding_is_the_one_of_to_student() -> None:
    """The two ways to a student of the same network, with the same new weights, are one function."""
    teacher = randomised(create_model("dit_nano_2", classes=4).double(), std=0.05)
    inner: Any = trained(to_student(teacher))
    student: Any = add_interval(teacher, "time_embed", time_scale=1.0, frequencies=inner.interval_embed.frequencies)
    student.interval_embed.load_state_dict(inner.interval_embed.state_dict())
    x, t, r, labels = draw_batch(teacher, dtype=torch.float64)
    torch.testing.assert_close(student(x, t, r, labels=labels), inner(x, t, r, labels=labels), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(student(x, t, r, labels=labels), student(x, t, t, labels=labels))


def test_the_gradient_reaches_the_new_layers_and_r_matters_after_a_step() -> None:
    student: Any = add_interval(TinyUNet())
    x, t, r = unet_batch()
    before = student(x, t, r)
    before.square().sum().backward()
    last = student.interval_embed.mlp[2]
    assert last.weight.grad.abs().sum() > 0
    assert last.bias.grad.abs().sum() > 0
    torch.optim.SGD(student.parameters(), lr=1e-2).step()
    assert not torch.allclose(student(x, t, r), student(x, t, t))
    student.zero_grad()
    student(x, t, r).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.interval_embed.parameters())


def test_without_r_it_is_the_embedding_of_zero() -> None:
    student = trained(add_interval(TinyUNet()))
    x, t, _ = unet_batch()
    assert torch.equal(student(x, t), student(x, t, t))
    assert not torch.equal(student(x, t), student(x, t, t / 2))


def difference(field: Any, x: Tensor, t: Tensor, r: Tensor, way: tuple[Tensor, Tensor, Tensor], h: float) -> Tensor:
    """Central difference along ``way``."""
    dx, dt, dr = way
    ahead, behind = field(x + h * dx, t + h * dt, r + h * dr), field(x - h * dx, t - h * dt, r - h * dr)
    return (ahead - behind) / (2 * h)


@pytest.mark.parametrize("way", [(1.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.5, -1.0, 2.0)])
def test_the_jvp_is_a_difference_quotient(way: tuple[float, float, float]) -> None:
    student = trained(add_interval(TinyUNet().double()))
    x, t, r = unet_batch(torch.float64)
    tangent = (way[0] * torch.randn_like(x), torch.full_like(t, way[1]), torch.full_like(r, way[2]))
    value, slope = torch.func.jvp(lambda *point: student(*point), (x, t, r), tangent)
    torch.testing.assert_close(value, student(x, t, r))
    torch.testing.assert_close(slope, difference(student, x, t, r, tangent, 1e-5), atol=1e-8, rtol=1e-6)
    assert slope.abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    student = trained(add_interval(TinyUNet()))
    compiled = torch.compile(student, backend=backend, fullgraph=True)
    for seed in range(2):  # the second call runs what the first compiled
        torch.manual_seed(seed)
        x, t, r = unet_batch()
        torch.testing.assert_close(compiled(x, t, r), student(x, t, r), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(compiled(x, t), student(x, t), atol=1e-6, rtol=1e-6)
    compiled(x, t, r).square().sum().backward()
    found = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    student(x, t, r).square().sum().backward()
    for one, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-4, rtol=1e-4)


def test_copies_are_independent() -> None:
    teacher = TinyUNet()
    student: Any = trained(add_interval(teacher))
    twin = copy.deepcopy(student)
    x, t, r = unet_batch()
    expected = student(x, t, r).detach()
    assert torch.equal(twin(x, t, r), expected)
    randomised(twin, std=0.5)
    assert not torch.allclose(twin(x, t, r), expected)
    assert torch.equal(student(x, t, r), expected)
    randomised(teacher, std=0.5)
    assert torch.equal(student(x, t, r), expected), "no storage is shared with the teacher"
    assert not teacher.time_embedding._forward_hooks
    storages = [{tensor.data_ptr() for tensor in one.state_dict().values()} for one in (teacher, student, twin)]
    assert not storages[0] & storages[1]
    assert not storages[1] & storages[2]


def test_mode_and_gradients() -> None:
    teacher = TinyUNet().eval().requires_grad_(False)
    student = add_interval(teacher)
    assert not student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert add_interval(teacher.train()).training


def test_a_foreign_networks_student_survives_as_a_state_dict(tmp_path: Path) -> None:
    teacher = TinyUNet()
    student = randomised(add_interval(teacher))
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    again = add_interval(teacher)
    again.load_state_dict(load_file(tmp_path / "student.safetensors"))
    x, t, r = unet_batch()
    assert torch.equal(again(x, t, r), student(x, t, r))
    with pytest.raises(ValueError, match="create_model, to_student or from_pretrained is needed"):
        save_pretrained(student, tmp_path / "folder")


@pytest.mark.parametrize("converter", [None, ReversedTime, DiffusedNoise])
def test_a_folder_holds_a_student_of_the_packages_networks(converter: Any, tmp_path: Path) -> None:
    network = randomised(create_model("dit_nano_2", classes=4), std=0.05)
    teacher = network if converter is None else converter(network)
    student = trained(add_interval(teacher, layer_name(teacher, "time_embed"), time_scale=2.0)).eval()
    again = from_pretrained(save_pretrained(student, tmp_path))
    x, t, r, labels = draw_batch(network)
    assert torch.equal(again(x, t, r, labels=labels), student(x, t, r, labels=labels))
    assert not torch.equal(again(x, t, r, labels=labels), again(x, t, labels=labels))
    assert read_config(tmp_path)["architecture"] == "added_interval"
    assert type(again) is type(student)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("transformer", "argument 'network' must be an architecture and its arguments; got transformer"),
        ({"architecture": "mlp"}, "argument 'network' must be an architecture"),
        ({"architecture": "added_interval", "arguments": {}}, "argument 'network' must be an architecture"),
        ({"architecture": "mlp", "arguments": {"wdth": 3}}, "unknown argument 'wdth' for 'mlp'"),
    ],
)
def test_a_folder_whose_inner_network_is_wrong(network: Any, message: str, tmp_path: Path) -> None:
    save_pretrained(add_interval(create_model("mlp_2d"), "time_embed"), tmp_path)
    config = read_config(tmp_path)
    config["arguments"]["network"] = network
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_a_claimed_depth_inside_is_not_built(tmp_path: Path) -> None:
    save_pretrained(add_interval(create_model("mlp_2d"), "time_embed"), tmp_path)
    config = read_config(tmp_path)
    config["arguments"]["network"]["arguments"]["depth"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="1000000000 blocks"):
        from_pretrained(tmp_path)


def test_behind_a_converter_r_goes_by_its_clock() -> None:
    """With reversed time the network is shown 1 - t, and its interval is (1 - t) - (1 - r) = -(t - r)."""
    network = TinyUNet().double()
    student: Any = trained(add_interval(ReversedTime(network), "network.time_embedding"))
    assert isinstance(student, ReversedTime)
    x, t, r = unet_batch(torch.float64)
    torch.testing.assert_close(student(x, t, r), -student.network(x, 1 - t, 1 - r))
    assert student.takes_r


def test_a_student_is_copied_as_it_is() -> None:
    first = trained(add_interval(randomised(create_model("mlp_2d", classes=3)), "time_embed"))
    x, t, r, labels = draw_batch(first)
    for second in (add_interval(first), to_student(first)):
        assert torch.equal(second(x, t, r, labels=labels), first(x, t, r, labels=labels))
        trained(second)
        assert not torch.equal(second(x, t, r, labels=labels), first(x, t, r, labels=labels))


def test_guidance_doubles_the_batch() -> None:
    student = trained(add_interval(randomised(create_model("mlp_2d", classes=3).double()), "time_embed"))
    x, t, r, labels = draw_batch(student, dtype=torch.float64)
    null = torch.full_like(labels, 3)
    expected = 3 * student(x, t, r, labels=labels) - 2 * student(x, t, r, labels=null)
    torch.testing.assert_close(Guidance(student, 3.0, null={"labels": 3})(x, t, r, labels=labels), expected)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        student = trained(add_interval(TinyUNet()))
        parallel = nn.parallel.DistributedDataParallel(student)
        x, t, r = unet_batch()
        assert torch.equal(parallel(x, t, r), student(x, t, r))
        parallel(x, t, r).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in student.interval_embed.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_activations_of_the_whole_student_may_be_recomputed() -> None:
    student: Any = trained(add_interval(TinyUNet()))
    x, t, r = unet_batch()
    out = torch.utils.checkpoint.checkpoint(student, x, t, r, use_reentrant=False)
    out.square().sum().backward()
    found = student.interval_embed.mlp[0].weight.grad.clone()
    student.zero_grad()
    student(x, t, r).square().sum().backward()
    torch.testing.assert_close(found, student.interval_embed.mlp[0].weight.grad)


class Several(nn.Module):
    """Each block has a time embedding of its own; the first one's also serves the end, as in diffusers' DiT."""

    def __init__(self, widths: tuple[int, ...] = (6, 6, 6), ends: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"emb": nn.Linear(1, width)}) for width in widths)
        self.ends = ends

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = (x + block["emb"](t[:, None])).tanh()
        return x + self.blocks[0]["emb"](t[:, None]) if self.ends else x


def test_several_modules_by_a_pattern() -> None:
    teacher = Several(ends=False).double()
    student: Any = trained(add_interval(teacher, "blocks.*.emb"))
    x, t = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    added = student.interval_embed(t - t / 2)
    expected = x
    for block in teacher.blocks:
        expected = (expected + block["emb"](t[:, None]) + added).tanh()
    torch.testing.assert_close(student(x, t, t / 2), expected)
    assert student.at == ["blocks.0.emb", "blocks.1.emb", "blocks.2.emb"]
    some = add_interval(teacher, ["blocks.2.emb", "blocks.0.emb"])
    assert some.at == ["blocks.2.emb", "blocks.0.emb"]


def test_a_module_that_runs_twice() -> None:
    x, t = torch.randn(3, 6), torch.rand(3)
    student = add_interval(Several(), "blocks.*.emb")
    with pytest.raises(RuntimeError, match=r"'blocks\.0\.emb' ran 2 times in one call: .* give repeated=True"):
        student(x, t)
    student = trained(add_interval(Several(), "blocks.*.emb", repeated=True))
    assert not torch.equal(student(x, t, t / 2), student(x, t))


class Odd(nn.Module):
    """Modules whose outputs nothing can be added to."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 4)

        def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(t), t

    def __init__(self) -> None:
        super().__init__()
        self.time_pair, self.unused, self.flat = Odd.Pair(), nn.Linear(1, 4), nn.Linear(1, 4)
        self.waves = nn.SiLU()

    def forward(self, x: Tensor, t: Tensor) -> Any:
        first, _ = self.time_pair(t[:, None])
        return x + first + self.flat(t[:1]) + self.waves(t[:, None])


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ("time_pair", TypeError, r"'time_pair' returns a tuple, not a tensor: .*candidates: time_pair\.linear"),
        ("unused", RuntimeError, "'unused' did not run in this call"),
        ("flat", ValueError, r"'flat' returns shape \(4,\), not \(3, 4\)"),
    ],
)
def test_outputs_that_do_not_fit(at: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_interval(Odd(), at)(torch.randn(3, 4), torch.rand(3), torch.zeros(3))


def test_a_width_is_guessed_and_may_be_given() -> None:
    """The one of the last nn.Linear."""
    with pytest.raises(ValueError, match=r"'waves' holds no nn\.Linear that would tell its width; give width="):
        add_interval(Odd(), "waves")
    student: Any = trained(add_interval(Odd(), "waves", width=1))
    x, t = torch.randn(3, 4), torch.rand(3)
    with torch.no_grad():  # waves runs behind nothing else, so that the difference is the embedding's own
        shown = student(x, t, t / 2) - student(x, t)
        expected = student.interval_embed(t / 2) - student.interval_embed(0 * t)
    torch.testing.assert_close(shown, expected.expand(3, 4))
    with pytest.raises(ValueError, match=r"'waves' returns shape \(3, 1\), not \(3, 2\)"):
        add_interval(Odd(), "waves", width=2)(x, t)
    with pytest.raises(ValueError, match=r"widths differ: \{'blocks\.0\.emb': 6, 'blocks\.1\.emb': 4\}"):
        add_interval(Several((6, 4)), "blocks.*.emb")


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("time_embeding", r"no module 'time_embeding'; nearest: time_embedding"),
        ("model.time_embedding", r"no module 'model\.time_embedding'; nearest: time_embedding"),
        ("t_embedder.*", r"no module 't_embedder\.\*'; nearest: time_embedding"),
        ([], r"at must be a module's name or a list of them; got \[\]"),
        ("", "at must be a module's name"),
        ([3], "at must be a module's name"),
        (["time_embedding", "time_embedding"], "at names 'time_embedding' twice"),
    ],
)
def test_names_that_make_no_sense(at: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        add_interval(TinyUNet(), at)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_is_no_teacher() -> None:
    network = create_model("mlp_2d", classes=3)
    with pytest.raises(ValueError, match=r"the field inside Guidance: add_interval\(guidance\.field"):
        add_interval(Guidance(network, 2.0, null={"labels": 3}), "field.time_embed")
    with pytest.raises(ValueError, match="this MLPField takes r already; to_student copies it"):
        add_interval(to_student(network), "time_embed")
    for settings, message in (
        ({"frequencies": 3}, "frequencies must be even and >= 2; got 3"),
        ({"time_scale": 0.0}, "time_scale must be > 0 and finite; got 0.0"),
        ({"time_scale": math.nan}, "time_scale must be > 0"),
        ({"width": 0}, "width must be >= 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            add_interval(network, "time_embed", **settings)


def test_calls_that_would_go_wrong_silently() -> None:
    student: Any = add_interval(TinyUNet())
    x, t, r = unet_batch()
    with pytest.raises(RuntimeError, match="'time_embedding' ran outside of its student's call: call the student"):
        student.network(x, t)
    with pytest.raises(ValueError, match=r"r must have shape \(3,\); got \(1,\)"):
        student(x, t, r[:1])
    student._is_replica = True
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel does not work"):
        student(x, t, r)


def test_an_error_in_the_network_leaves_the_student_as_it_was() -> None:
    student: Any = trained(add_interval(TinyUNet()))
    x, t, r = unet_batch()
    expected = student(x, t, r)
    with pytest.raises(RuntimeError, match="channels"):
        student(x[:, :1], t, r)
    with pytest.raises(RuntimeError, match="outside of its student's call"):
        student.network(x, t)
    assert torch.equal(student(x, t, r), expected)
