"""UNets with attention, compiled students, and fields without a forward derivative."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from meanflow_helpers import MLP, UNETS, Recorder, seeded
from torch import Tensor, nn

from hd_meanflow import MeanFlowLoss, UniformTimes, total_derivative


def draw_images(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t and v (4, 3, 8, 8), t and r (4,)."""
    x, v = torch.randn(2, 4, 3, 8, 8, dtype=dtype)
    t = torch.tensor([0.5, 0.6, 0.7, 0.8], dtype=dtype)
    return x, v, t, t / 2


@pytest.mark.parametrize("unet", UNETS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_jvp_of_a_unet_is_its_derivative(unet: str, memory_format: torch.memory_format) -> None:
    """Against a finite difference, with attention in the network and whatever the layout of its inputs."""
    net = UNETS[unet]().double()
    x, v, t, r = draw_images()
    exact = total_derivative(net, x.to(memory_format=memory_format), t, r, v.to(memory_format=memory_format))
    # diffusers embeds the time in float32: a wider step keeps its rounding small.
    step, tolerance = (1e-4, 1e-5) if unet == "written here" else (1e-2, 2e-3)
    near = total_derivative(net, x, t, r, v, method="difference", step=step)
    torch.testing.assert_close(exact, near, atol=tolerance, rtol=tolerance)
    assert exact.abs().max() > 0.1


@pytest.mark.parametrize("unet", UNETS)
@pytest.mark.parametrize("derivative", ["jvp", "difference"])
@pytest.mark.parametrize("from_scratch", [True, False])
def test_the_loss_trains_a_unet(unet: str, derivative: Any, from_scratch: bool) -> None:
    student, teacher = UNETS[unet](), UNETS[unet]().requires_grad_(False)
    x, noise, _, _ = draw_images(torch.float32)
    loss = MeanFlowLoss(times=UniformTimes(interval_share=0.5), derivative=derivative)
    output = loss(student, x, noise, teacher=None if from_scratch else teacher, generator=seeded())
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.derivative_rms > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_both_attention_paths_of_diffusers_have_the_same_derivative() -> None:
    """Its plain attention (softmax written out) and its fused one, which takes the math path here."""
    net = UNETS["diffusers"]().double()
    processor = pytest.importorskip("diffusers.models.attention_processor")
    x, v, t, r = draw_images()
    fused = total_derivative(net, x, t, r, v)
    attentions = [module for module in net.modules() if isinstance(module, processor.Attention)]
    for module in attentions:
        module.set_processor(processor.AttnProcessor())
    assert attentions
    torch.testing.assert_close(total_derivative(net, x, t, r, v), fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_of_a_tensor_with_channels_last(groups: int, affine: bool) -> None:
    """PyTorch 2.13's own forward derivative fails there; the oracle is reverse mode, taken twice."""
    norm = nn.GroupNorm(groups, 8, affine=affine).double()

    def field(x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) * t[:, None, None, None]

    x, v = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    t = torch.tensor([0.4, 0.6, 0.8], dtype=torch.float64)
    exact = torch.autograd.functional.jvp(lambda x, t: field(x, t), (x, t), (v, torch.ones_like(t)))[1]
    torch.testing.assert_close(total_derivative(field, x, t, t / 2, v), exact, atol=1e-10, rtol=0)


def drops_tangents(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
    """A compiler's backend that, like inductor, runs kernels that know nothing of tangents."""

    def run(*args: Any) -> Any:
        plain = [forward_ad.unpack_dual(arg).primal if isinstance(arg, Tensor) else arg for arg in args]
        return tuple(output.detach() for output in graph(*plain))

    return run


def compiled_backends() -> list[Any]:
    """The stand-in everywhere; inductor itself where there is a C++ compiler."""
    missing = shutil.which("g++") is None and shutil.which("clang++") is None
    inductor = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(missing, reason="no C++ compiler")])
    return [pytest.param(drops_tangents, id="stand-in"), inductor]


@pytest.mark.parametrize("backend", compiled_backends())
@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_student_has_the_derivative_of_the_plain_one(backend: Any, inside: bool) -> None:
    """The module compiled as a whole, and a callable with a compiled module inside; compiled again afterwards."""
    net = MLP(3)
    x, v = torch.randn(2, 5, 3)
    t = torch.linspace(0.3, 0.9, 5)
    exact = total_derivative(net, x, t, t / 2, v)
    compiled = torch.compile(net, backend=backend)
    field = (lambda x, t, r: compiled(x, t, r)) if inside else compiled
    with torch.no_grad():
        before = field(x, t, t / 2)
    torch.testing.assert_close(total_derivative(field, x, t, t / 2, v), exact)
    assert exact.abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(field(x, t, t / 2), before)
    torch.compiler.reset()


def test_without_a_compiler_in_use_none_is_imported() -> None:
    """Importing the compiler takes seconds; a student that is not compiled does without."""
    code = (
        "import sys, torch; from hd_meanflow import total_derivative as d\n"
        "x, t = torch.randn(3, 2), torch.rand(3)\n"
        "d(lambda x, t, r: x * t[:, None], x, t, t / 2, x)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert run_python(code) == "False"


def run_python(code: str) -> str:
    """What an interpreter of its own prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class NoDerivative(torch.autograd.Function):
    """An operator without a forward derivative, as custom kernels are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_an_operator_without_a_forward_derivative_is_named_with_the_way_out() -> None:
    def field(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return NoDerivative.apply(x) * t[:, None]

    x, t = torch.randn(3, 2), torch.tensor([0.4, 0.6, 0.8])
    with pytest.raises(ValueError, match=r"no forward derivative \(.*\)\. Use derivative=\"difference\"") as caught:
        total_derivative(field, x, t, t / 2, x)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "\n" not in str(caught.value)
    by_hand = x.cos() * x * t[:, None] + x.sin()
    got = total_derivative(field, x, t, t / 2, x, method="difference", step=1e-3)
    torch.testing.assert_close(got, by_hand, atol=1e-3, rtol=1e-3)


def test_an_error_of_the_field_itself_stays_its_own() -> None:
    """What fails on plain tensors too is not blamed on the derivative."""

    def broken(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return x @ x

    x, t = torch.randn(3, 2), torch.rand(3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        total_derivative(broken, x, t, t / 2, x)


def test_running_out_of_memory_is_not_tried_twice() -> None:
    def hungry(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    field = Recorder(hungry)
    x, t = torch.randn(3, 2), torch.rand(3)
    with pytest.raises(torch.OutOfMemoryError):
        total_derivative(field, x, t, t / 2, x)
    assert len(field.calls) == 1
