"""Our transformer beside diffusers' DiT of equal size and weights: forward, forward and backward, and the JVP.

    hatch run bench transformer

Interleaved; the two networks' outputs are compared before any time is printed. The JVP is that of a trajectory loss:
over x, t and r of the two-time student, without a backward graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

import hd_zoo
from benchmarks.runner import interleave, print_table, summarise, write_csv
from hd_zoo.adapters import from_diffusers_dit


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks transformer", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="samples (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=6, help="blocks of DiT-S/2's width (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="counted runs of each case (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    seconds = interleave(cases(options.batch, options.depth, torch.device(options.device)), options.rounds)
    pairs = {
        "ours_forward": "diffusers_forward",
        "ours_forward_backward": "diffusers_forward_backward",
        "ours_jvp": "ours_forward_backward",
    }
    rows = []
    for name, base in pairs.items():
        row = next(row for row in summarise({name: seconds[name], base: seconds[base]}, base) if row["case"] == name)
        row["ratio"] = row.pop(f"ratio_to_{base}")
        rows.append({"depth": options.depth, "batch": options.batch, **row, "to": base})
    print_table(rows)
    print(f"\nWrote {write_csv('transformer', rows)}")


def cases(batch: int, depth: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Named runs on the same data; raises SystemExit if the two networks do not agree."""
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, num_layers=depth, norm_eps=1e-6)
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs = theirs.to(device).eval()  # in training mode it drops labels at random
    # diffusers embeds time and label anew in every block; that is its design, and so part of what it costs.
    ours = from_diffusers_dit(theirs).requires_grad_(True)
    student = hd_zoo.to_student(ours)
    x = torch.randn(batch, 4, 32, 32, device=device)
    t, labels = torch.rand(batch, device=device), torch.randint(1000, (batch,), device=device)
    one, other = call_ours(ours, x, t, labels), call_theirs(theirs, x, t, labels)
    gap = ((one - other).abs().max() / other.abs().max()).item()
    print(f"largest relative difference of the two outputs: {gap:.1e}")
    if not gap < 1e-4:
        raise SystemExit("the two networks do not agree: nothing is timed")

    def forward(run: Callable[..., Tensor], network: torch.nn.Module) -> Callable[[], object]:
        def measured() -> Tensor:
            with torch.no_grad():
                return run(network, x, t, labels)

        return measured

    def both(run: Callable[..., Tensor], network: torch.nn.Module) -> Callable[[], object]:
        def measured() -> None:
            network.zero_grad(set_to_none=True)
            run(network, x, t, labels).square().mean().backward()

        return measured

    def jvp() -> object:
        tangents = (torch.randn_like(x), torch.ones_like(t), torch.zeros_like(t))
        with torch.no_grad():
            return torch.func.jvp(lambda *a: student(*a, labels=labels), (x, t, t / 2), tangents)

    return {
        "diffusers_forward": forward(call_theirs, theirs),
        "ours_forward": forward(call_ours, ours),
        "diffusers_forward_backward": both(call_theirs, theirs),
        "ours_forward_backward": both(call_ours, ours),
        "ours_jvp": jvp,
    }


def call_ours(network: torch.nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The predicted noise."""
    return network(x, t, labels=labels)


def call_theirs(network: torch.nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The predicted noise."""
    return network(x, timestep=1000 * t, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]
