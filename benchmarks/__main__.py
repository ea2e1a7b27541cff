"""``python -m benchmarks NAME [options]``: run one benchmark; without a name, list them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HELPERS = {"__init__", "__main__", "pooling_heads", "pooling_plot", "runner"}


def main(arguments: list[str]) -> int:
    """0 done, 2 unknown name."""
    names = sorted(
        path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py") if path.stem not in HELPERS
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [--help]\n")
        for name in names:
            module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
            print(f"  {name:16s} {(module.__doc__ or '').strip().splitlines()[0]}")
        return 0
    if arguments[0] not in names:
        print(f"benchmarks: unknown name {arguments[0]!r}; known: {', '.join(names)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.{arguments[0].replace('-', '_')}")
    module.main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
