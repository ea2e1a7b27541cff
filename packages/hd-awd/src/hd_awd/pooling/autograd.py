"""The pooling as two operators known to PyTorch, each with its derivative in reverse mode.

The operators have shape functions, so torch.compile puts them into a graph as they are. A forward-mode derivative of
a custom operator would silently be zero, so both refuse to run in that mode; :func:`hd_awd.attention_pool` takes
PyTorch's own operations there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hd_awd.pooling import blocks
from hd_awd.pooling.folded import attention_pool_folded


@torch.library.custom_op("hd_awd::attention_pool", mutates_args=())
def pool_op(
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    want_weights: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """pooled, lse and weights as :func:`hd_awd.pooling.blocks.pool_forward` returns them."""
    _refuse_forward_mode()
    if triton:
        from hd_awd.pooling.kernels import launch

        return launch.pool_forward(tokens, queries, bias, mask, eps, want_weights)
    return blocks.pool_forward(tokens, queries, bias, mask, eps, want_weights)


@pool_op.register_fake
def _(
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    want_weights: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, width = tokens.shape
    pooled = tokens.new_empty((batch, len(queries), width), dtype=torch.promote_types(tokens.dtype, torch.float32))
    weights = pooled.new_empty((batch, len(queries), num_tokens) if want_weights else (0,))
    return pooled, pooled.new_empty((batch, len(queries))), weights


@torch.library.custom_op("hd_awd::attention_pool_backward", mutates_args=())
def pool_backward_op(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    eps: float,
    want_tokens: bool,
    want_bias: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, queries and scores, as :func:`hd_awd.pooling.blocks.pool_backward` returns them.

    lse and delta are taken for what follows from the other arguments, and have no derivative of their own.
    """
    _refuse_forward_mode()
    arguments = (grad_pooled, grad_weights, tokens, queries, bias, mask, lse, delta, eps, want_tokens, want_bias)
    if triton:
        from hd_awd.pooling.kernels import launch

        return launch.pool_backward(*arguments)
    return blocks.pool_backward(*arguments)


@pool_backward_op.register_fake
def _(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    eps: float,
    want_tokens: bool,
    want_bias: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_tokens = torch.empty_like(tokens) if want_tokens else tokens.new_empty(0)
    shape = (tokens.shape[0], queries.shape[0], tokens.shape[1]) if want_bias else (0,)
    return grad_tokens, grad_pooled.new_empty(queries.shape), grad_pooled.new_empty(shape)


def _refuse_forward_mode() -> None:
    """Reached only by a pooling that was compiled, or computed, outside of forward mode: its tangent would be zero."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "a pooling that was computed or compiled outside of forward mode has no forward-mode derivative: compute, "
            "or compile, it within that mode"
        )


def pool(
    tokens: Tensor,
    queries: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
    want_weights: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """pooled (B, M, C) and weights (B, M, N), or without elements, in float32 or better; ``bias`` is (B, M, N).

    Differentiable any number of times in reverse mode; forward mode raises.
    """
    pooled, _, weights = pool_op(tokens, queries, bias, mask, eps, want_weights, triton)
    return pooled, weights


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.want_weights, ctx.triton = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_pooled: Tensor | None, _: Tensor | None, grad_weights: Tensor | None) -> Any:
    """delta_m = sum_n a_mn (dz_m . x_n + da_mn) follows from the forward pass; the operator does the rest."""
    tokens, queries, bias, mask, pooled, lse, weights = ctx.saved_tensors
    if grad_pooled is None:
        grad_pooled = torch.zeros_like(pooled)
    if not ctx.want_weights:
        grad_weights = None
    with torch.no_grad():
        delta = (grad_pooled * pooled).sum(dim=-1)
        if grad_weights is not None:
            delta = delta + (grad_weights * weights).sum(dim=-1)
    want_tokens, _, want_bias, *_ = ctx.needs_input_grad
    arguments = (grad_pooled, grad_weights, tokens, queries, bias, mask, lse, delta, ctx.eps)
    grads = pool_backward_op(*arguments, want_tokens, want_bias, ctx.triton)
    # Autograd casts them to their inputs' dtypes.
    return grads[0] if want_tokens else None, grads[1], grads[2] if want_bias else None, *[None] * 4


pool_op.register_autograd(_backward, setup_context=_keep)


def _keep_for_second_order(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _lse, _delta, ctx.eps, ctx.want_tokens, ctx.want_bias, _triton = inputs
    ctx.save_for_backward(*tensors)


def _second_order(ctx: Any, *grads: Tensor) -> Any:
    """The derivative of the same gradient as autograd writes it for PyTorch's operations."""
    *inputs, mask = ctx.saved_tensors
    if inputs[2].shape[0] == 0:  # torch.var_mean warns of an empty batch
        return *(None if one is None else torch.zeros_like(one) for one in inputs), *[None] * 7
    higher = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(inputs[2].device.type, enabled=False):
        # New names for the inputs: queries may be a function of the tokens, and partial derivatives are wanted.
        names: list[Any] = [None if one is None else _renamed(one) for one in inputs]
        grad_pooled, grad_weights, tokens, queries, bias = names
        outputs = attention_pool_folded(tokens, queries, bias, mask, ctx.eps)
        starts = [grad_pooled] if grad_weights is None else [grad_pooled, grad_weights]
        wanted = [(tokens, ctx.want_tokens), (queries, True), (bias, ctx.want_bias)]
        grads_of_first = [grad for grad, (_, want) in zip(grads, wanted, strict=True) if want]
        first = torch.autograd.grad(
            outputs[: len(starts)], [one for one, want in wanted if want], starts, create_graph=True
        )
        grads_of_first = [grad.to(one.dtype) for grad, one in zip(grads_of_first, first, strict=True)]
        given = [one for one in names if one is not None]
        second = iter(torch.autograd.grad(first, given, grads_of_first, allow_unused=True, create_graph=higher))
    return *(None if one is None else next(second) for one in names), *[None] * 7


pool_backward_op.register_autograd(_second_order, setup_context=_keep_for_second_order)


def _renamed(tensor: Tensor) -> Tensor:
    """The same tensor at another place of the graph, or at the beginning of one."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
