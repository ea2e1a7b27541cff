"""The public pooling op: checks its arguments, chooses a path."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hd_awd.pooling.autograd import pool_op
from hd_awd.pooling.availability import ask_once_when_compiling, why_not_triton
from hd_awd.pooling.folded import attention_pool_folded

BACKENDS = ("auto", "triton", "torch")


@overload
def attention_pool(
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    eps: float = ...,
    *,
    return_weights: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def attention_pool(
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    eps: float = ...,
    *,
    return_weights: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def attention_pool(
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    *,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Pool layer-normalised tokens by the attention of learned queries [HD's AWD; the exact form is ours].

        s_mn = q_m . LN(h_n) + b_mn        a_m. = softmax_n(s_m.)        z_m = sum_n a_mn LN(h_n)

    LN has no affine part. An affine layer norm, a key projection and the 1/sqrt(d) belong folded into
    ``queries`` (q' = gamma * (W_k^T q) / sqrt(d)), a value projection is applied to the result: both are
    exact.

    Args:
        tokens: h (B, N, C), N and C >= 1; float32, bfloat16, float16 or float64.
        queries: q (M, C). Zero queries give the mean over tokens.
        bias: floating point, added to the scores; broadcasts to (B, M, N). Where it is -inf the token takes no part
            for that query.
        mask: (B, N) bool, True for tokens that take part; the others must still be finite. Where no token is left a
            query's pooled vector and weights are zero, and so are their gradients.
        eps: added to the variance, > 0.
        return_weights: also return a.
        backend: "triton" for the fused kernels, "torch" for PyTorch's operations, "auto" for the kernels where
            :func:`why_not_triton` has no objection.

    Returns:
        z (B, M, C) in tokens' dtype (arithmetic in float32 or better), and with ``return_weights`` also
        a (B, M, N) in float32 or better. Differentiable in tokens, queries and bias: any number of times in
        reverse mode, and in forward mode and under torch.func's transforms, which take PyTorch's operations.

    Raises:
        ValueError: for shapes or dtypes that do not fit, eps <= 0, or an unknown backend.
        RuntimeError: for backend "triton" where it cannot be used, with the reason.
    """
    _check(tokens, queries, bias, mask, eps)
    triton = _takes_triton(backend, tokens, queries)
    # A compiler fuses plain operations itself.
    if not triton and (torch.compiler.is_compiling() or _transformed()):
        with torch.autocast(tokens.device.type, enabled=False):
            pooled, weights = attention_pool_folded(tokens, queries, bias, mask, eps)
    else:
        if bias is not None:
            bias = bias.expand(len(tokens), len(queries), tokens.shape[1])
        pooled, _, weights = pool_op(tokens, queries, bias, mask, eps, return_weights, triton)
    pooled = pooled.to(tokens.dtype)
    return (pooled, weights) if return_weights else pooled


def _takes_triton(backend: str, tokens: Tensor, queries: Tensor) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "torch" or (backend == "auto" and tokens.device.type != "cuda"):
        return False
    reason = why_not_triton(tokens, queries)
    if reason is None and _transformed():
        reason = "its kernels have no forward-mode derivative and no rule for torch.func's transforms"
    if reason is not None and backend == "triton":
        raise RuntimeError(f'backend "triton" cannot be used here: {reason}')
    return reason is None


def _transformed() -> bool:
    """Whether forward-mode differentiation or one of torch.func's transforms is going on."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


ask_once_when_compiling(_transformed)


def _check(tokens: Tensor, queries: Tensor, bias: Tensor | None, mask: Tensor | None, eps: float) -> None:
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise ValueError(f"tokens must have shape (B, N, C) with N and C >= 1; got {tuple(tokens.shape)}")
    batch, num_tokens, width = tokens.shape
    if not tokens.is_floating_point() or not queries.is_floating_point():
        raise ValueError(f"tokens and queries must be floating point; got {tokens.dtype} and {queries.dtype}")
    if queries.ndim != 2 or queries.shape[1] != width or len(queries) == 0:
        raise ValueError(f"queries must have shape (M, {width}), M >= 1; got {tuple(queries.shape)}")
    if mask is not None and (mask.shape != (batch, num_tokens) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool of shape ({batch}, {num_tokens}); got {mask.dtype} {tuple(mask.shape)}")
    if bias is not None:
        if not bias.is_floating_point():
            raise ValueError(f"bias must be floating point (a mask goes into mask); got {bias.dtype}")
        target = (batch, queries.shape[0], num_tokens)
        try:
            fits = torch.broadcast_shapes(bias.shape, target) == target
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"bias must broadcast to {target}; got {tuple(bias.shape)}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0; got {eps}")
