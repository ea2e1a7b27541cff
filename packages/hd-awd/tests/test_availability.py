"""Which path attention_pool takes, and the reason it gives where the kernels cannot be used. Needs no Triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hd_awd import attention_pool
from hd_awd.pooling.availability import OLDEST_TRITON

TOKENS, QUERIES = torch.randn(2, 5, 6), torch.randn(3, 6)


def fresh_availability() -> ModuleType:
    """The module afresh: nothing remembered of this machine."""
    spec = importlib.util.find_spec("hd_awd.pooling.availability")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend(monkeypatch: pytest.MonkeyPatch, *, version: str | None = "3.4.0", interpret: str | None = "1") -> None:
    """A machine with that version of Triton, None for none, and its interpreter on or not (TRITON_INTERPRET)."""
    real = importlib.metadata.version

    def found(name: str) -> str:
        if name != "triton":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    if interpret is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)


class Elsewhere:
    """As much of a tensor on a CUDA device as a check looks at."""

    dtype, device, shape = torch.float32, torch.device("cuda"), TOKENS.shape


@pytest.mark.parametrize("version", ["OLDEST.0", "3.10.0", "3.4.0+git1234", "4.0"])
def test_no_objection(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    pretend(monkeypatch, version=version.replace("OLDEST", ".".join(map(str, OLDEST_TRITON))))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert fresh_availability().why_not_triton(TOKENS.to(dtype), QUERIES.to(dtype)) is None


def test_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, version=None)
    assert "Triton is not installed" in fresh_availability().why_not_triton(TOKENS, QUERIES)


@pytest.mark.parametrize("version", ["2.3.1", "3.1.0", "3.0.0.post1"])
def test_triton_is_too_old(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    pretend(monkeypatch, version=version)
    reason = fresh_availability().why_not_triton(TOKENS, QUERIES)
    assert f"{'.'.join(map(str, OLDEST_TRITON))} or newer" in reason
    assert version in reason


@pytest.mark.parametrize("interpret", [None, "0"])
def test_the_device_is_no_gpu(monkeypatch: pytest.MonkeyPatch, interpret: str | None) -> None:
    pretend(monkeypatch, interpret=interpret)
    reason = fresh_availability().why_not_triton(TOKENS, QUERIES)
    assert '"cuda"' in reason
    assert '"cpu"' in reason


@pytest.mark.parametrize(
    ("capability", "hip", "objects"), [((7, 5), None, True), ((8, 0), None, False), ((12, 0), None, False),
                                       ((7, 5), "6.4", False)]
)  # fmt: skip
def test_the_gpu_is_too_old(monkeypatch: pytest.MonkeyPatch, capability: Any, hip: Any, objects: bool) -> None:
    pretend(monkeypatch, interpret=None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    reason = fresh_availability().why_not_triton(Elsewhere(), QUERIES)
    assert (reason is not None) == objects
    if objects:
        assert "8.0 or newer" in reason
        assert "7.5" in reason


@pytest.mark.parametrize(
    ("tokens", "queries", "reason"),
    [
        (TOKENS.double(), QUERIES, "float32, bfloat16 or float16; got torch.float64"),
        (TOKENS, QUERIES.double(), "got torch.float32 and torch.float64"),
        (torch.zeros(1, 2, 4097), torch.zeros(3, 4097), "at most 4096 channels and 16 queries; got 4097 and 3"),
        (torch.zeros(1, 2, 6), torch.zeros(17, 6), "at most 4096 channels and 16 queries; got 6 and 17"),
        (torch.zeros(1).expand(2, 2**20, 2048), torch.zeros(1, 2048), r"fewer than 2\^31 elements and scores; got"),
        (torch.zeros(1).expand(1, 2**27, 1), torch.zeros(16, 1), "elements and scores; got 2147483648"),
        (torch.zeros(1).expand(1, 2097121, 600), torch.zeros(16, 600), "at most 2097120 tokens; got 2097121"),
    ],
)
def test_what_the_kernels_do_not_take(
    monkeypatch: pytest.MonkeyPatch, tokens: Tensor, queries: Tensor, reason: str
) -> None:
    pretend(monkeypatch)
    assert re.search(reason, fresh_availability().why_not_triton(tokens, queries))


@pytest.mark.parametrize(
    ("tokens", "queries"),
    [
        (torch.zeros(1, 2, 4096), torch.zeros(16, 4096)),
        (torch.zeros(1, 1, 1), torch.zeros(1, 1)),
        (torch.zeros(1).expand(5, 2**20 - 1, 2048), torch.zeros(1, 2048)),
        (torch.zeros(0, 3, 6), torch.zeros(1, 6)),
    ],
)
def test_the_limits_themselves_are_fine(monkeypatch: pytest.MonkeyPatch, tokens: Tensor, queries: Tensor) -> None:
    pretend(monkeypatch)
    assert fresh_availability().why_not_triton(tokens, queries) is None


@pytest.mark.parametrize("backend", ["nope", "", "Triton", "cuda"])
def test_an_unknown_backend(backend: str) -> None:
    with pytest.raises(ValueError, match=f"auto, triton, torch; got '{backend}'"):
        attention_pool(TOKENS, QUERIES, backend=backend)


@pytest.mark.parametrize(
    ("pretence", "reason"),
    [
        ({"version": None}, "Triton is not installed"),
        ({"version": "3.1.0"}, "found 3.1.0"),
        ({"interpret": None}, 'on "cpu"'),
    ],
)
def test_the_op_says_why_not(monkeypatch: pytest.MonkeyPatch, pretence: dict[str, Any], reason: str) -> None:
    pretend(monkeypatch, **pretence)
    monkeypatch.setattr("hd_awd.pooling.op.why_not_triton", fresh_availability().why_not_triton)
    with pytest.raises(RuntimeError, match=f'"triton" cannot be used here: .*{reason}'):
        attention_pool(TOKENS, QUERIES, backend="triton")
    assert torch.equal(attention_pool(TOKENS, QUERIES), attention_pool(TOKENS, QUERIES, backend="torch"))


def test_the_op_says_why_not_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr("hd_awd.pooling.op.why_not_triton", fresh_availability().why_not_triton)
    with pytest.raises(RuntimeError, match=r'"triton" cannot be used here: .*float64'):
        attention_pool(TOKENS.double(), QUERIES.double(), backend="triton")


def test_a_machine_without_interpreter_or_gpu_in_a_process_of_its_own() -> None:
    """Nothing pretended: whatever is installed here, CPU tensors are refused with a reason, and no kernel is loaded."""
    script = """
import sys, torch
from hd_awd import attention_pool, why_not_triton
tokens, queries = torch.randn(2, 5, 6), torch.randn(3, 6)
attention_pool(tokens.requires_grad_(), queries).sum().backward()
reason = why_not_triton(tokens, queries)
try:
    attention_pool(tokens, queries, backend="triton")
except RuntimeError as error:
    assert reason and reason in str(error), error
    print("refused", any(name.endswith("kernels.launch") for name in sys.modules))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["refused", "False"]
