"""One of diffusers' networks from its class and its configuration, as :class:`OfDiffusers` keeps them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from hd_zoo.adapters.diffusers_field import DiffusersField
from hd_zoo.adapters.dit import DiTNoise
from hd_zoo.adapters.sana import SanaField, to_sana_student

#: The classes that a ``config.json`` may name; nothing else is ever constructed from a file.
CLASSES = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "UNet2DConditionModel",
    "UNet2DModel",
)


def rebuild(arguments: dict[str, Any], device: str | torch.device | None) -> nn.Module:
    """The field whose ``arguments`` these are, with weights that mean nothing. Draws no random numbers.

    Raises:
        ModuleNotFoundError: without diffusers.
        ValueError: for another class, or a configuration that the class refuses.
    """
    known = {"model", "config", "time_scale", "takes_r"}
    name, config, time_scale = arguments.get("model"), arguments.get("config"), arguments.get("time_scale", 1000.0)
    if name not in CLASSES or not isinstance(config, dict) or not arguments.keys() <= known:
        raise ValueError(f"a model of diffusers must be one of {', '.join(CLASSES)} with its config; got {name!r}")
    if isinstance(time_scale, bool) or not isinstance(time_scale, (int, float)) or not 0 < time_scale < 1e9:
        raise ValueError(f"time_scale must be a number > 0; got {str(time_scale)[:40]!r}")
    if any(field.startswith("_") for field in config):
        raise ValueError("the config of a model of diffusers holds private entries")
    import diffusers

    with torch.random.fork_rng(devices=[]), torch.device(device) if device else contextlib.nullcontext():
        try:
            model = getattr(diffusers, name).from_config(config)
        except Exception as error:  # its constructors check nothing: whatever they run into
            raise ValueError(f"cannot build a {name}: {str(error).strip()[:200]}") from error
        if name == "DiTTransformer2DModel":
            return DiTNoise(model)
        if name == "SanaTransformer2DModel":
            return to_sana_student(SanaField(model)) if arguments.get("takes_r") is True else SanaField(model)
        return DiffusersField(model, float(time_scale))
