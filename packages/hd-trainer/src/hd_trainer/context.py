"""From settings to what a run needs: data, device, a fresh network."""

from __future__ import annotations

from torch import nn

import hd_zoo
from hd_trainer.data import load_data
from hd_trainer.device import choose_device
from hd_trainer.errors import UserError
from hd_trainer.settings import Settings
from hd_trainer.stages.common import Context, seeded


def make_context(settings: Settings) -> Context:
    """Data, device and seed of a run."""
    return Context(
        data=load_data(settings.data),
        device=choose_device(settings.device),
        precision=settings.precision,
        seed=settings.seed,
    )


def fresh_network(settings: Settings, context: Context) -> nn.Module:
    """The teacher's network with weights that are a function of the seed; the global generator is left alone."""
    channels, _, size = context.data.shape
    with seeded(settings.seed):
        try:
            network = hd_zoo.create_model(
                settings.model.name,
                image_size=size,
                channels=channels,
                classes=len(context.data.classes),
                **settings.model.overrides(),
            )
        except ValueError as error:
            raise UserError(f"model: {error}") from error
    return network.to(context.device)
