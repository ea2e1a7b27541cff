"""Every field of every settings class is checked when it is made, by name."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest

from hd_dmd import DistributionMatchingLoss, KarrasLevels, LogitNormalLevels, UniformLevels

SETTINGS = [UniformLevels, LogitNormalLevels, KarrasLevels, DistributionMatchingLoss]
FIELDS = [(owner, field.name) for owner in SETTINGS for field in dataclasses.fields(owner)]
NEVER = [float("nan"), float("inf"), -float("inf"), 10**400, "1", True, None, object()]


@pytest.mark.parametrize(("owner", "name"), [pair for pair in FIELDS if pair[1] != "num_steps"])
@pytest.mark.parametrize("value", NEVER, ids=[str(value)[:8] for value in NEVER])
def test_what_no_field_accepts_is_refused_by_name(owner: Any, name: str, value: object) -> None:
    """Not finite, beyond a float, of another type: no field of ours takes any of these."""
    with pytest.raises(ValueError, match=rf"^{name} must .*; got |^low and high must .*; got .*{name} = "):
        owner(**{name: value})


@pytest.mark.parametrize("value", [1, 0, -5, 2.0, "1000", True, None])
def test_num_steps_is_an_integer_of_at_least_two(value: Any) -> None:
    with pytest.raises(ValueError, match="num_steps must be an integer >= 2; got "):
        KarrasLevels(num_steps=value)


@pytest.mark.parametrize("owner", [UniformLevels, LogitNormalLevels])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0.5, "high": 0.5}, "low and high must satisfy 0 <= low < high <= 1; got low = 0.5, high = 0.5"),
        ({"low": -0.1}, "got low = -0.1, high = 0.98"),
        ({"high": 1.1}, "got low = 0.02, high = 1.1"),
        ({"shift": 0.0}, "shift must be > 0 and finite; got 0.0"),
    ],
)
def test_ranges_on_t(owner: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        owner(**settings)


@pytest.mark.parametrize(
    ("owner", "settings", "message"),
    [
        (LogitNormalLevels, {"std": 0.0}, "std must be > 0 and finite; got 0.0"),
        (KarrasLevels, {"min_step_share": -0.1}, r"min_step_share must lie in \[0, 1\]; got -0.1"),
        (KarrasLevels, {"min_step_share": 0.98}, "min_step_share must be < max_step_share = 0.98; got 0.98"),
        (KarrasLevels, {"sigma_min": 80.0}, "sigma_min must be < sigma_max = 80.0; got 80.0"),
        (KarrasLevels, {"rho": 0}, "rho must be > 0 and finite; got 0"),
        (DistributionMatchingLoss, {"floor": 0.0}, "floor must be > 0 and finite; got 0.0"),
        (DistributionMatchingLoss, {"noise_levels": UniformLevels}, r"noise_levels must have a method sample\(batch"),
    ],
)
def test_values_out_of_range_are_refused(owner: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        owner(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("owner", SETTINGS)
def test_settings_are_frozen_keyword_only_and_of_plain_types(owner: Any) -> None:
    """What a command line and a JSON file can hold."""
    name = dataclasses.fields(owner)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(owner(), name, 0.5)
    with pytest.raises(TypeError):
        owner(0.5)
    assert owner() == owner()
    assert str not in typing.get_type_hints(owner).values()
