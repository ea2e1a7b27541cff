"""What a MeanFlow step costs beside a flow-matching step of the same network and batch.

    hatch run bench meanflow-step

Full optimiser steps (loss, backward, AdamW), interleaved. "flow matching" is the MeanFlow loss with r = t everywhere;
the others have 25 % of their samples with r != t. "teacher" rows include the teacher's forward pass over the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import hd_zoo
from benchmarks.runner import interleave, print_table, summarise, write_csv
from hd_meanflow import LogitNormalTimes, MeanFlowLoss

NETWORKS: dict[str, dict[str, Any]] = {"dit_nano_2": {}, "dit_micro_4": {}, "dit_mini_4": {}}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks meanflow-step", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="samples a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="counted runs of each case (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", default=["dit_nano_2", "dit_micro_4"], choices=list(NETWORKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    for name in options.networks:
        seconds = interleave(cases(name, options.batch, torch.device(options.device)), options.rounds)
        rows += [{"network": name, "batch": options.batch, **row} for row in summarise(seconds, "flow_matching")]
    print_table(rows)
    print(f"\nWrote {write_csv('meanflow_step', rows)}")


def cases(name: str, batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Named steps of one network on fixed random data."""
    torch.manual_seed(0)
    teacher = hd_zoo.create_model(name, classes=10).to(device).requires_grad_(False)
    x = torch.randn(batch, *teacher.sample_shape, device=device)
    noise, labels = torch.randn_like(x), torch.randint(10, (batch,), device=device)

    def step(share: float, with_teacher: bool, derivative: str = "jvp") -> Callable[[], object]:
        network: nn.Module = hd_zoo.to_student(teacher).requires_grad_(True)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
        loss = MeanFlowLoss(times=LogitNormalTimes(interval_share=share), derivative=derivative)

        def run() -> None:
            output = loss(network, x, noise, teacher=teacher if with_teacher else None, labels=labels)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()

        return run

    return {
        "flow_matching": step(0.0, False),
        "meanflow_jvp": step(0.25, False),
        "meanflow_jvp_teacher": step(0.25, True),
        "meanflow_difference": step(0.25, False, "difference"),
        "meanflow_difference_teacher": step(0.25, True, "difference"),
    }
