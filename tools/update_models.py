"""Write the tables of published weights from hd_zoo.sources, or check that they still agree.

python tools/update_models.py             # docs/models.md, and packages/hd-zoo/README.md where it has the table's marks
python tools/update_models.py --check     # exit 1 if a page is not what the data say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from hd_zoo.sources import full_table, short_table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- models: written by tools/update_models.py -->", "<!-- end of models -->"
PAGES: dict[Path, Callable[[], list[str]]] = {
    ROOT / "docs/models.md": lambda: [*short_table(), "", *full_table()],
    ROOT / "packages/hd-zoo/README.md": short_table,
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


def rewritten(text: str, lines: list[str]) -> str:
    """The page with the lines between its marks."""
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        return text
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"a page has {BEGIN} without {END}")
    return "\n".join([before + begin, "", *lines, "", end + after])


if __name__ == "__main__":
    sys.exit(main())
