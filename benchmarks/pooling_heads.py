"""The ways to compute a head's pooling stage that attention-pool compares, and the check that they agree.

All of them hold the parameters of one :class:`hd_awd.PoolingHead` and compute what its ``vectors`` computes: tokens
(B, N, C) to M pooled value vectors per sample, layer norm included. Only "mean" is another function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hd_awd import PoolingHead, attention_pool
from hd_awd.pooling.folded import attention_pool_folded

DEFAULT_WIDTH = 64  # the package's default head_width
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}
PER_TOKEN_BFLOAT16 = 0.3  # rounds keys and values of every token: 0.13 is seen in the gradient of the norm's bias


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to pool: the function, what it trains, and what it is held against.

    Args:
        run: tokens (B, N, C) -> (B, M, d).
        parameters: by name.
        head_width: d.
        oracle: the way whose output and gradients it must have; None for another function.
        shared: from the gradients of ``parameters`` to those of the head's own parameters.
    """

    run: Callable[[Tensor], Tensor]
    parameters: dict[str, nn.Parameter]
    head_width: int
    oracle: str | None
    shared: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    def forward(self, tokens: Tensor) -> Tensor:
        """Without a graph."""
        with torch.no_grad():
            return self.run(tokens)

    def step(self, tokens: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        """Output and the gradients of tokens and parameters, from the gradient ``start`` of the output."""
        output = self.run(tokens)
        return (output, *torch.autograd.grad(output, [tokens, *self.parameters.values()], start))

    def frozen_step(self, tokens: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Output and the gradient of tokens, as where a frozen discriminator trains a generator."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        try:
            output = self.run(tokens)
            return output, torch.autograd.grad(output, tokens, start)[0]
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)


class MultiheadPool(nn.Module):
    """A head's weights in nn.MultiheadAttention with one head and learned queries.

    Its projections of the queries and of the output, which the head does not have, are the identity.
    """

    def __init__(self, head: PoolingHead) -> None:
        super().__init__()
        width = head.norm.weight.shape[0]
        weight = head.norm.weight.detach()
        self.norm = nn.LayerNorm(width, eps=head.eps).to(weight)
        self.norm.load_state_dict(head.norm.state_dict())
        self.queries = nn.Parameter(head.queries.detach().clone())
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True).to(weight)
        identity, zero = torch.eye(width).to(weight), torch.zeros_like(weight)
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.cat([identity, head.key.weight, head.value.weight]))
            self.attention.in_proj_bias.copy_(torch.cat([zero, zero, head.value.bias]))
            self.attention.out_proj.weight.copy_(identity)
            self.attention.out_proj.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm(tokens)
        queries = self.queries.expand(len(tokens), -1, -1)
        pooled: Tensor = self.attention(queries, normal, normal, need_weights=False)[0]
        return pooled

    @staticmethod
    def shared(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """By the head's names, without what the head does not have."""
        _, key, value = gradients["attention.in_proj_weight"].chunk(3)
        bias = gradients["attention.in_proj_bias"].chunk(3)[2]
        own = {name: gradient for name, gradient in gradients.items() if not name.startswith("attention.")}
        return {**own, "key.weight": key, "value.weight": value, "value.bias": bias}


def make_ways(
    width: int,
    num_queries: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rounded: torch.dtype | None = None,
    triton: bool = False,
) -> dict[str, Way]:
    """All ways by name, with the same weights for every dtype and device; ``rounded`` to another dtype before.

    The order is for timing: each light one follows a heavy one, so that all begin with the same cold cache.
    """
    wide, narrow = (
        make_head(width, num_queries, head_width).to(device, rounded or dtype).to(dtype)
        for head_width in (width, DEFAULT_WIDTH)
    )
    multihead = MultiheadPool(wide)

    def way(
        function: Callable[[PoolingHead, Tensor], Tensor], head: PoolingHead = wide, oracle: str | None = None
    ) -> Way:
        parameters = dict(head.named_parameters())
        if function is mean:
            parameters = {name: one for name, one in parameters.items() if name.startswith(("norm", "value"))}
        return Way(partial(function, head), parameters, len(head.key.weight), oracle)

    ways = {
        "naive": way(naive, oracle="naive"),
        "torch": way(partial(folded, pool=partial(attention_pool, backend="torch")), oracle="naive"),
        "mha": Way(multihead, dict(multihead.named_parameters()), width, "naive", MultiheadPool.shared),
        "autograd": way(partial(folded, pool=pool_by_autograd), oracle="naive"),
        "sdpa": way(sdpa, oracle="naive"),
        "mean": way(mean),
        "naive_d64": way(naive, narrow, oracle="naive_d64"),
        "sdpa_d64": way(sdpa, narrow, oracle="naive_d64"),
        "torch_d64": way(partial(folded, pool=partial(attention_pool, backend="torch")), narrow, oracle="naive_d64"),
    }
    if triton:
        fused = partial(folded, pool=partial(attention_pool, backend="triton"))
        ways |= {"triton": way(fused, oracle="naive"), "triton_d64": way(fused, narrow, oracle="naive_d64")}
    return ways


def make_head(width: int, num_queries: int, head_width: int) -> PoolingHead:
    """The package's head without its MLP, away from the values it starts with, where attention is the mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = PoolingHead(width, num_queries=num_queries, head_width=head_width, logit=False)
        nn.init.normal_(head.queries, std=3.0)
        nn.init.normal_(head.norm.weight, mean=1.0, std=0.3)
        nn.init.normal_(head.norm.bias, std=0.3)
    return head


def naive(head: PoolingHead, tokens: Tensor) -> Tensor:
    """As the equations write it: norm, keys and values of every token."""
    normal = head.norm(tokens)
    keys, values = head.key(normal), head.value(normal)
    scores = head.queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[2])
    return scores.softmax(dim=-1) @ values


def sdpa(head: PoolingHead, tokens: Tensor) -> Tensor:
    """The same with PyTorch's fused attention."""
    normal = head.norm(tokens)
    keys, values = head.key(normal)[:, None], head.value(normal)[:, None]
    queries = head.queries.expand(len(tokens), 1, -1, -1)
    return F.scaled_dot_product_attention(queries, keys, values)[:, 0]


def mean(head: PoolingHead, tokens: Tensor) -> Tensor:
    """Mean over tokens instead of attention (GAP)."""
    return head.value(head.norm(tokens).mean(dim=1, keepdim=True)).expand(-1, head.num_queries, -1)


def folded(head: PoolingHead, tokens: Tensor, *, pool: Callable[..., Tensor]) -> Tensor:
    """The package's way: projections on the side of queries and pooled vectors, as in PoolingHead.vectors."""
    pooled = pool(tokens, head.folded_queries(), eps=head.eps)
    return head.value(pooled * head.norm.weight + head.norm.bias)


def pool_by_autograd(tokens: Tensor, queries: Tensor, eps: float) -> Tensor:
    """The pooling op without its own backward pass."""
    return attention_pool_folded(tokens, queries, eps=eps)[0].to(tokens.dtype)


def check(ways: dict[str, Way], oracles: dict[str, Way], tokens: Tensor) -> list[dict[str, object]]:
    """Hold outputs and gradients of ``ways``, in their own dtype, against their oracles' in float64.

    ``tokens`` (B, N, C) are float64, of values that the ways' dtype has too.

    Returns:
        per way the relative error, |found - true| / |true| in the Euclidean norm, of output, tokens' gradient
        and the worst parameter's gradient.

    Raises:
        SystemExit: where one is beyond the tolerance of the way's dtype.
    """
    rows: list[dict[str, object]] = []
    truths: dict[str, dict[str, Tensor]] = {}
    for name, way in ways.items():
        if way.oracle is None or way is oracles.get(way.oracle):
            continue
        if way.oracle not in truths:
            truths[way.oracle] = _results(oracles[way.oracle], tokens)
        dtype = next(iter(way.parameters.values())).dtype
        per_token = name.startswith(("naive", "mha", "sdpa"))
        tolerance = PER_TOKEN_BFLOAT16 if per_token and dtype == torch.bfloat16 else TOLERANCES[dtype]
        found, truth = _results(way, tokens.to(dtype)), truths[way.oracle]
        errors = {key: float((found[key].double() - true).norm() / true.norm()) for key, true in truth.items()}
        for key, error in errors.items():
            if not error <= tolerance:
                message = f"relative error {error:.1e} in {key}, tolerance {tolerance:.0e}"
                raise SystemExit(f"attention-pool: {name} is not {way.oracle}: {message}; nothing was timed")
        output, gradient = errors.pop("the output"), errors.pop("the gradient of tokens")
        row: dict[str, object] = {"case": name, "against": way.oracle, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"output": f"{output:.1e}", "tokens": f"{gradient:.1e}", "parameters": f"{max(errors.values()):.1e}"}
        rows.append(row)
    return rows


def _results(way: Way, tokens: Tensor) -> dict[str, Tensor]:
    tokens = tokens.detach().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    num_queries = len(way.parameters["queries"])
    start = torch.randn(len(tokens), num_queries, way.head_width, generator=generator, dtype=torch.float64).to(tokens)
    output, gradient, *gradients = way.step(tokens, start)
    named = way.shared(dict(zip(way.parameters, gradients, strict=True)))
    named = {f"the gradient of {name}": one for name, one in named.items()}
    return {"the output": output.detach(), "the gradient of tokens": gradient, **named}
