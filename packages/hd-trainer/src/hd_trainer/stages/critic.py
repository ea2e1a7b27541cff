"""The adversary of stage 2: its settings, and the discriminator's way to disk and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hd_awd import Discriminator, FeatureTap
from hd_trainer.errors import UserError, check_choice
from hd_trainer.files import read_json, write_atomically, write_json
from hd_trainer.optim import OptimizerSettings
from hd_trainer.stages.common import check_positive, seeded

WEIGHTS, FACTS = "discriminator.safetensors", "discriminator.json"

#: Settings that the first discriminators on disk did not know: they were made with the defaults.
YOUNGER = ("heads", "merge", "weighed")

Pooling = Literal["attention", "scorer", "mean"]
Merge = Literal["logits", "concatenate"]
Weighed = Literal["vectors", "logits"]
AdversarialLoss = Literal["softplus", "hinge", "relativistic"]


@dataclass(frozen=True, kw_only=True)
class AdversarySettings:
    """The discriminator on the frozen teacher's features [HD: AWD; the exact head is ours]."""

    weight: float = 3e-3
    """weight of the adversarial loss in the student's loss [DMD2: 3e-3]; 0 switches the adversary off"""
    pooling: Pooling = "attention"
    """"attention" is AWD, "scorer" weighs tokens by an MLP, "mean" is the global-average-pooling baseline"""
    merge: Merge = "logits"
    """"logits": one logit per layer; "concatenate": all layers' vectors into one MLP, one logit"""
    weighed: Weighed = "vectors"
    """"vectors": tokens are pooled, then judged; "logits": every token is judged, then the logits are pooled"""
    layers: tuple[str, ...] = ("blocks.1", "blocks.3")
    """modules of the teacher whose outputs the discriminator sees"""
    queries: int = 4
    """learned queries per layer"""
    heads: int = 1
    """attention heads, a divisor of head_width"""
    head_width: int = 64
    """width of keys and values"""
    hidden: int = 128
    """width of the logit's MLP"""
    loss: AdversarialLoss = "softplus"
    """adversarial loss"""
    r1_weight: float = 0.0
    """weight of approximate R1 on real images; 0 is none"""
    r1_std: float = 0.05
    """size of R1's perturbation"""
    levels: tuple[float, float] = (0.02, 0.98)
    """noise levels at which images are shown to the discriminator"""
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(lr=1e-3, betas=(0.0, 0.99), schedule="constant")
    )

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, Pooling)
        check_choice("merge", self.merge, Merge)
        check_choice("weighed", self.weighed, Weighed)
        check_choice("loss", self.loss, AdversarialLoss)
        check_positive(queries=self.queries, heads=self.heads, head_width=self.head_width, hidden=self.hidden)
        check_positive(r1_std=self.r1_std)
        if self.head_width % self.heads:
            raise UserError(f"heads must divide head_width; got {self.heads} and {self.head_width}")
        if self.weighed == "logits" and (self.heads > 1 or self.merge != "logits"):
            raise UserError(
                f'weighed "logits" goes with heads 1 and merge "logits" alone; got heads {self.heads}, '
                f"merge {self.merge!r}"
            )
        if not (0 <= self.weight < math.inf and 0 <= self.r1_weight < math.inf):
            raise UserError(f"weight and r1_weight must be >= 0 and finite; got {self.weight} and {self.r1_weight}")
        if not self.layers:
            raise UserError("layers must name at least one module of the teacher")
        check_levels(self.levels)


def check_levels(levels: tuple[float, float]) -> None:
    """Raise UserError unless 0 <= low < high <= 1."""
    if not 0 <= levels[0] < levels[1] <= 1:
        raise UserError(f"levels must satisfy 0 <= low < high <= 1; got {levels}")


def check_layers(settings: AdversarySettings, teacher: nn.Module) -> FeatureTap:
    """The tap on the teacher's layers.

    Raises:
        UserError: if the teacher lacks one of them.
    """
    try:
        return FeatureTap(teacher, settings.layers)
    except ValueError as error:
        raise UserError(f"adversary.layers: {error}") from error


def seeded_discriminator(settings: AdversarySettings, widths: Sequence[int], seed: int) -> Discriminator:
    """A fresh discriminator whose weights are a function of the seed; the global generator is left alone."""
    with seeded(seed):
        return _build(dataclasses.asdict(settings), widths)


def save_discriminator(discriminator: Discriminator, settings: AdversarySettings, folder: Path) -> None:
    """Write ``discriminator.safetensors`` and what is needed to use it again, beside the generator."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in discriminator.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path))
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name != "optimizer"}
    write_json(folder / FACTS, {"widths": list(discriminator.widths), **facts})


def load_discriminator(folder: Path) -> tuple[Discriminator, tuple[str, ...], tuple[float, float]]:
    """(discriminator in evaluation mode, the teacher's layers it sees, its noise levels).

    Raises:
        UserError: if the files are missing or damaged.
    """
    facts = read_json(folder / FACTS)
    try:
        discriminator = _build(facts, facts["widths"])
        discriminator.load_state_dict(load_file(folder / WEIGHTS))
        layers, levels = tuple(facts["layers"]), tuple(facts["levels"])
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the discriminator in {folder} is damaged ({error}); run its stage again") from error
    return discriminator.eval().requires_grad_(False), layers, levels


def _build(facts: dict[str, Any], widths: Sequence[int]) -> Discriminator:
    facts = {name: getattr(AdversarySettings, name) for name in YOUNGER} | facts
    variant = {name: facts[name] for name in ("pooling", *YOUNGER, "queries", "head_width", "hidden")}
    return Discriminator(widths, **variant)
