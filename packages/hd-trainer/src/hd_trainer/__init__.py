"""The two-stage trainer: data, recipes, stages, metrics, report and the ``hdistill`` command (arXiv 2511.08930)."""

from hd_trainer.errors import UserError
from hd_trainer.recipes import list_recipes, load_recipe
from hd_trainer.run import run
from hd_trainer.settings import Settings

__version__ = "0.1.0"

__all__ = ["Settings", "UserError", "list_recipes", "load_recipe", "run"]
