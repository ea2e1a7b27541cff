"""Networks in use: made from nothing, guided, sampled; whether they fit the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hd_zoo
from hd_trainer.context import Context
from hd_trainer.data import Dataset
from hd_trainer.engine.draws import seeded
from hd_trainer.errors import UserError
from hd_trainer.networks.settings import GuidanceSettings, ModelSettings
from hd_zoo.blueprint import blueprint
from hd_zoo.weights.unwrap import unwrap


def fresh_network(model: ModelSettings, context: Context) -> nn.Module:
    """A network for the context's data with weights that are a function of the seed.

    Raises:
        UserError: for an unknown name or impossible sizes.
    """
    channels, height, width = context.data.shape
    if height != width:
        raise UserError(
            f"model: networks take square images; the data set {context.data.name!r} has {height} x {width}"
        )
    with seeded(context.seed):
        try:
            network = hd_zoo.create_model(
                model.name,
                image_size=width,
                channels=channels,
                classes=len(context.data.classes),
                **model.overrides(),
            )
        except ValueError as error:
            raise UserError(f"model: {error}") from error
    network = network.to(context.device)
    try_network(network, context.data, context.device, f"model {model.name}")
    return network


def cost_of(model: ModelSettings, shape: tuple[int, ...], classes: int) -> hd_zoo.Cost:
    """What a network for square samples of that shape costs; it is not made.

    Raises:
        UserError: for an unknown name or impossible sizes.
    """
    try:
        network = hd_zoo.create_model(
            model.name, image_size=shape[2], channels=shape[0], classes=classes, device="meta", **model.overrides()
        )
        return hd_zoo.model_cost(network)
    except ValueError as error:
        raise UserError(f"model: {error}") from error


@torch.no_grad()
def counted_multiply_adds(network: nn.Module, data: Dataset, device: torch.device) -> int:
    """Multiply-adds of one forward pass of one sample, of any network: matrix products and convolutions, as run."""
    batch = data.train.read(torch.zeros(1, dtype=torch.long)).to(device)
    with FlopCounterMode(display=False) as counter:
        network(batch.x, batch.x.new_full((1,), 0.5), **batch.cond)
    return int(counter.get_total_flops()) // 2


@torch.no_grad()
def try_network(network: nn.Module, data: Dataset, device: torch.device, name: str) -> None:
    """Call the network once: whether it takes the data's conditions is seen before anything is trained.

    Raises:
        UserError: if it does not.
    """
    batch = data.train.read(torch.zeros(1, dtype=torch.long)).to(device)
    try:
        network(batch.x, batch.x.new_full((1,), 0.5), **batch.cond)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        conditions = ", ".join(batch.cond) or "none"
        raise UserError(
            f"{name} cannot be called with the data's samples and conditions ({conditions}): {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_student(network: nn.Module) -> bool:
    """Whether the network uses r: it answers with the mean velocity over [r, t] and is sampled by jumps."""
    return bool(getattr(network, "takes_r", False))


def is_of_zoo(network: nn.Module) -> bool:
    """Whether it is a network of hd_zoo or diffusers, which hd_zoo.save_pretrained can write."""
    try:
        blueprint(unwrap(network)[1])
    except ValueError:
        return False
    return True


def inner_layers(network: nn.Module, names: Iterable[str]) -> list[str]:
    """Where the layers of a network are found in it, also behind a converter: one list of layers serves both."""
    return [hd_zoo.layer_name(network, name) for name in names]


def guided(field: nn.Module, guidance: GuidanceSettings, null: dict[str, Any]) -> nn.Module:
    """The teacher with guidance; the field itself where the scale is 1.

    Args:
        null: what stands for "no condition", by name. Of labels the field's own ``null_label`` is taken.

    Raises:
        UserError: if there is no condition to guide by, or the field knows no label for "no class".
    """
    if guidance.scale == 1:
        return field
    if not null:
        raise UserError(f"guidance scale {guidance.scale} needs a condition, such as classes; use 1")
    if "labels" in null:
        label = getattr(field, "null_label", null["labels"])
        if label is None:
            raise UserError(
                f'guidance scale {guidance.scale} needs a teacher with a label for "no class" (null_label); '
                "this one has none: use 1"
            )
        null = {**null, "labels": label}
    return hd_zoo.Guidance(field, guidance.scale, guidance.interval, null=null)


def sampler(
    network: nn.Module, steps: int, guidance: GuidanceSettings, null: dict[str, Any]
) -> tuple[Callable[[Tensor, dict[str, Tensor]], Tensor], int]:
    """(function of noise and conditions, network calls per sample): a student by jumps, a teacher by Euler's method."""
    if is_student(network):
        times = hd_zoo.uniform_times(steps)
        return lambda noise, cond: hd_zoo.sample_jumps(network, noise, times, **cond), steps
    field = guided(network, guidance, null)
    calls = steps if guidance.scale == 1 else 2 * steps
    return lambda noise, cond: hd_zoo.sample_ode(field, noise, steps, **cond), calls
