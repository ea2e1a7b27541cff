"""Which weighting stage 1 wants: p = 1, every sample alike, or p = 0, the plain squared error; on moons and digits.

    hatch run experiment weighting

Two moons: points in the plane, a teacher and a student of 50 k parameters each, trained alike but for the power p of
the adaptive weight and the law of the times. A bridge is a one-step sample further from both moons than 99.9 % of real
points. Digits: stage 1 alone from the teachers of digits-seeds. Writes results/weighting.csv.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hd_zoo
from benchmarks.runner import print_table, write_csv
from hd_meanflow import LogitNormalTimes, MeanFlowLoss, UniformTimes

RESULTS = Path(__file__).parent / "results"
POWERS = (0.0, 0.5, 1.0)
ON_DIGITS = (0.0, 1.0)
TIMES = {
    "logit-normal, half (0, 1)": LogitNormalTimes(interval_share=0.5, endpoint_share=0.5),
    "uniform, 0.3 (0, 1)": UniformTimes(interval_share=0.5, endpoint_share=0.3),
}
SAMPLES, NOISE = 4096, 0.05


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments weighting", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000, help="of each network on the moons (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="where digits-seeds put its runs")
    parser.add_argument("--out", type=Path, default=Path("runs/weighting"))
    options = parser.parse_args(arguments)
    for seed in options.seeds:
        if not (options.runs / str(seed) / "evaluation.json").exists():
            parser.error(
                f"no finished run in {options.runs / str(seed)}; run first: python -m experiments digits-seeds"
            )
    rows = [row for seed in options.seeds for row in on_moons(seed, options.steps)]
    rows += [row for seed in options.seeds for row in on_digits(seed, options.runs, options.out)]
    print_table(rows)
    print(f"\nWrote {write_csv('weighting', rows, RESULTS)}")


def moons(count: int, generator: torch.Generator) -> Tensor:
    """Two half circles of radius 1 that reach into each other, with noise; (count, 2), about unit variance."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    points = torch.stack([x - 0.5, 2 * (y - 0.25)], dim=1)
    return points + NOISE * torch.randn(count, 2, generator=generator)


def on_moons(seed: int, steps: int) -> list[dict[str, object]]:
    """A row per power and law of times, all from one teacher."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    teacher = hd_zoo.create_model("mlp_2d")
    train(teacher, MeanFlowLoss(times=LogitNormalTimes(interval_share=0.0), p=0.0), None, steps, generator)
    teacher.requires_grad_(False)
    real, other = moons(SAMPLES, generator), moons(SAMPLES, generator)
    allowed = float(torch.cdist(other, real).amin(dim=1).quantile(0.999))
    noise = hd_zoo.seeded_noise((2,), range(SAMPLES))
    found: dict[tuple[str, str], Tensor] = {
        ("real", ""): other,
        ("teacher, 50 steps", ""): hd_zoo.sample_ode(teacher, noise, 50),
    }
    for times, law in TIMES.items():
        for power in POWERS:
            student = hd_zoo.to_student(teacher).requires_grad_(True)
            train(student, MeanFlowLoss(times=law, p=power), teacher, steps, torch.Generator().manual_seed(seed + 1))
            found[f"p = {power:g}", times] = hd_zoo.sample_jumps(student, noise).detach()
    return [
        {
            "data": "moons",
            "seed": seed,
            "case": case,
            "times": times,
            "energy_distance": round(energy_distance(points, real), 5),
            "bridges": round(float((torch.cdist(points, real).amin(dim=1) > allowed).float().mean()), 4),
        }
        for (case, times), points in found.items()
    ]


def train(
    network: nn.Module, loss: MeanFlowLoss, teacher: nn.Module | None, steps: int, generator: torch.Generator
) -> None:
    """AdamW with a half cosine, batches of 512 fresh points."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc=f"moons, p = {loss.p:g}", unit="step", mininterval=10.0):
        x = moons(512, generator)
        noise = torch.randn(x.shape, generator=generator)
        optimizer.zero_grad()
        loss(network, x, noise, teacher=teacher, generator=generator).loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, unbiased: 0 for equal distributions, up to noise."""

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))


def on_digits(seed: int, runs: Path, out: Path) -> list[dict[str, object]]:
    """Stage 1 of the digits recipe for two powers; p = 1 is the run of digits-seeds itself."""
    rows: list[dict[str, object]] = []
    for power in ON_DIGITS:
        folder = runs / str(seed) if power == 1.0 else out / f"p{power:g}-{seed}"
        if not (folder / "evaluation.json").exists():
            teacher = ["--teacher-weights", str(runs / str(seed) / "teacher"), "--evaluation.teacher-steps", "1"]
            flags = ["--seed", str(seed), "--out", str(folder), "--trajectory.meanflow.p", str(power), *teacher]
            for command in (["train", "trajectory", "digits", *flags], ["evaluate", str(folder)]):
                subprocess.run([sys.executable, "-m", "hd_trainer", *command], check=True)
        found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
        row = next(row for row in found if row["name"] == "trajectory")
        case = {"data": "digits", "seed": seed, "case": f"p = {power:g}", "times": next(iter(TIMES))}
        rows.append(case | {measure: round(row[measure], 4) for measure in ("fd", "precision", "recall")})
    return rows
