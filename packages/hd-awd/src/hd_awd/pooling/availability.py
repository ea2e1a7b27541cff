"""Whether the fused kernels can be used, and if not, why."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
from typing import Any

import torch
from torch import Tensor

MAX_WIDTH, MAX_QUERIES = 4096, 16
MAX_TOKENS = 65535 * 32  # a grid's second axis, by the tokens of a program that projects
OLDEST_TRITON = (3, 3)
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(tokens: Tensor, queries: Tensor) -> str | None:
    """The reason why :func:`hd_awd.attention_pool` cannot use its Triton kernels for these tensors, or None."""
    reason = _why_not_here(str(tokens.device))
    if reason is not None:
        return reason
    if tokens.dtype not in DTYPES or queries.dtype not in DTYPES:
        return f"tokens and queries must be float32, bfloat16 or float16; got {tokens.dtype} and {queries.dtype}"
    num_queries, width = queries.shape
    if width > MAX_WIDTH or num_queries > MAX_QUERIES:
        return f"it takes at most {MAX_WIDTH} channels and {MAX_QUERIES} queries; got {width} and {num_queries}"
    num_tokens = tokens.shape[1]
    if num_tokens * max(width, num_queries) >= 2**31:
        return f"a sample must have fewer than 2^31 elements and scores; got {num_tokens * max(width, num_queries)}"
    if num_tokens > MAX_TOKENS:
        return f"it takes at most {MAX_TOKENS} tokens; got {num_tokens}"
    return None


def ask_once_when_compiling(function: Any) -> None:
    """torch.compile calls the function and takes its answer for a constant, instead of looking inside.

    What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True


def _why_not_here(device: str) -> str | None:
    """What does not depend on the tensors; a compiler asks once and does not look inside."""
    return _why_no_triton() or _why_not_device(torch.device(device))


ask_once_when_compiling(_why_not_here)


@functools.cache
def _why_no_triton() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install triton, or hd-awd[triton])"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST_TRITON:
        return f"Triton {'.'.join(map(str, OLDEST_TRITON))} or newer is needed; found {version}"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU (environment variable TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _why_not_device(device: torch.device) -> str | None:
    if interpreted():
        return None
    if device.type != "cuda":
        return f'the tokens must lie on a "cuda" device; they are on "{device.type}"'
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"compute capability {'.'.join(map(str, OLDEST_CAPABILITY))} or newer is needed; found {found}"
    return None
