"""Settings of the networks: the one that is trained from nothing, and the guidance of a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hd_trainer.checks import check_number, check_range, check_whole


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network of teacher and student. Not used where a teacher is given."""

    name: str = "dit_nano_2"
    """a name of hd_zoo.list_models()"""
    width: int | None = None
    """None: the model's own"""
    depth: int | None = None
    """None: the model's own"""
    time_scale: float = 1.0
    """factor on t before its sinusoids; it multiplies du/dt"""

    def __post_init__(self) -> None:
        for name, high in (("width", 65536), ("depth", 1024)):
            if (value := getattr(self, name)) is not None:
                check_whole(high=high, **{name: value})
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
