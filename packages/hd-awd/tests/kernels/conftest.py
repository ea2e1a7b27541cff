"""What the kernels' tests share: the device, memory that starts as NaN, inputs, plans, a float64 oracle."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
FLOAT32 = 1e-5  # relative error of what is float32: everything but the tokens' gradient
ROUNDED = {torch.float32: FLOAT32, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # the tokens' gradient, in their dtype
SPREAD = 0.05  # of its terms' size: what a result that cancels (N = 1: no gradient of a score) is measured against


def _skip_without(device: str) -> None:
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Triton is not installed")
    if device == "cpu" and not INTERPRETED:
        pytest.skip("runs in Triton's interpreter: TRITON_INTERPRET=1")
    if device == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device" if not INTERPRETED else "the interpreter stands in for the CUDA device")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where tensors lie: on the CPU for the interpreter, on a GPU otherwise."""
    _skip_without(request.param)
    return request.param


@pytest.fixture(scope="session")
def cuda() -> str:
    _skip_without("cuda")
    return "cuda"


@pytest.fixture(scope="session")
def interpreter() -> None:
    _skip_without("cpu")


@pytest.fixture(scope="session")
def launch(device: str) -> ModuleType:
    """The kernels' launcher; imported here, because it imports Triton."""
    from hd_awd.pooling.kernels import launch

    return launch


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN: what a kernel does not write is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it when operations are deterministic
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def _as_quiet_as_a_gpu() -> Iterator[None]:
    """NumPy, which the interpreter runs on, warns of log(0) and of overflow also where the kernel selects them away."""
    with np.errstate(divide="ignore", over="ignore"):
        yield


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
    def sizes(self) -> tuple[int, int, int, int]:
        """B, N, C, M."""
        return (*self.tokens.shape, len(self.queries))

    @property
    def full_bias(self) -> Tensor | None:
        batch, num_tokens, _, num_queries = self.sizes
        return None if self.bias is None else self.bias.expand(batch, num_queries, num_tokens)

    def sample(self, index: int) -> Case:
        """That sample alone."""
        own = {
            "bias": self.full_bias,
            **{n: getattr(self, n) for n in ("tokens", "mask", "grad_pooled", "grad_weights")},
        }
        one = {name: None if value is None else value[index : index + 1] for name, value in own.items()}
        return dataclasses.replace(self, **one)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same (B, N, C) values with other strides."""
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


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Case of sizes B, N, C, M: a mean of up to 3 sigma per token, scores of a few units."""

    def make(
        sizes: tuple[int, int, int, int],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        bias: tuple[Any, ...] | None = None,
        masked: bool = False,
        weights: bool = False,
        layout: str = "contiguous",
        offset: float = 3.0,
        eps: float = 1e-6,
        seed: int = 0,
    ) -> Case:
        batch, num_tokens, width, num_queries = sizes
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        tokens = normal(batch, num_tokens, width)
        tokens = tokens + offset * (2 * torch.rand(batch, num_tokens, 1, generator=generator) - 1)
        tokens = tokens * (0.5 * normal(batch, num_tokens, 1)).exp()
        queries = 2 * (normal(num_queries, width) + 0.25) / width**0.5
        mask = None
        if masked:  # some tokens of each sample take part, none of the last unless it is alone
            mask = (torch.rand(batch, num_tokens, generator=generator) < 0.6).to(device)
            mask[max(1, batch - 1) :] = False
        letters = {"B": batch, "M": num_queries, "N": num_tokens}
        gradient_layout = "contiguous" if layout == "contiguous" else "tokens first"
        return Case(
            laid_out(tokens.to(device, dtype), layout),
            queries.to(device, dtype).T.contiguous().T if layout == "sliced" else queries.to(device, dtype),
            None if bias is None else normal(*(letters.get(size, size) for size in bias)).to(device, dtype),
            mask,
            laid_out(normal(batch, num_queries, width).to(device), gradient_layout),
            5 * normal(batch, num_queries, num_tokens).to(device) if weights else None,
            eps,
        )

    return make


