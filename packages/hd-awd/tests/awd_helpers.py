"""What hd-awd's tests share, as plain functions: oracles, small networks, and what the kernels' tests need.

The oracles use nothing of the package under test.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hd_awd.pooling.inputs import Incoming, PoolInputs
from hd_awd.pooling.kernels.plan import Plan, make_plan, power_of_two

Module = TypeVar("Module", bound=nn.Module)
Sizes = tuple[int, int, int, int]  # B, N, C, M

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # conftest.py sets it where there is no GPU
FLOAT32 = 1e-5  # relative error of what is float32: everything but the tokens' gradient
ROUNDED = {torch.float32: FLOAT32, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # the tokens' gradient, in their dtype
SPREAD = 0.05  # of its terms' size: what a result that cancels (N = 1: no gradient of a score) is measured against


# The pooling and the head from their equations.


def naive_pool(
    tokens: Tensor, queries: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """pooled and weights by definition, one sample and one query at a time, with a hand-written norm and softmax."""
    batch, num_tokens, width = tokens.shape
    full = torch.zeros(batch, len(queries), num_tokens, dtype=tokens.dtype)
    full = full if bias is None else full + bias
    mask = torch.ones(batch, num_tokens, dtype=torch.bool) if mask is None else mask
    pooled, weights = [], []
    for b in range(batch):
        centred = tokens[b] - tokens[b].sum(-1, keepdim=True) / width
        normal = centred / ((centred**2).sum(-1, keepdim=True) / width + eps).sqrt()
        for m in range(len(queries)):
            scores = (normal * queries[m]).sum(-1) + full[b, m]
            top = scores[mask[b]].max() if mask[b].any() else scores.max()
            share = (scores - top).clamp(max=0).exp() * mask[b]
            share = share / share.sum().clamp(min=1e-300)
            weights.append(share)
            pooled.append((share[:, None] * normal).sum(0))
    return (
        torch.stack(pooled).reshape(batch, len(queries), width),
        torch.stack(weights).reshape(batch, len(queries), num_tokens),
    )


class UnfoldedHead(nn.Module):
    """The attention head as the equations write it: affine norm, keys and values of every token."""

    def __init__(self, width: int, num_queries: int, head_width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.value = nn.Linear(width, head_width)
        self.mlp = nn.Sequential(nn.Linear(num_queries * head_width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.key = nn.Linear(width, head_width, bias=False)
        self.queries = nn.Parameter(torch.zeros(num_queries, head_width))

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm(tokens)
        keys, values = self.key(normal), self.value(normal)
        scores = keys @ self.queries.T / math.sqrt(self.queries.shape[1])  # (B, N, M)
        pooled = torch.einsum("bnm,bnd->bmd", scores.softmax(dim=1), values)
        return self.mlp(pooled.reshape(len(tokens), -1)).squeeze(1)


def randomised(module: Module, std: float = 0.5) -> Module:
    """Gives every parameter a value of its own, so that nothing hides behind zeros and ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


# Networks to tap.


class ConvNet(nn.Module):
    """A convolutional network with a residual, a tuple output and a vector at its end."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x + self.conv(x).tanh(), "skip"

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.stages = nn.ModuleList([ConvNet.Stage(), ConvNet.Stage()])
        self.last = nn.Linear(3, 4)
        self.unused = nn.Linear(3, 4)

    def forward(self, x: Tensor, t: Tensor | None = None, *, shift: Tensor | None = None) -> Tensor:
        h = self.first(x).tanh()
        if t is not None:
            h = h + t[:, None, None, None]
        for stage in self.stages:
            h, _ = stage(h)
        h = h.mean(dim=(2, 3))
        return self.last(h if shift is None else h + shift)


class TokenNet(nn.Module):
    """A two-block transformer encoder: tokens of shape (B, N, C) at every tap."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return h.mean(dim=(1, 2))


# The kernels.


def launcher() -> ModuleType:
    """hd_awd.pooling.kernels.launch, imported late because it imports Triton."""
    from hd_awd.pooling.kernels import launch

    return launch


