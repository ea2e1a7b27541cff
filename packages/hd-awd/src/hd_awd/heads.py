"""One layer's head of the discriminator: tokens weighed by attention, by a scorer, or all alike.

Shape letters: B batch, N tokens, C token width, M queries, H attention heads, d head_width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hd_awd.config import DiscriminatorConfig, Pooling, PoolOver, check_size
from hd_awd.pooling import attention_pool


def make_mlp(width: int, hidden: int, out: int, *, last_bias: bool = True) -> nn.Sequential:
    """Linear, SiLU, Linear."""
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, out, bias=last_bias))


class PoolingHead(nn.Module):
    """One layer's logit: normalise, weigh the tokens, sum, project, MLP [HD's AWD; the exact head is ours].

        s_nm = q_m . W_k LN(h_n) / sqrt(d)       a_.m = softmax_n(s_.m)
        z_m  = sum_n a_nm W_v LN(h_n)            logit = MLP(z_1 .. z_M)

    Neither projection is ever applied to a token: W_k and LN's affine part are folded into the queries, W_v
    is applied to the pooled vectors. Queries start at zero, where attention is exactly the mean, W_k at
    random, so that the queries' first gradient is not zero.

    Args:
        width: C.
        pooling: "attention" as above; "scorer" takes s_nm from an MLP on LN(h_n), nonlinear in the token, whose last
            layer starts at zero; "mean" has a = 1/N throughout (GAP).
        pool_over: "features" as above; "logits" pools a logit of every single token instead,
            logit = 1/M sum_m sum_n a_nm MLP(W_v LN(h_n))_m, which projects every token.
        num_queries: M, >= 1.
        num_heads: H, a divisor of ``head_width``; each head has d / H channels of queries, keys and values, and
            weights of its own. Only with ``pool_over="features"``.
        head_width: d, width of keys and values over all heads.
        hidden: width of the MLPs' hidden layer.
        logit: False leaves the MLP out; :meth:`vectors` is then the output.
        eps: added to the layer norm's variance, > 0.

    Raises:
        ValueError: for an unknown variant, variants that exclude each other, sizes that are no ints >= 1, or eps <= 0.
    """

    def __init__(
        self,
        width: int,
        *,
        pooling: Pooling = "attention",
        pool_over: PoolOver = "features",
        num_queries: int = 4,
        num_heads: int = 1,
        head_width: int = 64,
        hidden: int = 128,
        logit: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_size("width", width)
        DiscriminatorConfig(
            pooling=pooling,
            pool_over=pool_over,
            num_queries=num_queries,
            num_heads=num_heads,
            head_width=head_width,
            hidden=hidden,
            eps=eps,
        )
        self.pooling, self.pool_over, self.eps = pooling, pool_over, eps
        self.num_queries, self.num_heads = num_queries, num_heads
        self.norm = nn.LayerNorm(width, eps=eps)
        self.value = nn.Linear(width, head_width)
        if logit:
            inputs, outputs = (num_queries * head_width, 1) if pool_over == "features" else (head_width, num_queries)
            self.mlp = make_mlp(inputs, hidden, outputs)
        # Drawn for every pooling, so that what they share is the same from the same seed, in later heads too.
        key = nn.Linear(width, head_width, bias=False)
        if pooling == "attention":
            self.key = key
            self.queries = nn.Parameter(torch.zeros(num_queries, head_width))
        elif pooling == "scorer":
            # From a seed of its own, so that later heads draw what they draw beside other poolings.
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(torch.randint(1 << 62, ())))
                # No last bias: it would add the same to all scores of a query, which a softmax does not see.
                scorer = make_mlp(width, hidden, num_queries * num_heads, last_bias=False)
            self.scorer = scorer.to(key.weight.device)
            for parameter in self.scorer[-1].parameters():
                nn.init.zeros_(parameter)

    def folded_queries(self) -> Tensor:
        """gamma * (W_k^T q_m) / sqrt(d / H) per head, shape (M H, C), for "attention" alone.

        LN's beta shifts all scores of a query alike, so it cancels in the softmax.
        """
        queries = self.queries.unflatten(1, (self.num_heads, -1))
        key = self.key.weight.unflatten(0, (self.num_heads, -1))
        folded = torch.einsum("mhd,hdc->mhc", queries, key).flatten(0, 1)
        return folded * self.norm.weight / math.sqrt(queries.shape[-1])

    def pool(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, N, C) -> (pooled (B, M H, C) of LN without affine, weights (B, M H, N)).

        Pooled in tokens' dtype, weights and arithmetic in float32 or better.
        """
        if self.pooling == "mean":
            wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            shape = (len(tokens), self.num_queries * self.num_heads, tokens.shape[1])
            return self.pooled(tokens), wide.new_full(shape, 1 / tokens.shape[1])
        queries, scores = self._queries_and_scores(tokens)
        return attention_pool(tokens, queries, scores, eps=self.eps, return_weights=True)

    def pooled(self, tokens: Tensor) -> Tensor:
        """The first of :meth:`pool` alone."""
        if self.pooling == "mean":
            wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
            mean = F.layer_norm(wide, wide.shape[-1:], eps=self.eps).mean(dim=1, keepdim=True)
            return mean.to(tokens.dtype).expand(-1, self.num_queries * self.num_heads, -1)
        queries, scores = self._queries_and_scores(tokens)
        return attention_pool(tokens, queries, scores, eps=self.eps)

    def vectors(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, C) -> z (B, M d), before the MLP."""
        pooled = self.pooled(tokens) * self.norm.weight + self.norm.bias
        pooled = pooled.unflatten(1, (self.num_queries, self.num_heads))
        if self.num_heads == 1:
            return self.value(pooled[:, :, 0]).flatten(1)
        weight = self.value.weight.unflatten(0, (self.num_heads, -1))
        values = torch.einsum("bmhc,hdc->bmhd", pooled, weight).flatten(2) + self.value.bias
        return values.flatten(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, C) -> logit (B,)."""
        if self.pool_over == "features":
            return self.mlp(self.vectors(tokens))[:, 0]
        logits: Tensor = self.mlp(self.value(self._normalised(tokens)))
        weights = self.pool(tokens)[1].to(logits.dtype)
        return torch.einsum("bmn,bnm->b", weights, logits) / self.num_queries

    def _queries_and_scores(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the pooling op takes as queries and bias: a scorer's scores are a bias beside zero queries."""
        if self.pooling == "attention":
            return self.folded_queries(), None
        scores = self.scorer(self._normalised(tokens)).transpose(1, 2)
        return self.norm.weight.new_zeros(scores.shape[1], tokens.shape[2]), scores

    def _normalised(self, tokens: Tensor) -> Tensor:
        """LN(h) of every token, for the variants that look at each."""
        return self.norm(tokens.to(torch.promote_types(tokens.dtype, self.norm.weight.dtype)))
