"""``python -m benchmarks NAME [options]``: run one benchmark; without a name, list them."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.runner import run_by_name

HELPERS = {"__init__", "__main__", "pooling_heads", "pooling_plot", "runner"}

if __name__ == "__main__":
    sys.exit(run_by_name(Path(__file__).parent, HELPERS, sys.argv[1:]))
