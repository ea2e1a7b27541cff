"""The pooling's arguments are stated once, in PoolInputs: everything else that takes them agrees with it."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from awd_helpers import launcher

from hd_awd import attention_pool
from hd_awd.pooling import autograd, blocks
from hd_awd.pooling.folded import attention_pool_folded
from hd_awd.pooling.inputs import Incoming, Path, PoolInputs
from hd_awd.pooling.reference import attention_pool_reference

INPUTS = [field.name for field in dataclasses.fields(PoolInputs)]
INCOMING = [field.name for field in dataclasses.fields(Incoming)]


@pytest.mark.parametrize("function", [attention_pool_reference, attention_pool_folded])
def test_the_functions_take_what_the_public_op_takes(function: Callable[..., Any]) -> None:
    """Names, order, types and defaults."""
    public = list(inspect.signature(attention_pool).parameters.values())[: len(INPUTS)]
    assert [parameter.name for parameter in public] == INPUTS
    assert list(inspect.signature(function).parameters.values()) == public


def test_the_operators_take_the_fields_one_by_one() -> None:
    def arguments(op: Any) -> list[str]:
        return [argument.name for argument in op._opoverload._schema.arguments]

    assert arguments(autograd.pool_op) == [*INPUTS, "want_weights", "triton"]
    assert arguments(autograd.pool_backward_op) == [*INPUTS, *INCOMING, "triton"]
    assert str(autograd.pool_op._opoverload._schema).startswith(
        "hd_awd::attention_pool(Tensor tokens, Tensor queries, Tensor? bias, Tensor? mask, float eps, bool want_weights"
    )


@pytest.mark.parametrize("name", ["blocks", "kernels"])
@pytest.mark.parametrize("function", ["pool_forward", "pool_backward"])
def test_every_path_has_the_two_functions(name: str, function: str) -> None:
    """The kernels' take a plan beside, which has a default."""
    if name == "kernels" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    path = blocks if name == "blocks" else launcher()
    declared = inspect.signature(getattr(Path, function))
    found = inspect.signature(getattr(path, function))
    required = [one for one in found.parameters.values() if one.default is inspect.Parameter.empty]
    assert required == list(declared.parameters.values())[1:]  # without self
    assert found.return_annotation == declared.return_annotation
    assert set(found.parameters) - {one.name for one in required} <= {"plan"}


def test_sizes_and_the_dtype_of_the_arithmetic() -> None:
    inputs = PoolInputs(torch.zeros(2, 5, 6, dtype=torch.bfloat16), torch.zeros(3, 6), None, None, 1e-6)
    assert inputs.sizes == (2, 5, 6, 3)
    assert inputs.dtype == torch.float32
    assert dataclasses.replace(inputs, tokens=inputs.tokens.double()).dtype == torch.float64
