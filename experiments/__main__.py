"""``python -m experiments NAME [options]``: run one experiment; without a name, list them."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.runner import run_by_name

if __name__ == "__main__":
    sys.exit(run_by_name(Path(__file__).parent, {"__init__", "__main__", "recipes", "stage_two"}, sys.argv[1:]))
