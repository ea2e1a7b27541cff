"""What it takes to build one of diffusers' networks again: its class and its configuration, as plain data."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch
from torch import nn

#: The classes that a ``config.json`` may name; nothing else is ever constructed from a file.
CLASSES = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "UNet2DConditionModel",
    "UNet2DModel",
)


class OfDiffusers(nn.Module):
    """A field around a model of diffusers, which :func:`hd_zoo.save_pretrained` keeps by class and configuration."""

    model: Any
    architecture = "diffusers"
    time_scale = 1000.0

    @property
    def takes_r(self) -> bool:
        """Whether r is used."""
        return False

    @property
    def arguments(self) -> dict[str, Any]:
        """JSON: the model's class and configuration, the number of timesteps, and whether it takes r."""
        config = {name: value for name, value in dict(self.model.config).items() if not name.startswith("_")}
        found: dict[str, Any] = {"model": type(self.model).__name__, "config": json.loads(json.dumps(config))}
        if self.time_scale != 1000:
            found["time_scale"] = self.time_scale
        return {**found, "takes_r": True} if self.takes_r else found


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

    from hd_zoo.adapters.diffusers_field import DiffusersField
    from hd_zoo.adapters.dit import DiTNoise
    from hd_zoo.adapters.sana import SanaField, to_sana_student

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
