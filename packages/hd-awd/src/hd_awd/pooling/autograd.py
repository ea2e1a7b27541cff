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
from hd_awd.pooling.inputs import Incoming, Path, PoolInputs, schema

Three = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "hd_awd::attention_pool",
    mutates_args=(),
    schema=f"({schema(PoolInputs)}, bool want_weights, bool triton) -> (Tensor, Tensor, Tensor)",
)
def pool_op(*arguments: Any) -> Three:
    """pooled, lse and weights, as in :class:`hd_awd.pooling.inputs.Path`.

    Differentiable any number of times in reverse mode; forward mode raises.
    """
    *inputs, want_weights, triton = arguments
    _refuse_forward_mode()
    return _path(triton).pool_forward(PoolInputs(*inputs), want_weights)


@pool_op.register_fake
def _(*arguments: Any) -> Three:
    inputs, want_weights = PoolInputs(*arguments[:-2]), arguments[-2]
    batch, num_tokens, width, num_queries = inputs.sizes
    pooled = inputs.tokens.new_empty((batch, num_queries, width), dtype=inputs.dtype)
    weights = pooled.new_empty((batch, num_queries, num_tokens) if want_weights else (0,))
    return pooled, pooled.new_empty((batch, num_queries)), weights


@torch.library.custom_op(
    "hd_awd::attention_pool_backward",
    mutates_args=(),
    schema=f"({schema(PoolInputs)}, {schema(Incoming)}, bool triton) -> (Tensor, Tensor, Tensor)",
)
def pool_backward_op(*arguments: Any) -> Three:
    """Gradients of tokens, queries and scores, as in :class:`hd_awd.pooling.inputs.Path`.

    lse and delta are taken for what follows from the other arguments, and have no derivative of their own.
    """
    _refuse_forward_mode()
    return _path(arguments[-1]).pool_backward(PoolInputs(*arguments[:5]), Incoming(*arguments[5:-1]))


@pool_backward_op.register_fake
def _(*arguments: Any) -> Three:
    inputs, incoming = PoolInputs(*arguments[:5]), Incoming(*arguments[5:-1])
    batch, num_tokens, _, num_queries = inputs.sizes
    tokens, like = inputs.tokens, incoming.grad_pooled
    grad_tokens = torch.empty_like(tokens) if incoming.want_tokens else tokens.new_empty(0)
    shape = (batch, num_queries, num_tokens) if incoming.want_bias else (0,)
    return grad_tokens, like.new_empty(inputs.queries.shape), like.new_empty(shape)


def _path(triton: bool) -> Path:
    if not triton:
        return blocks
    from hd_awd.pooling.kernels import launch

    return launch


def _refuse_forward_mode() -> None:
    """Reached only by a pooling that was compiled, or computed, outside of forward mode: its tangent would be zero."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "a pooling that was computed or compiled outside of forward mode has no forward-mode derivative: compute, "
            "or compile, it within that mode"
        )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.want_weights, ctx.triton = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_pooled: Tensor | None, _: Tensor | None, grad_weights: Tensor | None) -> Any:
    """delta follows from the forward pass; the operator does the rest."""
    *inputs, pooled, lse, weights = ctx.saved_tensors
    if grad_pooled is None:
        grad_pooled = torch.zeros_like(pooled)
    if not ctx.want_weights:
        grad_weights = None
    with torch.no_grad():
        delta = (grad_pooled * pooled).sum(dim=-1)
        if grad_weights is not None:
            delta = delta + (grad_weights * weights).sum(dim=-1)
    want_tokens, _, want_bias, *_ = ctx.needs_input_grad
    incoming = (grad_pooled, grad_weights, lse, delta, want_tokens, want_bias)
    grads = pool_backward_op(*inputs, ctx.eps, *incoming, ctx.triton)
    # Autograd casts them to their inputs' dtypes.
    return grads[0] if want_tokens else None, grads[1], grads[2] if want_bias else None, *[None] * 4


pool_op.register_autograd(_backward, setup_context=_keep)


def _keep_for_second_order(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, grad_pooled, grad_weights, _lse, _delta, ctx.want_tokens, ctx.want_bias, _triton = inputs
    ctx.save_for_backward(*tensors, grad_pooled, grad_weights)


def _second_order(ctx: Any, *grads: Tensor) -> Any:
    """The derivative of the same gradient as autograd writes it for PyTorch's operations."""
    tokens, queries, bias, mask, grad_pooled, grad_weights = ctx.saved_tensors
    inputs = (tokens, queries, bias, grad_pooled, grad_weights)
    if len(tokens) == 0:  # torch.var_mean warns of an empty batch
        return _by_argument(*(None if one is None else torch.zeros_like(one) for one in inputs))
    higher = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(tokens.device.type, enabled=False):
        # New names for the inputs: queries may be a function of the tokens, and partial derivatives are wanted.
        names: list[Any] = [None if one is None else _renamed(one) for one in inputs]
        tokens, queries, bias, grad_pooled, grad_weights = names
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
    return _by_argument(*(None if one is None else next(second) for one in names))


def _by_argument(tokens: Any, queries: Any, bias: Any, grad_pooled: Any, grad_weights: Any) -> tuple[Any, ...]:
    """In the order of ``pool_backward_op``'s arguments: mask, eps, lse, delta and the three flags have no gradient."""
    return tokens, queries, bias, None, None, grad_pooled, grad_weights, *[None] * 5


pool_backward_op.register_autograd(_second_order, setup_context=_keep_for_second_order)


def _renamed(tensor: Tensor) -> Tensor:
    """The same tensor at another place of the graph, or at the beginning of one."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
