"""What a run is made of: one frozen record, written beside its results and turned into command-line flags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from hd_trainer.checks import check_choice, check_seed, short
from hd_trainer.earlier import FORMAT, upgrade_settings
from hd_trainer.engine.loop import LoopSettings
from hd_trainer.engine.precision import Precision
from hd_trainer.errors import UserError
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.networks import ModelSettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings
from hd_trainer.writers import check_names

T = TypeVar("T")

#: In JSON, beside the settings of one of several classes: the name of the class.
KIND = "kind"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole run: data, networks, three stages, evaluation."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """the recipe these settings came from"""
    data: str
    """data: digits, fashion, emoji, folder:PATH, npz:FILE, hub:ID or file.py:function; see `hdistill list data`"""
    seed: int = 0
    """decides every random number of the run"""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1" ..."""
    precision: Precision = "auto"
    """bf16 autocast, fp32, or auto: bf16 where the hardware has it"""
    teacher_source: Annotated[str | None, tyro.conf.arg(name="teacher", metavar="SOURCE")] = None
    """a teacher that is trained already: FOLDER, sit_xl_2:FILE, a folder or hub id of diffusers, or file.py:function
    (see docs/teachers.md); stage "teacher" is then left out, and the model's settings are not used"""
    writers: tuple[str, ...] = ()
    """where curves and pictures go beside metrics.jsonl: tensorboard, wandb, trackio; each an extra to install"""
    model: ModelSettings = field(default_factory=ModelSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    teacher: TeacherSettings
    trajectory: TrajectorySettings
    distribution: DistributionSettings
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_choice("precision", self.precision, Precision)
        if self.teacher_source == "":
            raise UserError("teacher_source must name a teacher, or be left out; got an empty text")
        check_names(self.writers)


def to_json(settings: Settings) -> dict[str, Any]:
    """Settings as plain JSON values (tuples become lists), for ``recipe.json``."""
    return {"format": FORMAT, **_plain(settings)}


def settings_from_json(values: Any, where: str) -> Settings:
    """Settings from what :func:`to_json` gave, or an earlier version.

    Raises:
        UserError: naming ``where`` and the setting, for one that is unknown, missing or impossible.
    """
    if isinstance(values, dict):
        if values.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{where}: format must be {FORMAT}; got {short(values['format'])}: use the version that made it"
            )
        values = upgrade_settings(values)
    return from_json(Settings, values, where)


def from_json(kind: type[T], values: Any, where: str) -> T:
    """Settings of class ``kind`` from plain JSON values; nested settings and tuples are restored.

    Raises:
        UserError: as :func:`settings_from_json`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: {kind.__name__} must be an object; got {str(values)[:60]}")
    hints = _hints(kind)
    values = {name: value for name, value in values.items() if name != KIND}
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise UserError(f"{where}: unknown setting(s) {', '.join(unknown)[:200]}; it was made by another version")
    arguments = {}
    for name, value in values.items():
        records = _records(hints[name])
        if records and not (value is None and type(None) in get_args(hints[name])):
            value = from_json(_chosen(records, value, f"{where}: {name}"), value, f"{where}: {name}")
        elif not records:
            value = tuple(value) if isinstance(value, list) else value
            if not _fits(value, hints[name]):
                kind_of_it = getattr(hints[name], "__name__", "") if not get_args(hints[name]) else str(hints[name])
                raise UserError(f"{where}: {name} must be {kind_of_it}; got {short(value)}")
        arguments[name] = value
    try:
        return kind(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: {str(error)[:300]}") from error


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


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Type of each setting. What a held loss leaves open (its times, which its owner fills in) is no setting."""
    hints = get_type_hints(kind)
    names = [one.name for one in dataclasses.fields(kind)]
    return {name: hints[name] for name in names if not getattr(hints[name], "_is_protocol", False)}


def _records(hint: Any) -> list[type[Any]]:
    """The settings classes that a type allows: none, one, or a choice of several."""
    return [one for one in (hint, *get_args(hint)) if isinstance(one, type) and dataclasses.is_dataclass(one)]


def _chosen(records: list[type[Any]], value: Any, where: str) -> type[Any]:
    """Of a choice of several the one that the value names; the first where it names none."""
    name = value.get(KIND, records[0].__name__) if isinstance(value, dict) else records[0].__name__
    for record in records:
        if record.__name__ == name:
            return record
    raise UserError(
        f"{where}: {KIND} must be one of {', '.join(one.__name__ for one in records)}; got {str(name)[:60]}"
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether the value is of the annotated kind; choices are left to their owner's check, which names them."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return True
    if get_origin(hint) is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if inner:
        return any(_fits(value, one) for one in inner)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        plain = {name: _plain(getattr(value, name)) for name in hints}
        for name, hint in hints.items():
            if len(_records(hint)) > 1 and isinstance(plain[name], dict):
                plain[name] = {KIND: type(getattr(value, name)).__name__, **plain[name]}
        return plain
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