def skip_without(device: str) -> None:
    """Skips a test of the kernels where they cannot run on that device: "cpu" is Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if device == "cuda" and INTERPRETED:
        pytest.skip("the interpreter stands in for the CUDA device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or Triton's interpreter: TRITON_INTERPRET=1")
    if device == "cpu" and not INTERPRETED:
        pytest.skip("counts what the interpreter does: TRITON_INTERPRET=1")
    if device == "cpu" and type(launcher().one_pass.attention_pool_fwd_kernel).__name__ != "InterpretedFunction":
        pytest.fail("Triton was imported before TRITON_INTERPRET was set: run packages/hd-awd/tests by themselves")


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call and the gradients that come back to it; bias as the caller gave it."""

    tokens: Tensor
    queries: Tensor
    bias: Tensor | None
    mask: Tensor | None
    grad_pooled: Tensor
    grad_weights: Tensor | None
    eps: float

    @property
    def sizes(self) -> Sizes:
        """B, N, C, M."""
        batch, num_tokens, width = self.tokens.shape
        return batch, num_tokens, width, len(self.queries)

    @property
    def full_bias(self) -> Tensor | None:
        batch, num_tokens, _, num_queries = self.sizes
        return None if self.bias is None else self.bias.expand(batch, num_queries, num_tokens)

    @property
    def inputs(self) -> PoolInputs:
        return PoolInputs(self.tokens, self.queries, self.full_bias, self.mask, self.eps)

    def sample(self, index: int) -> Case:
        """That sample alone."""

        def own(value: Tensor | None) -> Any:
            return None if value is None else value[index : index + 1]

        return Case(
            own(self.tokens), self.queries, own(self.full_bias), own(self.mask), own(self.grad_pooled),
            own(self.grad_weights), self.eps,
        )  # fmt: skip


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same (B, N, C) values with other strides: "tokens first", "channels first", "sliced" or "contiguous"."""
    if layout == "tokens first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # every second channel of a wider buffer, NaN around them
        batch, num_tokens, width = tensor.shape
        wide = tensor.new_full((batch, num_tokens + 2, 2 * width + 3), float("nan"))
        view = wide[:, 1 : num_tokens + 1, 2 : 2 * width + 2 : 2]
        view.copy_(tensor)
        return view
    return tensor.contiguous()


def make_case(
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    bias: Sequence[int | str] | None = None,
    masked: bool = False,
    weights: bool = False,
    layout: str = "contiguous",
    offset: float = 3.0,
    eps: float = 1e-6,
    seed: int = 0,
) -> Case:
    """Drawn inputs of sizes B, N, C, M: a mean of up to ``offset`` sigma per token, scores of a few units.

    Args:
        bias: its shape, where "B", "M" and "N" stand for those sizes; None for no bias.
        masked: some tokens of each sample take part, none of the last unless it is alone.
        weights: whether weights are wanted, and get a gradient.
        layout: of the tokens, as in :func:`laid_out`.
    """
    batch, num_tokens, width, num_queries = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = normal(batch, num_tokens, width)
    tokens = tokens + offset * (2 * torch.rand(batch, num_tokens, 1, generator=generator) - 1)
    tokens = tokens * (0.5 * normal(batch, num_tokens, 1)).exp()
    queries = 2 * (normal(num_queries, width) + 0.25) / width**0.5
    mask = None
    if masked:
        mask = (torch.rand(batch, num_tokens, generator=generator) < 0.6).to(device)
        mask[max(1, batch - 1) :] = False
    letters = {"B": batch, "M": num_queries, "N": num_tokens}
    gradient_layout = "contiguous" if layout == "contiguous" else "tokens first"
    return Case(
        laid_out(tokens.to(device, dtype), layout),
        queries.to(device, dtype).T.contiguous().T if layout == "sliced" else queries.to(device, dtype),
        None if bias is None else normal(*(letters.get(str(size), size) for size in bias)).to(device, dtype),
        mask,
        laid_out(normal(batch, num_queries, width).to(device), gradient_layout),
        5 * normal(batch, num_queries, num_tokens).to(device) if weights else None,
        eps,
    )


def planned(case: Case, passes: int, splits: int = 1, block_n: int | None = None) -> tuple[Plan, Plan]:
    """Forward's and backward's plans with so many passes and (about) so many splits, whatever the default is."""
    _, num_tokens, width, num_queries = case.sizes
    lanes, plans = launcher()._lanes(case.tokens.device), []
    for direction in ("forward", "backward"):
        plan = make_plan(direction, *case.sizes, case.tokens.element_size(), lanes=lanes)
        if passes == 2:
            rows = max(1, 32 // power_of_two(num_queries))
            plan = dataclasses.replace(plan, passes=2, block_n=rows, row_head=256, row_tail=0, warps=4)
        elif plan.passes == 2:  # slow on a GPU, but right
            whole = max(256, power_of_two(width))
            plan = dataclasses.replace(plan, passes=1, block_n=1, row_head=whole, row_tail=0, warps=4)
        rows = block_n or min(plan.block_n, 4 if splits > 1 else 16)
        each = math.ceil(num_tokens / splits / rows) * rows
        plans.append(dataclasses.replace(plan, block_n=rows, tokens_per_split=each, splits=-(-num_tokens // each)))
    return plans[0], plans[1]


def compute(
    case: Case, forward: Plan | None = None, backward: Plan | None = None, *, tokens: bool = True, scores: bool = True
) -> dict[str, Tensor]:
    """The launcher's results by name, with delta as the autograd makes it.

    ``tokens`` and ``scores`` say whether those gradients are wanted.
    """
    want_weights = case.grad_weights is not None
    pooled, lse, weights = launcher().pool_forward(case.inputs, want_weights, forward)
    delta = (case.grad_pooled * pooled).sum(dim=-1)
    if case.grad_weights is not None:
        delta = delta + (case.grad_weights * weights).sum(dim=-1)
    incoming = Incoming(case.grad_pooled, case.grad_weights, lse, delta, tokens, scores)
    grads = launcher().pool_backward(case.inputs, incoming, backward)
    found = {"pooled": pooled, "lse": lse, "weights": weights}
    found |= dict(zip(("grad_tokens", "grad_queries", "grad_scores"), grads, strict=True))
    optional = (("weights", want_weights), ("grad_tokens", tokens), ("grad_scores", scores))
    absent = {name for name, wanted in optional if not wanted}
    assert all(found[name].numel() == 0 for name in absent)
    return {name: value for name, value in found.items() if name not in absent}


def expected_results(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Per result: what the definition gives in float64 on the CPU, and the size of the terms that it sums."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().double()

    batch, num_tokens, width, num_queries = case.sizes
    tokens, queries, dz = wide(case.tokens), wide(case.queries), wide(case.grad_pooled)
    bias = torch.zeros(batch, num_queries, num_tokens, dtype=torch.float64)
    bias = bias if case.bias is None else bias + wide(case.bias)
    leaves = [leaf.requires_grad_() for leaf in (tokens, queries, bias)]
    mask = None if case.mask is None else case.mask.cpu()
    pooled, weights = naive_pool(tokens, queries, bias, mask, case.eps)
    da = torch.zeros_like(weights) if case.grad_weights is None else wide(case.grad_weights)
    grads = torch.autograd.grad((pooled * dz).sum() + (weights * da).sum(), leaves)
    with torch.no_grad():
        sigma = (tokens.var(dim=-1, correction=0) + case.eps).sqrt()[..., None]
        x = F.layer_norm(tokens, (width,), eps=case.eps)
        logits = torch.einsum("bnc,mc->bmn", x, queries) + bias
        logits = logits if mask is None else logits.masked_fill(~mask[:, None], float("-inf"))
        lse = logits.logsumexp(dim=-1)
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
        g = torch.einsum("bmc,bnc->bmn", dz, x) + da
        ds = weights * (g.abs() + (weights * g).sum(dim=-1, keepdim=True).abs())
        dx = torch.einsum("bmn,bmc->bnc", weights, dz.abs()) + torch.einsum("bmn,mc->bnc", ds, queries.abs())
        return {
            "pooled": (pooled.detach(), torch.einsum("bmn,bnc->bmc", weights, x.abs())),
            "weights": (weights.detach(), weights.detach()),
            "lse": (lse, 1 + lse.abs()),
            "grad_tokens": (grads[0], dx / sigma),
            "grad_queries": (grads[1], torch.einsum("bmn,bnc->mc", ds, x.abs())),
            "grad_scores": (grads[2], ds),
        }


def relative_error(found: Tensor, expected: Tensor, terms: Tensor) -> float:
    """The larger of |difference| over |expected| by the Euclidean norm and by the largest element."""
    found = found.cpu().double()
    assert found.shape == expected.shape
    assert torch.equal(found.isinf(), expected.isinf()), "infinite where it should not be, or the other way round"
    keep = expected.isfinite()
    found, expected, terms = found[keep], expected[keep], terms[keep]
    assert found.isfinite().all(), "not a number"
    errors = [0.0]
    for order in (2, float("inf")):
        if (found != expected).any():
            distance, size, most = (torch.linalg.vector_norm(x, order) for x in (found - expected, expected, terms))
            errors.append((distance / max(size, SPREAD * most)).item())
    return max(errors)


def check(
    case: Case, forward: Plan | None = None, backward: Plan | None = None, *, scale: float = 1.0, scores: bool = True
) -> None:
    """Holds every result of the kernels against the definition; ``scale`` widens the tolerance."""
    found, expected = compute(case, forward, backward, scores=scores), expected_results(case)
    errors = {name: relative_error(value, *expected[name]) for name, value in found.items()}
    limits = dict.fromkeys(errors, scale * FLOAT32)
    limits["grad_tokens"] = max(limits["grad_tokens"], ROUNDED[case.tokens.dtype])
    assert found["grad_tokens"].dtype == case.tokens.dtype
    assert all(value.dtype == torch.float32 for name, value in found.items() if name != "grad_tokens")
    too_large = {name: error for name, error in errors.items() if not error < limits[name]}
    assert not too_large, f"relative errors above {limits}: {too_large}"
