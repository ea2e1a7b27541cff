"""hd-zoo alone: train a small network, save and load it, guide it, sample it by flow, by jumps, and wrap a foreign one.

    python examples/zoo_alone.py

The data are two moons of points; the label says which moon.
"""

import tempfile

import torch
from torch import Tensor, nn

import hd_zoo


def data(batch: int) -> tuple[Tensor, Tensor]:
    """Points (B, 2) on two interleaved half circles, and labels (B,)."""
    labels, angle = torch.randint(2, (batch,)), torch.pi * torch.rand(batch)
    sign = 1.0 - 2 * labels
    x = torch.stack([sign * angle.cos() + labels - 0.5, sign * angle.sin() + 0.5 * labels - 0.25], dim=1)
    return x + 0.25 * torch.randn_like(x), labels


def train(network: nn.Module, null_label: int, steps: int = 500) -> None:
    """Flow matching by hand; one label in ten is replaced by the null label, for guidance."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(steps):
        x, labels = data(128)
        noise, t = torch.randn_like(x), torch.rand(128)
        labels = torch.where(torch.rand(128) < 0.1, null_label, labels)
        x_t = (1 - t[:, None]) * x + t[:, None] * noise
        optimizer.zero_grad()
        (network(x_t, t, labels=labels) - (noise - x)).square().mean().backward()
        optimizer.step()


class Denoiser(nn.Module):
    """Somebody else's network: it predicts the clean sample in place of a velocity."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor) -> Tensor:
        return x - t[:, None] * self.field(x, t, labels=labels)


@torch.no_grad()
def main() -> dict[str, float]:
    torch.manual_seed(0)
    network = hd_zoo.create_model("mlp_2d", classes=2)
    with torch.enable_grad():
        train(network, network.null_label)
    with tempfile.TemporaryDirectory() as folder:
        hd_zoo.save_pretrained(network, folder)  # model.safetensors and config.json
        teacher = hd_zoo.from_pretrained(folder)

    noise = hd_zoo.seeded_noise((2,), seeds=range(500))  # row i depends on seed i alone
    labels = torch.arange(500) % 2
    exact = hd_zoo.sample_ode(teacher, noise, steps=50, method="heun", labels=labels)
    found = {}
    for method, steps in (("euler", 20), ("heun", 10)):  # as many calls
        x = hd_zoo.sample_ode(teacher, noise, steps=steps, method=method, labels=labels)
        found[method] = float((x - exact).norm(dim=1).mean())
        print(f"{method}, 20 calls: {found[method]:.4f} away from 100 calls")

    for scale in (1.0, 3.0):
        guided = hd_zoo.Guidance(teacher, scale, null={"labels": teacher.null_label})
        x = hd_zoo.sample_ode(guided, noise, steps=50, labels=labels)
        found[f"spread {scale:g}"] = float(x[labels == 0].std(0).mean())
        print(f"guidance scale {scale:g}: the first moon's points spread by {found[f'spread {scale:g}']:.3f}")

    student = hd_zoo.to_student(teacher)  # takes r as well; until it is trained it is the teacher
    same = hd_zoo.sample_jumps(student, noise, labels=labels) - hd_zoo.sample_ode(teacher, noise, 1, labels=labels)
    wrapped = hd_zoo.DataPrediction(Denoiser(teacher))
    foreign = hd_zoo.sample_ode(wrapped, noise, 20, labels=labels) - hd_zoo.sample_ode(
        teacher, noise, 20, labels=labels
    )
    found |= {"student": float(same.abs().max()), "foreign": float(foreign.abs().max())}
    print(f"new student against its teacher: {found['student']:.0e}, wrapped network: {found['foreign']:.0e}")
    return found


if __name__ == "__main__":
    main()
