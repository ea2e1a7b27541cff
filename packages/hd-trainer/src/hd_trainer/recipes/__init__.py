"""Recipes: functions that return settings. ``load_recipe(name)`` finds one.

The table below is text: listing the recipes imports none of them, and no PyTorch.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hd_trainer.errors import UserError
from hd_trainer.user_code import call, is_function, load_function

if TYPE_CHECKING:
    from hd_trainer.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a recipe is found."""

    module: str
    full: str
    """function that returns the recipe's settings"""
    smoke: str
    """function that returns its short form: the same path through the code in seconds"""
    description: str


RECIPES: dict[str, Entry] = {
    "digits": Entry(
        module="hd_trainer.recipes.digits",
        full="digits",
        smoke="digits_smoke",
        description="scikit-learn's digits, 8x8 pixels, 10 classes: no download, minutes on two CPU cores.",
    )
}


def list_recipes() -> dict[str, str]:
    """Name -> description in one line."""
    return {name: entry.description for name, entry in RECIPES.items()}


def load_recipe(name: str, *, smoke: bool = False) -> Settings:
    """Settings by name, or what ``path/to/recipe.py:function`` returns (the function is ``recipe`` if not named).

    Args:
        smoke: the short form; of a file that is the function ``smoke``.

    Raises:
        UserError: for an unknown name, with the nearest known one, or what a user's function did wrong.
    """
    from hd_trainer.settings import Settings

    if is_function(name):
        path, _, _ = name.partition(":")
        wanted = f"{path}:smoke" if smoke else name
        found: Settings = call(load_function(wanted, default="recipe"), wanted, Settings)
        return found
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"unknown recipe {name!r}{hint}; known: {', '.join(RECIPES)}, or path/to/recipe.py:function")
    entry = RECIPES[name]
    settings: Settings = getattr(importlib.import_module(entry.module), entry.smoke if smoke else entry.full)()
    return settings
