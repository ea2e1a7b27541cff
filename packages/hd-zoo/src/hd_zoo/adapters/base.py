"""What the fields around diffusers' networks share: what it takes to build one again, as plain data."""

from __future__ import annotations

import json
from typing import Any

from torch import nn


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
