"""The two-stage trainer: data, recipes, stages, evaluation, report and the ``hdistill`` command (arXiv 2511.08930)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hd_trainer.errors import UserError
from hd_trainer.version import __version__

if TYPE_CHECKING:
    from hd_trainer.pipeline import run
    from hd_trainer.recipes import list_recipes, load_recipe
    from hd_trainer.settings import Settings

__all__ = ["Settings", "UserError", "__version__", "list_recipes", "load_recipe", "run"]

#: Imported when first asked for: the command's help must not wait for PyTorch.
_LAZY = {
    "Settings": "hd_trainer.settings",
    "list_recipes": "hd_trainer.recipes",
    "load_recipe": "hd_trainer.recipes",
    "run": "hd_trainer.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
