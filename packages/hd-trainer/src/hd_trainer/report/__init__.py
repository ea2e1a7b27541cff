"""One self-contained HTML page about a run."""

from hd_trainer.report.page import write_report

__all__ = ["write_report"]
