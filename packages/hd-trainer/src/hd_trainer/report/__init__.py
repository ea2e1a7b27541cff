"""One self-contained HTML page about a run, or about several side by side."""

from hd_trainer.report.compare import Run, run_names, write_comparison
from hd_trainer.report.page import write_report

__all__ = ["Run", "run_names", "write_comparison", "write_report"]
