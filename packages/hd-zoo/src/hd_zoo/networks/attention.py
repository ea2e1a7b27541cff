"""Attention over (B, H, N, D) by one of three backends, chosen by one switch for the process."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("fused", "math", "xformers")

_backend = "fused"


def set_attention_backend(name: str) -> None:
    """Choose how every network of the zoo attends from now on, in this process.

    Args:
        name: "fused" is PyTorch's scaled_dot_product_attention (the default); "math" is two matrix products and a
            softmax, which differentiates in every mode; "xformers" is its memory-efficient attention.
            Whatever is chosen, forward-mode differentiation takes "math": the other two have no such derivative. So
            does "fused" when it trains on a CPU in half precision, where its backward pass is the slower one.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for "xformers" where it cannot be used, with the reason.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"attention backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "xformers" and (reason := why_not_xformers()):
        raise RuntimeError(f'attention backend "xformers" cannot be used: {reason}')
    _backend = name


@contextlib.contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """:func:`set_attention_backend` for a ``with`` block."""
    before = _backend
    set_attention_backend(name)
    try:
        yield
    finally:
        set_attention_backend(before)


def why_not_xformers() -> str | None:
    """The reason why xformers cannot be used, or None."""
    if importlib.util.find_spec("xformers") is None:
        return "it is not installed (pip install xformers, or hd-zoo[xformers])"
    if not torch.cuda.is_available():
        return "it has no operator for a CPU, and no CUDA device is available"
    return None


def _forward_mode() -> bool:
    """Whether forward-mode differentiation is going on."""
    return forward_ad._current_level >= 0


# torch.compile asks once and takes the answer for a constant; what torch.compiler.assume_constant_result does, without
# importing the compiler.
_forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


#: Up to so many tokens, two matrix products are faster than the fused kernel where :func:`_fused_backward_is_slow`.
SHORT = 512


def _fused_backward_is_slow(q: Tensor) -> bool:
    """Training in half precision on a CPU: the fused kernel's backward pass takes about five times as long as it must.

    Measured by ``hatch run bench attention-cpu``. Without gradients, and in float32, the fused kernel is the faster.
    """
    needed = torch.is_grad_enabled() and q.requires_grad
    return needed and q.device.type == "cpu" and q.dtype.itemsize == 2 and q.shape[-2] <= SHORT


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q, k, v (B, H, N, D); any D, 72 included."""
    if _backend == "math" or _forward_mode() or (_backend == "fused" and _fused_backward_is_slow(q)):
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    if _backend == "xformers":
        from xformers.ops import memory_efficient_attention

        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        attended: Tensor = memory_efficient_attention(q, k, v)
        return attended.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)
