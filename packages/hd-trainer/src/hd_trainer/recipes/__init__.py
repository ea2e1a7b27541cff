"""Recipes: functions that return settings. ``load_recipe(name)`` finds one.

The table below is text: listing the recipes imports none of them, and no PyTorch.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
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
    ),
    "fashion": Entry(
        module="hd_trainer.recipes.fashion",
        full="fashion",
        smoke="fashion_smoke",
        description="Fashion-MNIST, 28x28 grey photographs, 10 classes: Debian's package, 20 minutes on two cores.",
    ),
}


def list_recipes() -> dict[str, str]:
    """Name -> description in one line."""
    return {name: entry.description for name, entry in RECIPES.items()}


def load_recipe(name: str, *, smoke: bool = False) -> Settings:
    """Settings by name, from a run's ``recipe.json``, or what ``path/to/recipe.py:function`` returns.

    Args:
        name: of a file whose function is not named, ``recipe`` is called.
        smoke: the short form; of a Python file that is its function ``smoke``, and a ``recipe.json`` has none.

    Raises:
        UserError: for an unknown name, with the nearest known one, or what a user's function did wrong.
    """
    from hd_trainer.files import read_json
    from hd_trainer.settings import Settings, settings_from_json, to_json

    if name.endswith(".json"):
        if smoke:
            raise UserError(f"{name} has no short form; leave --smoke out")
        return settings_from_json(read_json(Path(name)), name)
    if is_function(name):
        path, _, _ = name.partition(":")
        wanted = f"{path}:smoke" if smoke else name
        found: Settings = call(load_function(wanted, default="recipe"), wanted, Settings)
        settings_from_json(to_json(found), wanted)  # what a dataclass takes without a word, such as data=None
        return found
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        if (Path(name) / "recipe.json").is_file():
            hint = f" (did you mean {Path(name) / 'recipe.json'}?)"
        raise UserError(
            f"unknown recipe {name!r}{hint}; known: {', '.join(RECIPES)}, or a file (recipe.py:function, recipe.json)"
        )
    entry = RECIPES[name]
    settings: Settings = getattr(importlib.import_module(entry.module), entry.smoke if smoke else entry.full)()
    return settings
