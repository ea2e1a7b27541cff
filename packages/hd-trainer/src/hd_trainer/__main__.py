"""``python -m hd_trainer`` is ``hdistill``."""

from hd_trainer.cli import entry

entry()
