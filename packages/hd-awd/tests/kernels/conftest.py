"""The device that the kernels run on, and memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from awd_helpers import INTERPRETED, skip_without


@pytest.fixture(scope="session", params=["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where tensors lie: on the CPU for the interpreter, on a GPU otherwise."""
    skip_without(request.param)
    return request.param


@pytest.fixture(scope="session")
def cuda() -> str:
    skip_without("cuda")
    return "cuda"


@pytest.fixture(scope="session")
def interpreter() -> None:
    skip_without("cpu")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN: what a kernel does not write is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it when operations are deterministic
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def _as_quiet_as_a_gpu() -> Iterator[None]:
    """NumPy, which the interpreter runs on, warns of log(0) and of overflow also where the kernel selects them away."""
    with np.errstate(divide="ignore", over="ignore"):
        yield
