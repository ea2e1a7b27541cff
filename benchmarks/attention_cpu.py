"""Which attention a CPU trains fastest with: PyTorch's fused kernel, or two matrix products and a softmax.

    hatch run bench attention-cpu

Self-attention of tokens (B, H, N, D), as in the networks of hd-zoo. "forward" is without a graph, "forward+backward"
has the gradients of q, k and v. The batch shrinks as N grows, so that every shape has about as many scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import interleave, print_table, summarise, write_csv

SHAPES = {16: (128, 4, 16, 16), 49: (64, 4, 49, 32), 64: (64, 6, 64, 32), 256: (8, 6, 256, 64), 512: (4, 6, 512, 64)}
DTYPES = (torch.bfloat16, torch.float32)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention-cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="counted runs of each case (default: %(default)s)")
    options = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    for dtype in DTYPES:
        for tokens, shape in SHAPES.items():
            for gradient in (False, True):
                seconds = interleave(cases(shape, dtype, gradient), options.rounds)
                facts = {
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": tokens,
                    "pass": "forward" + "+backward" * gradient,
                }
                rows += [{**facts, **row} for row in summarise(seconds, "fused")]
    print_table(rows)
    print(f"\nWrote {write_csv('attention_cpu', rows)}")


def cases(shape: tuple[int, ...], dtype: torch.dtype, gradient: bool) -> dict[str, Callable[[], object]]:
    """Both ways on the same tensors."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=gradient) for _ in range(3))

    def run(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        out = attention(q, k, v)
        if gradient:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return {"fused": lambda: run(F.scaled_dot_product_attention), "products": lambda: run(products)}


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matrix products and a softmax."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
