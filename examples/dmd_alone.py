"""hd-dmd in a loop of your own: a one-step generator is pulled to its teacher's distribution, without any data.

    python examples/dmd_alone.py

The teacher is the exact velocity of a mixture of three Gaussians, written as a function: anything callable will do.
"""

import torch
from torch import Tensor, nn

from hd_dmd import DistributionMatchingLoss, fake_score_loss

CENTRES, STD = torch.tensor([[-1.5, 0.0], [1.5, 0.0], [0.0, 1.5]]), 0.3


def teacher(x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
    """The mixture's velocity E[n - x_0 | x_t] in closed form. It ignores r."""
    t = t[:, None, None]
    variance = ((1 - t) * STD) ** 2 + t**2
    offset = x[:, None] - (1 - t) * CENTRES  # (B, 3, 2)
    weights = torch.softmax(-0.5 * offset.square().sum(2, keepdim=True) / variance, dim=1)
    velocities = (t - (1 - t) * STD**2) / variance * offset - CENTRES
    return (weights * velocities).sum(1)


class Network(nn.Module):
    """The fake score, and the student: (x, t) to a velocity."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def one_step(student: nn.Module, batch: int) -> Tensor:
    """x = noise - velocity, from t = 1 to 0."""
    noise = torch.randn(batch, 2)
    return noise - student(noise, torch.ones(batch))


def report(step: int, sample: Tensor) -> tuple[float, list[float]]:
    """The share of samples within three standard deviations of a centre, and the share that is nearest to each."""
    distance, nearest = torch.cdist(sample, CENTRES).min(dim=1)
    close = float((distance < 3 * STD).float().mean())
    shares = [float((nearest == i).float().mean()) for i in range(len(CENTRES))]
    print(
        f"step {step:3d}: {close:.0%} close to a centre (teacher: 99%), {', '.join(f'{s:.0%}' for s in shares)} at each"
    )
    return close, shares


def main() -> tuple[float, list[float]]:
    torch.manual_seed(0)
    student, fake_score = Network(), Network()
    student_optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, betas=(0.0, 0.99))
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=5e-3, betas=(0.0, 0.99))
    matching = DistributionMatchingLoss(floor=0.2)  # few elements: see "Pitfalls" in the package's README
    for step in range(301):
        for _ in range(5):  # the fake score follows the student: several updates for one of the student
            sample = one_step(student, 256).detach()
            fake_score_optimizer.zero_grad()
            fake_score_loss(fake_score, sample).loss.backward()
            fake_score_optimizer.step()
        student_optimizer.zero_grad()
        fake_score.requires_grad_(False)  # the student's turn
        matching(one_step(student, 256), real=teacher, fake=fake_score).loss.backward()
        fake_score.requires_grad_(True)
        student_optimizer.step()
        if step % 100 == 0:
            with torch.no_grad():
                result = report(step, one_step(student, 4000))
    return result


if __name__ == "__main__":
    main()
