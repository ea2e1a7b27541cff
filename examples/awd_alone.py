"""hd-awd in a loop of your own: a discriminator on the features of somebody else's frozen network finds a small fault.

    python examples/awd_alone.py

Real pictures are smooth; generated ones have a fault of 2 x 2 pixels in a random place. Compared are AWD, which
learns which tokens to weigh, and global average pooling (GAP). The features come from a convolutional network that is
not trained; in distillation they are the teacher's, elsewhere those of any encoder.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hd_awd import Discriminator, FeatureTap, discriminator_loss, generator_loss


def real_pictures(batch: int) -> Tensor:
    """(B, 1, 16, 16), smooth: coarse noise, enlarged."""
    return interpolate(torch.randn(batch, 1, 4, 4), size=16, mode="bicubic") + 0.05 * torch.randn(batch, 1, 16, 16)


def generated_pictures(batch: int) -> tuple[Tensor, Tensor]:
    """Pictures with a fault, and where it is: both (B, 1, 16, 16)."""
    x, where = real_pictures(batch), torch.zeros(batch, 1, 16, 16, dtype=torch.bool)
    for i, (top, left) in enumerate(torch.randint(15, (batch, 2)).tolist()):
        where[i, 0, top : top + 2, left : left + 2] = True
    return x + 0.7 * torch.randn_like(x) * where, where


def make_encoder() -> nn.Module:
    """Stands for a network that somebody has trained."""
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU()
    return nn.Sequential(*layers).requires_grad_(False)


def train(discriminator: Discriminator, tap: FeatureTap, steps: int = 250) -> float:
    """Train, then return the share of new pictures that are judged rightly."""
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=3e-3)
    for _ in range(steps):
        real, (fake, _) = real_pictures(64), generated_pictures(64)
        optimizer.zero_grad()
        discriminator_loss(discriminator(tap(real)), discriminator(tap(fake))).backward()
        optimizer.step()
    with torch.no_grad():
        real_logits = discriminator(tap(real_pictures(1000))).mean(1)
        fake_logits = discriminator(tap(generated_pictures(1000)[0])).mean(1)
        return float(((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2)


def main() -> dict[str, float]:
    torch.manual_seed(0)
    encoder = make_encoder()
    tap = FeatureTap(encoder, ["1", "3"])  # names from encoder.named_modules(); maps (B, C, H, W) become tokens
    widths = [tokens.shape[-1] for tokens in tap(real_pictures(1))]
    found = {}
    for pooling in ("mean", "attention"):
        torch.manual_seed(1)
        discriminator = Discriminator(widths, pooling=pooling)
        found[pooling] = train(discriminator, tap)
        print(f"pooling={pooling!r}: {found[pooling]:.0%} of new pictures are judged rightly")

    # The student's turn: the discriminator is frozen, the loss goes back through it and the encoder into the picture.
    fake, where = generated_pictures(500)
    discriminator.requires_grad_(False)
    generator_loss(discriminator(tap(fake.requires_grad_()))).backward()
    strength = fake.grad.square()
    found["gradient"] = float((strength * where).sum() / strength.sum())
    print(f"{found['gradient']:.0%} of AWD's gradient (squared) falls on the fault, which is 2% of the picture")
    return found


if __name__ == "__main__":
    main()
