"""Where the discriminator looks: token weights on real and on generated images, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hd_awd import FeatureTap
from hd_meanflow import interpolate
from hd_trainer.context import Context
from hd_trainer.data import Batch, pictures
from hd_trainer.engine import draws
from hd_trainer.networks import inner_layers
from hd_trainer.report import figures
from hd_trainer.stages.discriminator import FACTS, load_discriminator

LEVEL = 0.3


@torch.no_grad()
def token_weights(
    context: Context, teacher: nn.Module, real: Batch, generated: Tensor, folder: Path
) -> list[dict[str, Any]]:
    """Per layer, where attention falls (mean over queries); empty where there is no discriminator or no square map.

    Args:
        real: a few held-out samples with their conditions.
        generated: samples for the same conditions.
        folder: of stage 2.
    """
    if not (folder / FACTS).exists():
        return []
    discriminator, layers = load_discriminator(folder)
    discriminator.to(context.device)
    tap = FeatureTap(teacher, inner_layers(teacher, layers))
    noise = draws.picture_noise(context.data.shape, 0, len(real), context.device)
    t = torch.full((len(real),), LEVEL, device=context.device)
    samples = {"real": real.x, "generated": generated}
    found = {
        kind: discriminator.token_weights(tap(interpolate(one, noise, t), t, **real.cond))
        for kind, one in samples.items()
    }
    shown = []
    for index, layer in enumerate(layers):
        entry: dict[str, Any] = {"layer": layer}
        for kind, one in samples.items():
            weights = found[kind][index].mean(dim=1).cpu()
            side = round(weights.shape[1] ** 0.5)
            if side * side != weights.shape[1]:
                break
            images = pictures(context.data, one)
            entry[kind] = figures.heatmaps(images, weights.reshape(len(weights), side, side))
            # 1 is uniform; the number of tokens is all weight on one.
            entry[f"{kind}_peak"] = float(weights.amax(dim=1).mean() * weights.shape[1])
        else:
            shown.append(entry)
    return shown
