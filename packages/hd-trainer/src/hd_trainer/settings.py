"""What a run is made of: one frozen record, written beside its results and turned into command-line flags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from hd_trainer.device import Precision
from hd_trainer.errors import UserError, check_choice, check_seed
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.loop import LoopSettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings

T = TypeVar("T")


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

    def overrides(self) -> dict[str, Any]:
        """The arguments for hd_zoo.create_model beside the data's own."""
        chosen: dict[str, Any] = {"time_scale": self.time_scale}
        return chosen | {name: value for name in ("width", "depth") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole run: data, networks, three stages, evaluation."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """the recipe these settings came from"""
    data: Annotated[str, tyro.conf.Suppress]
    """data set, a name of hd_trainer.data"""
    seed: int = 0
    """decides every random number of the run"""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1" ..."""
    precision: Precision = "auto"
    """bf16 autocast, fp32, or auto: bf16 where the hardware has it"""
    model: ModelSettings = field(default_factory=ModelSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    teacher: TeacherSettings
    trajectory: TrajectorySettings
    distribution: DistributionSettings
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_choice("precision", self.precision, Precision)


def to_json(settings: Settings) -> dict[str, Any]:
    """Settings as plain JSON values (tuples become lists), for ``recipe.json``."""
    return _plain(dataclasses.asdict(settings))


def from_json(kind: type[T], values: Any, where: str) -> T:
    """Settings of class ``kind`` from what :func:`to_json` gave; nested settings and tuples are restored.

    Raises:
        UserError: naming ``where`` and the setting, for one that is unknown, missing or impossible.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: {kind.__name__} must be an object; got {values!r}")
    hints = get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise UserError(f"{where}: unknown setting(s) {', '.join(unknown)}; it was made by another version")
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_json(hints[name], value, f"{where}: {name}")
        elif isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    try:
        return kind(**arguments)
    except (TypeError, UserError) as error:
        raise UserError(f"{where}: {error}") from error


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """Names, values here and values there of all settings that differ: ``["teacher.steps: 100 here, 200 there"]``."""
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{prefix}{name}.")
        elif one != other:
            found.append(f"{prefix}{name}: {one} here, {other} there")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
