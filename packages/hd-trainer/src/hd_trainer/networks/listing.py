"""What ``hdistill list models`` and ``hdistill list layers`` print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import hd_zoo
from hd_awd import default_layers
from hd_trainer.data import load_data
from hd_trainer.engine.draws import picture_noise
from hd_trainer.errors import UserError
from hd_trainer.networks.fields import first_line
from hd_trainer.networks.sources import load_teacher, read_network
from hd_zoo.registry import create_model
from hd_zoo.sources import SOURCES

#: Features can be a vector, tokens, a map or one of video, with the batch first.
NUMBERS_OF_DIMENSIONS = (2, 3, 4, 5)
#: Modules whose name has more parts than this are shown with ``--every`` alone.
OUTER = 2


def model_lines() -> list[str]:
    """A line for each network of hd_zoo.list_models: parameters, samples, classes, official weights."""
    files: dict[str, list[str]] = {}
    for source in SOURCES.values():
        if source.name is not None:
            options = "&".join(f"{name}={value}" for name, value in source.settings.items())
            files.setdefault(source.name, []).append(source.title + (f" (?{options})" if options else ""))
    lines = []
    for name in hd_zoo.list_models():
        network: Any = create_model(name, device="meta")
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        shape = "x".join(map(str, network.sample_shape))
        facts = [f"samples {shape}", *[f"{network.classes:,} classes"] * bool(network.classes)]
        facts += ["a student"] * bool(network.takes_r)
        facts += [f"official weights: {', '.join(files[name])}"] if name in files else []
        lines.append(f"  {name:18s} {millions:7.2f} M  {'; '.join(facts)}")
    return lines


def layer_lines(source: str, data: str | None = None, *, every: bool = False) -> list[str]:
    """A line for each module that the discriminator can look at: its name, class and output; a star for the defaults.

    Args:
        source: as after ``--teacher``.
        data: as after ``--data``; None: the teacher is called with noise, and class 0 where it has classes.
        every: also modules deep inside.

    Raises:
        UserError: for a teacher that cannot be read or called.
    """
    device = torch.device("cpu")
    if data is None:
        network: Any = read_network(source, device)
        cond = {"labels": torch.zeros(2, dtype=torch.long)} if getattr(network, "classes", 0) else {}
        try:
            hd_zoo.check_teacher(network, cond)
        except ValueError as error:
            raise UserError(f"teacher {source}: {error}; with --data it is given the data's conditions") from error
    else:
        dataset = load_data(data)
        network = load_teacher(source, dataset, device)
        cond = dataset.train.read(torch.arange(2)).cond
    noise = picture_noise(network.sample_shape, 0, 2)
    shapes = _shapes(network, lambda: network(noise, noise.new_full((2,), 0.5), **cond))
    try:
        defaults = default_layers(network)
        last = "* the default, evenly spaced blocks; choose others with --distribution.discriminator.layers NAME NAME"
    except ValueError as error:
        defaults, last = [], f"no default ({first_line(error)}): --distribution.discriminator.layers NAME NAME"
    inside = hd_zoo.network_inside(network)
    prefix = next((f"{name}." for name, module in network.named_modules() if module is inside and name), "")
    lines = []
    for name, module in network.named_modules():
        shown = name.removeprefix(prefix)
        if name in shapes and (every or name in defaults or shown.count(".") < OUTER):
            shape = "x".join(map(str, shapes[name]))
            lines.append(f"{'*' if name in defaults else ' '} {shown:32s} {type(module).__name__:28s} {shape}")
    return [*lines, last]


@torch.no_grad()
def _shapes(network: nn.Module, run: Callable[[], Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape, without the batch, of what each module inside puts out, where it ran once and put out features."""
    found: dict[str, list[tuple[int, ...] | None]] = {}

    def note(name: str, output: Any) -> None:
        feature = output[0] if isinstance(output, (tuple, list)) and output else output
        fits = isinstance(feature, Tensor) and feature.ndim in NUMBERS_OF_DIMENSIONS and len(feature) == 2
        found.setdefault(name, []).append(tuple(feature.shape[1:]) if fits else None)

    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: note(name, output))
        for name, module in _inside(network)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: shapes[0] for name, shapes in found.items() if len(shapes) == 1 and shapes[0] is not None}


def _inside(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside the converters and the network, by name."""
    inside = hd_zoo.network_inside(network)
    for name, module in inside.named_modules():
        if name:
            yield hd_zoo.layer_name(network, name), module
