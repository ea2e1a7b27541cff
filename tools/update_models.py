"""Write docs/models.md's tables from hd_zoo.sources and from the networks, or check that they still agree.

python tools/update_models.py
python tools/update_models.py --check     # exit 1 if the page is not what the data say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import hd_zoo
from hd_zoo.sources import full_table, short_table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- models: written by tools/update_models.py -->", "<!-- end of models -->"
PAGES: dict[Path, Callable[[], list[str]]] = {
    ROOT / "docs/models.md": lambda: [
        *short_table(),
        "",
        "## Sizes",
        "",
        *sizes_table(),
        "",
        "## Sources",
        "",
        *full_table(),
    ],
}


def main(arguments: list[str] | None = None) -> int:
    """0 done or the same, 1 a page differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a difference")
    options = parser.parse_args(arguments)
    different = 0
    for page, table in PAGES.items():
        text = page.read_text(encoding="utf-8")
        wanted = rewritten(text, table())
        if wanted == text:
            continue
        if options.check:
            print(
                f"{page.relative_to(ROOT)} is not what hd_zoo.sources says; run tools/update_models.py", file=sys.stderr
            )
            different = 1
        else:
            page.write_text(wanted, encoding="utf-8")
    return different


def sizes_table() -> list[str]:
    """Parameters and cost of every network, counted without making it."""
    lines = ["| name | parameters | G multiply-adds a picture | r |", "|---|---:|---:|---|"]
    for name in hd_zoo.list_models():
        network = hd_zoo.create_model(name, device="meta")
        parameters = sum(one.numel() for one in network.parameters())
        transformer = isinstance(network, hd_zoo.DiffusionTransformer)
        cost = f"{hd_zoo.model_cost(network).multiply_adds / 1e9:.3g}" if transformer else ""
        lines.append(f"| `{name}` | {parameters / 1e6:.3g} M | {cost} | {network.r_embedding or ''} |")
    return lines


def rewritten(text: str, lines: list[str]) -> str:
    """The page with the lines between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"a page lacks {BEGIN} or {END}")
    return "\n".join([before + begin, "", *lines, "", end + after])


if __name__ == "__main__":
    sys.exit(main())
