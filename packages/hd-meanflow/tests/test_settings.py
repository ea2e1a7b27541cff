"""Every field of every settings class is checked when it is made, by name."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest

from hd_meanflow import LogitNormalTimes, MeanFlowGuidance, MeanFlowLoss, UniformTimes

SETTINGS = [LogitNormalTimes, UniformTimes, MeanFlowGuidance, MeanFlowLoss]
FLAGS = ("larger_at_r_equal_t",)
FIELDS = [(owner, field.name) for owner in SETTINGS for field in dataclasses.fields(owner)]
NEVER = [float("nan"), float("inf"), -float("inf"), 10**400, "1", True, object()]


@pytest.mark.parametrize(("owner", "name"), FIELDS)
@pytest.mark.parametrize("value", NEVER, ids=[str(value)[:8] for value in NEVER])
def test_what_no_field_accepts_is_refused_by_name(owner: Any, name: str, value: object) -> None:
    """Not finite, beyond a float, of another type: no field of ours takes any of these, and a flag no number either."""
    if name in FLAGS and value is True:
        value = 1
    with pytest.raises(ValueError, match=rf"^{name} must .*; got "):
        owner(**{name: value})


@pytest.mark.parametrize(("owner", "name"), [pair for pair in FIELDS if pair[1] != "guidance"])
def test_none_is_refused_too(owner: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .*; got None"):
        owner(**{name: None})


@pytest.mark.parametrize(
    ("owner", "settings", "message"),
    [
        (LogitNormalTimes, {"std": 0.0}, "std must be > 0 and finite; got 0.0"),
        (LogitNormalTimes, {"interval_share": -0.1}, r"interval_share must lie in \[0, 1\]; got -0.1"),
        (UniformTimes, {"endpoint_share": 1.1}, r"endpoint_share must lie in \[0, 1\]; got 1.1"),
        (MeanFlowGuidance, {"omega": 0.0}, "omega must be > 0 and finite; got 0.0"),
        (MeanFlowGuidance, {"kappa": 1.0}, r"kappa must lie in \[0, 1\); got 1.0"),
        (MeanFlowGuidance, {"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
        (MeanFlowGuidance, {"guidance_interval": (0.5, 0.2)}, r"guidance_interval must be \(low, high\).*\(0.5, 0.2\)"),
        (MeanFlowGuidance, {"guidance_interval": (0.0, 0.5, 1.0)}, "guidance_interval must be"),
        (MeanFlowGuidance, {"guidance_interval": (0.0, float("nan"))}, "guidance_interval must be"),
        (MeanFlowLoss, {"derivative": "exact"}, "derivative must be one of jvp, difference; got 'exact'"),
        (MeanFlowLoss, {"derivative": []}, "derivative must be one of"),
        (MeanFlowLoss, {"p": -1.0}, "p must be >= 0 and finite; got -1.0"),
        (MeanFlowLoss, {"c": 0.0}, "c must be > 0 and finite; got 0.0"),
        (MeanFlowLoss, {"step": 0.0}, r"step must lie in \(0, 0.25\]; got 0.0"),
        (MeanFlowLoss, {"step": 0.5}, "step must lie in"),
        (MeanFlowLoss, {"times": LogitNormalTimes}, r"times must have a method sample\(batch, generator, device\)"),
        (MeanFlowLoss, {"guidance": {"omega": 1.0}}, "guidance must be a MeanFlowGuidance or None"),
    ],
)
def test_values_out_of_range_are_refused(owner: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        owner(**settings)
    assert "\n" not in str(caught.value)


def test_the_ends_of_the_ranges_are_accepted() -> None:
    LogitNormalTimes(mean=-3, std=1e-3, interval_share=1, endpoint_share=0)
    MeanFlowGuidance(omega=0.2, kappa=0, dropout=0, guidance_interval=(0.5, 0.5))
    MeanFlowLoss(p=0, step=0.25)


@pytest.mark.parametrize("owner", SETTINGS)
def test_settings_are_frozen_keyword_only_and_of_plain_types(owner: Any) -> None:
    """What a command line and a JSON file can hold; a type is written out, never `str` for a choice."""
    name = dataclasses.fields(owner)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(owner(), name, 0.5)
    with pytest.raises(TypeError):
        owner(0.5)
    assert owner() == owner()
    assert str not in typing.get_type_hints(owner).values()
