"""The discriminator of stage 2: its settings, what it looks at, its update, and its way to disk and back."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from hd_awd import (
    Discriminator,
    DiscriminatorConfig,
    FeatureTap,
    approximate_r1,
    default_layers,
    discriminator_loss,
)
from hd_dmd import KarrasLevels, LogitNormalLevels, UniformLevels
from hd_meanflow import interpolate
from hd_trainer.checks import check_choice, check_number, check_whole
from hd_trainer.context import Context
from hd_trainer.earlier import upgrade_discriminator
from hd_trainer.engine import draws
from hd_trainer.engine.draws import seeded
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings
from hd_trainer.errors import UserError
from hd_trainer.files import read_json, read_tensors, write_json, write_tensors
from hd_trainer.networks import inner_layers

WEIGHTS, FACTS = "discriminator.safetensors", "discriminator.json"

#: Laws of the noise level; which one is the recipe's choice, the command line sets what that one has.
NoiseLevels = UniformLevels | KarrasLevels | LogitNormalLevels
GanLoss = Literal["softplus", "hinge", "relativistic"]


@dataclass(frozen=True, kw_only=True)
class DiscriminatorSettings:
    """The discriminator on the frozen teacher's features [HD: AWD; the exact head is ours]."""

    gan_weight: float = 3e-3
    """weight of the adversarial loss in the student's loss [DMD2: 3e-3]; 0 leaves the discriminator out"""
    gan_loss: GanLoss = "softplus"
    """adversarial loss"""
    network: Annotated[DiscriminatorConfig, tyro.conf.arg(name="")] = field(default_factory=DiscriminatorConfig)
    """pooling and sizes"""
    layers: tuple[str, ...] = ()
    """modules of the teacher whose outputs the discriminator sees; none given: evenly spaced blocks, at most four"""
    r1_weight: float = 0.0
    """weight of approximate R1 on real images; 0 is none"""
    r1_std: float = 0.05
    """size of R1's perturbation"""
    noise_levels: NoiseLevels = field(default_factory=UniformLevels)
    """noise levels at which images are shown to the discriminator"""
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(lr=1e-3, betas=(0.0, 0.99), schedule="constant")
    )

    def __post_init__(self) -> None:
        check_choice("gan_loss", self.gan_loss, GanLoss)
        check_number(gan_weight=self.gan_weight, r1_weight=self.r1_weight)
        # The network's own checks know no upper bound.
        network = self.network
        check_whole(high=4096, num_queries=network.num_queries, head_width=network.head_width)
        check_whole(high=65536, hidden=network.hidden)
        check_number(above=True, high=1.0, eps=network.eps)
        check_number(above=True, r1_std=self.r1_std)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A discriminator, the frozen teacher's features that it sees, and how images are shown to it."""

    settings: DiscriminatorSettings
    discriminator: Discriminator
    tap: FeatureTap
    context: Context

    def levels(self, size: int, generator: torch.Generator) -> Tensor:
        """Noise levels t (size,) on the device."""
        return self.settings.noise_levels.sample(size, generator, self.context.device)

    def show(self, images: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """What the discriminator is shown: images noised to level t."""
        return interpolate(images, self.context.noise(len(images), generator), t)

    def logits(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Logits of noised images; the gradient goes through the frozen teacher into them."""
        logits: Tensor = self.discriminator(self.tap(x_t, t, **cond))
        return logits


def tap_layers(settings: DiscriminatorSettings, teacher: nn.Module) -> FeatureTap:
    """The tap on the teacher's layers: those that the settings name, else hd_awd.default_layers.

    Raises:
        UserError: if the teacher lacks one of them, or no blocks are found in it.
    """
    try:
        return FeatureTap(teacher, inner_layers(teacher, settings.layers) or default_layers(teacher))
    except ValueError as error:
        advice = "; give --distribution.discriminator.layers without a name for evenly spaced blocks"
        advice = advice if settings.layers else ""
        raise UserError(f"discriminator.layers: {error}{advice}") from error


@torch.no_grad()
def check_layers(settings: DiscriminatorSettings, context: Context, teacher: nn.Module) -> None:
    """Raises UserError if the teacher lacks a layer, or what one puts out are no features or the same for all samples.

    The last is so of the layers of a time embedding.
    """
    tap = tap_layers(settings, teacher)
    x = draws.picture_noise(context.data.shape, 0, 2, context.device)
    cond = context.data.train.read(torch.zeros(2, dtype=torch.long)).to(context.device).cond
    try:
        features = tap(x, x.new_full((2,), 0.5), **cond)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"discriminator.layers: {' '.join(str(error).split())[:300]}") from error
    for name, feature in zip(tap.names, features, strict=True):
        if torch.equal(feature[0], feature[1]):
            raise UserError(
                f"discriminator.layers: {name} puts out the same for two different samples; name other modules "
                "(see hdistill list layers)"
            )


def prepare_judge(settings: DiscriminatorSettings, context: Context, teacher: nn.Module) -> Judge:
    """A fresh discriminator whose weights are a function of the seed, in front of the teacher's features."""
    tap = tap_layers(settings, teacher)
    noise, cond = context.grid_inputs()
    widths = [features.shape[-1] for features in tap(noise, noise.new_ones(len(noise)), **cond)]
    with seeded(context.seed):
        discriminator = Discriminator.from_config(widths, settings.network)
    return Judge(settings=settings, discriminator=discriminator.to(context.device), tap=tap, context=context)


def discriminator_step(
    judge: Judge,
    optimizer: Optimizer,
    real: Tensor,
    sample: Tensor,
    cond: dict[str, Tensor],
    generator: torch.Generator,
    index: int,
) -> dict[str, Tensor]:
    """One update of the discriminator on real and generated images, both detached; its scalars.

    Real and generated images are shown at the same levels: noise must not give them away.
    """
    settings, context = judge.settings, judge.context
    t = judge.levels(len(sample), generator)
    shown = judge.show(real, t, generator)
    with context.autocast():
        real_logits = judge.logits(shown, t, cond)
        fake_logits = judge.logits(judge.show(sample, t, generator), t, cond)
        loss = discriminator_loss(real_logits, fake_logits, settings.gan_loss)
    right = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
    record = {"discriminator_loss": loss.detach(), "discriminator_accuracy": right}
    if settings.r1_weight > 0:
        # Outside of autocast: bf16's rounding would be divided by the square of a small number.
        logits_of = functools.partial(judge.logits, t=t, cond=cond)
        r1 = approximate_r1(logits_of, shown, std=settings.r1_std, generator=generator)
        loss = loss + settings.r1_weight * r1
        record["r1"] = r1.detach()
    optimizer.update(loss, index)
    return record


def save_discriminator(judge: Judge, folder: Path) -> None:
    """Write ``discriminator.safetensors`` and what is needed to use it again, beside the generator."""
    settings = judge.settings
    write_tensors(folder / WEIGHTS, judge.discriminator.state_dict())
    facts = {
        "widths": list(judge.discriminator.widths),
        "network": dataclasses.asdict(settings.network),
        "layers": list(settings.layers or judge.tap.names),
        "noise_levels": dataclasses.asdict(settings.noise_levels),
    }
    write_json(folder / FACTS, facts)


def load_discriminator(folder: Path) -> tuple[Discriminator, tuple[str, ...]]:
    """(discriminator in evaluation mode, the teacher's layers it sees).

    Raises:
        UserError: if the files are missing or damaged.
    """
    facts = upgrade_discriminator(read_json(folder / FACTS))
    tensors = read_tensors(folder / WEIGHTS)
    try:
        discriminator = Discriminator.from_config(facts["widths"], DiscriminatorConfig(**facts["network"]))
        discriminator.load_state_dict(tensors)
        layers = tuple(str(layer) for layer in facts["layers"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"the discriminator in {folder} is damaged ({reason}); run its stage again") from error
    return discriminator.eval().requires_grad_(False), layers
