"""Which kernels hd-awd launches, with which compile-time arguments, on which GPU: found without one.

Shapes and kernels are not listed twice: the package's own launch code runs on tensors without memory, with recorders in
the kernels' places.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import kernel_tables
import torch
from torch import Tensor

from hd_awd.pooling.inputs import Incoming, PoolInputs
from hd_awd.pooling.kernels import launch, one_pass, two_pass

KERNELS = {
    name: getattr(module, name)
    for module in (one_pass, two_pass)
    for name in vars(module)
    if name.startswith("attention_pool_") and name.endswith("_kernel")
}
# (N, C) of the microbenchmark: SiT-B/2, SiT-XL/2 at 256 and 512 pixels, SANA; beside them a short and the longest row.
USED = [(256, 768), (256, 1152), (1024, 1152), (1024, 2240)]
SHAPES = [(256, 72), *USED, (1024, 4096)]
BATCHES = (1, 16)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1"}

Launch = tuple[str, dict[str, Any]]  # a kernel's name and its arguments by name


@dataclasses.dataclass(frozen=True)
class Job:
    """One compilation, as Triton's just-in-time compiler would be asked for it.

    Attributes:
        target: a name of ``kernel_tables.TARGETS``.
        kernel: a name of KERNELS.
        constants: compile-time arguments by name.
        signature: the other arguments' types by name.
        divisible: those of the latter that are known to be multiples of 16.
        warps: of a program.
        dtype: of the tokens.
        variant: what of the arguments is there or not, for the table.
    """

    target: str
    kernel: str
    constants: dict[str, Any]
    signature: dict[str, str]
    divisible: list[str]
    warps: int
    dtype: str
    variant: str

    @property
    def row(self) -> kernel_tables.Row:
        """What identifies the row of the table: the columns ``kernel_tables.KEY``."""
        found = {
            "kernel": self.kernel + self.variant,
            "target": self.target,
            "dtype": self.dtype,
            "C": self.constants["WIDTH"],
            "M": self.constants["NUM_QUERIES"],
            "block_n": self.constants.get("BLOCK_N", ""),
            "row_head": self.constants.get("ROW_HEAD", self.constants.get("BLOCK_C")),
            "row_tail": self.constants.get("ROW_TAIL", 0),
            "warps": self.warps,
        }
        return {name: str(value) for name, value in found.items()}


class Recorder:
    """Stands in a kernel's place and notes its arguments."""

    def __init__(self, name: str, calls: list[Launch]) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch_kernel(*arguments: Any, **keywords: Any) -> None:
            self.calls.append((self.name, dict(zip(KERNELS[self.name].arg_names, arguments, strict=False)) | keywords))

        return launch_kernel


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """What the launch code would launch on that target."""
    calls: list[Launch] = []
    lanes, processors, _ = kernel_tables.TARGETS[target]
    with contextlib.ExitStack() as stack:
        for name, kernel in KERNELS.items():
            module = one_pass if getattr(one_pass, name, None) is kernel else two_pass
            stack.enter_context(mock.patch.object(module, name, Recorder(name, calls)))
        stack.enter_context(mock.patch.object(launch, "_device_facts", return_value=(lanes, processors)))
        yield calls


def launches(target: str) -> list[Launch]:
    """Every launch over the grid of shapes, forward and backward; every option at two shapes."""
    with recording(target) as calls:
        for dtype in (torch.bfloat16, torch.float32):
            for (num_tokens, width), batch in itertools.product(SHAPES, BATCHES):
                for num_queries in (1, 4, 16):
                    run((batch, num_tokens, width, num_queries), dtype)
        for (num_tokens, width), batch in itertools.product(USED, BATCHES):
            for num_queries in (2, 3):
                run((batch, num_tokens, width, num_queries), torch.bfloat16)
                run((batch, num_tokens, width, num_queries), torch.float32)
            run((batch, num_tokens, width, 4), torch.float16)
        for num_tokens, width in ((256, 1152), (1024, 2240)):
            for num_queries, dtype in itertools.product((1, 4), (torch.bfloat16, torch.float32)):
                run((16, num_tokens, width, num_queries), dtype, extras=True)
                run((16, num_tokens, width, num_queries), dtype, want_tokens=False)
    return calls


def run(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, *, extras: bool = False, want_tokens: bool = True
) -> None:
    """Forward and backward for B, N, C, M, with a bias, a mask and the weights or without; nothing is computed."""
    batch, num_tokens, width, num_queries = sizes
    with torch.device("meta"):
        tokens, queries = torch.empty(batch, num_tokens, width, dtype=dtype), torch.empty(num_queries, width)
        bias = torch.empty(batch, num_queries, num_tokens) if extras else None
        mask = torch.empty(batch, num_tokens, dtype=torch.bool) if extras else None
        lse, dz = torch.empty(batch, num_queries), torch.empty(batch, num_queries, width)
    inputs = PoolInputs(tokens, queries, bias, mask, 1e-6)
    launch.pool_forward(inputs, extras)
    launch.pool_backward(inputs, Incoming(dz, bias, lse, lse, want_tokens, extras))


def jobs(target: str, calls: list[Launch]) -> list[Job]:
    """The compilations behind the launches, each once."""
    found = {repr(job): job for job in (specialise(target, *call) for call in calls)}
    return list(found.values())


def specialise(target: str, kernel: str, arguments: dict[str, Any]) -> Job:
    """The compilation that Triton's just-in-time compiler would make of a call."""
    constants, signature, divisible = {}, {}, []
    for name in KERNELS[kernel].arg_names:
        value = arguments.get(name)
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            divisible.append(name)
        elif value is None or name.isupper() or value == 1:
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    tokens = arguments.get("tokens")
    dtype = "float32" if tokens is None else str(tokens.dtype).removeprefix("torch.")
    variant = " + bias, mask, weights" if arguments.get("mask") is not None else ""
    if "grad_tokens" in arguments and arguments["grad_tokens"] is None:
        variant += " - tokens' gradient"
    return Job(target, kernel, constants, signature, divisible, arguments.get("num_warps", 4), dtype, variant)
