"""Show, or change everywhere, the URL of the repository.

It stands in metadata, links and install lines of many files, because a package index and a reader of a page need it
spelled out. `repository-code` in CITATION.cff is the one that counts; `tests/test_project_files.py` holds the
others against it.

    python tools/repository_url.py                                  # show it
    python tools/repository_url.py https://example.org/owner/name   # change it
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def repository_url() -> str:
    """The URL that CITATION.cff states."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (url,) = re.findall(r"^repository-code: (\S+)$", text, re.MULTILINE)
    return str(url)


def replace_everywhere(old: str, new: str) -> list[str]:
    """Replace it in every text file that git knows; return the files that changed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    changed = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        data = path.read_bytes() if path.is_file() else b""
        if old.encode() in data and b"\0" not in data:
            path.write_bytes(data.replace(old.encode(), new.encode()))
            changed.append(name)
    return changed


def main() -> int:
    """Print the URL, or change it to the one argument."""
    arguments = sys.argv[1:]
    if len(arguments) > 1 or any(not re.fullmatch(r"https://[^\s/]+(/[\w.-]+)+", one) for one in arguments):
        print(f"{__doc__}\nexpected one URL such as https://example.org/owner/name", file=sys.stderr)
        return 2
    old = repository_url()
    if not arguments:
        print(old)
        return 0
    changed = replace_everywhere(old, arguments[0].removesuffix(".git"))
    print(*changed, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
