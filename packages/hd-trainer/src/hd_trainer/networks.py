"""The one place that knows what a network is: teachers and students are made, loaded, guided, sampled, saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hd_zoo
from hd_trainer.checks import check_number, check_range, check_whole
from hd_trainer.context import Context
from hd_trainer.data import Dataset
from hd_trainer.engine.draws import seeded
from hd_trainer.errors import UserError
from hd_trainer.files import digest, write_files

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network of teacher and student."""

    name: str = "dit_nano_2"
    """a name of hd_zoo.list_models()"""
    width: int | None = None
    """None: the model's own"""
    depth: int | None = None
    """None: the model's own"""
    time_scale: float = 1.0
    """factor on t before its sinusoids; it multiplies du/dt"""

    def __post_init__(self) -> None:
        sizes = {name: value for name in ("width", "depth") if (value := getattr(self, name)) is not None}
        check_whole(high=65536, **sizes)
        check_number(above=True, high=1e6, time_scale=self.time_scale)

    def overrides(self) -> dict[str, Any]:
        """The arguments for hd_zoo.create_model beside the data's own."""
        chosen: dict[str, Any] = {"time_scale": self.time_scale}
        return chosen | {name: value for name in ("width", "depth") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """Classifier-free guidance of a teacher (arXiv 2207.12598)."""

    scale: float = 1.0
    """guidance scale; 1 is none"""
    interval: tuple[float, float] = (0.0, 1.0)
    """guidance interval: the times at which it is on (arXiv 2404.07724)"""

    def __post_init__(self) -> None:
        check_number(high=1e4, scale=self.scale)
        check_range("interval", self.interval)


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
    _try(network, context.data, context.device, f"model {model.name}")
    return network


def read_network(folder: Path, device: torch.device) -> nn.Module:
    """A frozen network of hd_zoo from its folder.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        network: nn.Module = hd_zoo.from_pretrained(folder, device=device)
    except FileNotFoundError as error:
        raise UserError(f"{error}; train that stage first, or name another folder") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{error}; train that stage again, or name another folder") from error
    return network.requires_grad_(False)


def load_network(folder: Path, data: Dataset, device: torch.device) -> nn.Module:
    """As :func:`read_network`, checked against the data.

    Raises:
        UserError: also if it was made for other samples.
    """
    network: Any = read_network(folder, device)
    if tuple(network.sample_shape) != data.shape or network.classes != len(data.classes):
        raise UserError(
            f"the network in {folder} is for samples {tuple(network.sample_shape)} of {network.classes} classes, "
            f"the data set {data.name!r} has {data.shape} and {len(data.classes)}"
        )
    _try(network, data, device, f"the network in {folder}")
    return network


@torch.no_grad()
def _try(network: nn.Module, data: Dataset, device: torch.device, name: str) -> None:
    """Call the network once: whether it takes the data's conditions is seen before anything is trained.

    Raises:
        UserError: if it does not.
    """
    batch = data.train.read(torch.zeros(1, dtype=torch.long)).to(device)
    try:
        network(batch.x, batch.x.new_full((1,), 0.5), **batch.cond)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        conditions = ", ".join(batch.cond) or "none"
        raise UserError(
            f"{name} cannot be called with the data's samples and conditions ({conditions}): {reason}"
        ) from error


def make_student(network: nn.Module, seed: int) -> nn.Module:
    """A trainable student that starts as ``network``'s copy; the new embedding's first layer is a function of the seed.

    The global generator is left alone: a run that is stopped before its first checkpoint starts again as it did.
    """
    with seeded(seed):
        return hd_zoo.to_student(network).requires_grad_(True).train()


def is_student(network: nn.Module) -> bool:
    """Whether the network uses r: it answers with the mean velocity over [r, t] and is sampled by jumps."""
    return bool(getattr(network, "takes_r", False))


def inner_layers(network: nn.Module, names: Iterable[str]) -> list[str]:
    """Where the layers of a network are found in it, also behind a converter: one list of layers serves both."""
    return [hd_zoo.layer_name(network, name) for name in names]


def guided(field: nn.Module, guidance: GuidanceSettings, null: dict[str, Any]) -> nn.Module:
    """The teacher with guidance; the field itself where the scale is 1.

    Args:
        null: what stands for "no condition", by name.

    Raises:
        UserError: if there is no condition to guide by.
    """
    if guidance.scale == 1:
        return field
    if not null:
        raise UserError(f"guidance scale {guidance.scale} needs a condition, such as classes; use 1")
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


def save_network(average: nn.Module, folder: Path, **metadata: Any) -> None:
    """Write an average's weights as a network of hd_zoo: ``model.safetensors`` and ``config.json``."""
    write_files(folder, lambda temporary: hd_zoo.save_pretrained(average, temporary, metadata=metadata), last=CONFIG)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights in a folder.

    Raises:
        UserError: if they are not there.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"no {WEIGHTS} in {folder}")
    return digest(folder / WEIGHTS)


def load_vision_model(place: str, device: torch.device) -> nn.Module:
    """A frozen model of the library transformers, from a folder or by its name on the hub: for extractors.

    Raises:
        UserError: if the library is missing, or there is no such model in safetensors.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{place}: transformers is not installed: pip install transformers") from error
    try:
        network: nn.Module = transformers.AutoModel.from_pretrained(place, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"{place} cannot be read as a model of transformers ({str(error)[:200]})") from error
    return network.to(device).eval().requires_grad_(False)
