"""Recipes: functions that return settings. ``load_recipe(name)`` finds one."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from hd_trainer.errors import UserError
from hd_trainer.recipes.digits import digits, digits_smoke
from hd_trainer.settings import Settings

#: name -> (the recipe, its form for tests: the same path through the code in seconds)
RECIPES: dict[str, tuple[Callable[[], Settings], Callable[[], Settings]]] = {"digits": (digits, digits_smoke)}


def list_recipes() -> dict[str, str]:
    """Name -> first line of its description."""
    return {name: (full.__doc__ or "").strip().splitlines()[0] for name, (full, _) in RECIPES.items()}


def load_recipe(name: str, *, smoke: bool = False) -> Settings:
    """Settings by name; ``smoke`` gives the short form.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"unknown recipe {name!r}{hint}; known: {', '.join(RECIPES)}")
    return RECIPES[name][smoke]()