@pytest.fixture(scope="session")
def oracle(naive: Any) -> Callable[[Case], dict[str, tuple[Tensor, Tensor]]]:
    """Per result: what the definition gives in float64 on the CPU, and the size of the terms that it sums."""

    def compute(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
        def wide(tensor: Tensor) -> Tensor:
            return tensor.detach().cpu().double()

        batch, num_tokens, width, num_queries = case.sizes
        tokens, queries, dz = wide(case.tokens), wide(case.queries), wide(case.grad_pooled)
        scores_bias = torch.zeros(batch, num_queries, num_tokens, dtype=torch.float64)
        scores_bias = scores_bias if case.bias is None else scores_bias + wide(case.bias)
        leaves = [leaf.requires_grad_() for leaf in (tokens, queries, scores_bias)]
        mask = None if case.mask is None else case.mask.cpu()
        pooled, weights = naive(*leaves, mask, case.eps)
        da = torch.zeros_like(weights) if case.grad_weights is None else wide(case.grad_weights)
        grads = torch.autograd.grad((pooled * dz).sum() + (weights * da).sum(), leaves)
        with torch.no_grad():
            sigma = (tokens.var(dim=-1, correction=0) + case.eps).sqrt()[..., None]
            x = F.layer_norm(tokens, (width,), eps=case.eps)
            logits = torch.einsum("bnc,mc->bmn", x, queries) + scores_bias
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

    return compute


@pytest.fixture(scope="session")
def compute(launch: ModuleType) -> Callable[..., dict[str, Tensor]]:
    """The launcher's results, with delta as the autograd makes it."""

    def run(
        case: Case, forward: Any = None, backward: Any = None, *, tokens: bool = True, scores: bool = True
    ) -> dict[str, Tensor]:
        inputs = (case.tokens, case.queries, case.full_bias, case.mask)
        want_weights = case.grad_weights is not None
        pooled, lse, weights = launch.pool_forward(*inputs, case.eps, want_weights, forward)
        delta = (case.grad_pooled * pooled).sum(dim=-1)
        if case.grad_weights is not None:
            delta = delta + (case.grad_weights * weights).sum(dim=-1)
        grads = launch.pool_backward(
            case.grad_pooled, case.grad_weights, *inputs, lse, delta, case.eps, tokens, scores, backward
        )
        found = {"pooled": pooled, "lse": lse, "weights": weights}
        found |= dict(zip(("grad_tokens", "grad_queries", "grad_scores"), grads, strict=True))
        optional = (("weights", want_weights), ("grad_tokens", tokens), ("grad_scores", scores))
        absent = {name for name, wanted in optional if not wanted}
        assert all(found[name].numel() == 0 for name in absent)
        return {name: value for name, value in found.items() if name not in absent}

    return run


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


@pytest.fixture(scope="session")
def check(compute: Any, oracle: Any) -> Callable[..., dict[str, float]]:
    """Runs a case and holds every result against the oracle; ``scale`` widens the tolerance."""

    def run(case: Case, forward: Any = None, backward: Any = None, *, scale: float = 1.0, scores: bool = True) -> Any:
        found, expected = compute(case, forward, backward, scores=scores), oracle(case)
        errors = {name: relative_error(value, *expected[name]) for name, value in found.items()}
        limits = dict.fromkeys(errors, scale * FLOAT32)
        limits["grad_tokens"] = max(limits["grad_tokens"], ROUNDED[case.tokens.dtype])
        assert found["grad_tokens"].dtype == case.tokens.dtype
        assert all(value.dtype == torch.float32 for name, value in found.items() if name != "grad_tokens")
        too_large = {name: error for name, error in errors.items() if not error < limits[name]}
        assert not too_large, f"relative errors above {limits}: {too_large}"
        return errors

    return run


@pytest.fixture(scope="session")
def planned(launch: ModuleType) -> Callable[..., tuple[Any, Any]]:
    """Forward's and backward's plans with so many passes and (about) so many splits, whatever the default is."""
    from hd_awd.pooling.kernels.plan import make_plan, power_of_two

    def make(case: Case, passes: int, splits: int = 1, block_n: int | None = None) -> tuple[Any, Any]:
        (_, num_tokens, width, num_queries), size = case.sizes, case.tokens.element_size()
        plans = []
        for direction in ("forward", "backward"):
            plan = make_plan(direction, *case.sizes, size, lanes=launch._lanes(case.tokens.device))
            if passes == 2:
                rows = max(1, 32 // power_of_two(num_queries))
                plan = dataclasses.replace(plan, passes=2, block_n=rows, row_head=256, row_tail=0, warps=4)
            elif plan.passes == 2:  # slow on a GPU, but right
                head = max(256, power_of_two(width))
                plan = dataclasses.replace(plan, passes=1, block_n=1, row_head=head, row_tail=0, warps=4)
            rows = block_n or min(plan.block_n, 4 if splits > 1 else 16)
            each = math.ceil(num_tokens / splits / rows) * rows
            plans.append(dataclasses.replace(plan, block_n=rows, tokens_per_split=each, splits=-(-num_tokens // each)))
        return plans[0], plans[1]

    return make
