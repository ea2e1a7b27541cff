"""hd-meanflow in a loop of your own: a student learns in one step what its teacher needs a hundred steps for.

    python examples/meanflow_alone.py

The data are eight blobs on the edge of a rectangle. Any network that maps (x, t, r=None) to a velocity will do.
"""

import copy

import torch
from torch import Tensor, nn

from hd_meanflow import LogitNormalTimes, MeanFlowLoss, jump


class Network(nn.Module):
    """Yours. A teacher is called without r; a student answers with the mean velocity over [r, t]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        gap = torch.zeros_like(t) if r is None else t - r
        return self.layers(torch.cat([x, t[:, None], gap[:, None]], dim=1))


def data(batch: int) -> Tensor:
    """Points near the corners and the middles of the sides of a 4 x 2 rectangle."""
    around = torch.tensor([[-2, -1], [0, -1], [2, -1], [2, 0], [2, 1], [0, 1], [-2, 1], [-2, 0]])
    return around[torch.randint(8, (batch,))] + 0.1 * torch.randn(batch, 2)


def train(network: nn.Module, loss: MeanFlowLoss, teacher: nn.Module | None, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = data(256)
        optimizer.zero_grad()
        loss(network, x, torch.randn_like(x), teacher=teacher).loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def euler(teacher: nn.Module, x: Tensor, steps: int) -> Tensor:
    """The teacher's samples: many small jumps from noise (t = 1) to data (t = 0)."""
    for i in range(steps, 0, -1):
        t, r = torch.full((len(x),), i / steps), torch.full((len(x),), (i - 1) / steps)
        x = jump(x, teacher(x, t), t, r)
    return x


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Zero for equal distributions: 2 E|a - b| - E|a - a'| - E|b - b'|."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    teacher = Network()
    train(teacher, MeanFlowLoss(times=LogitNormalTimes(interval_share=0.0), p=0.0), None, 800)  # flow matching
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    train(student, MeanFlowLoss(times=LogitNormalTimes(interval_share=0.75)), teacher, 800)

    noise, real = torch.randn(2000, 2), data(2000)
    with torch.no_grad():
        one_step = jump(noise, student(noise, torch.ones(2000), torch.zeros(2000)), torch.ones(2000), torch.zeros(2000))
    samples = {"teacher, 100 steps": euler(teacher, noise, 100), "teacher, 1 step": euler(teacher, noise, 1)}
    samples["student, 1 step"] = one_step
    distances = {name: energy_distance(x, real) for name, x in samples.items()}
    for name, distance in distances.items():
        print(f"{name:20s} {distance:.3f} away from the data (energy distance)")
    return distances


if __name__ == "__main__":
    main()
