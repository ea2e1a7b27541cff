"""From the packages' docstrings to reStructuredText.

The docstrings are plain text: ``code`` in double backquotes, roles for references, bullet lists, indented equations,
and the sections ``Args:``, ``Attributes:``, ``Returns:``, ``Yields:`` and ``Raises:``. Signs that mean something in
reStructuredText alone (``|x|^2``, ``a * b``, ``x_{k+1}``) are escaped.
"""

from __future__ import annotations

import re
from textwrap import dedent

SECTIONS = {
    "Args:": "Parameters",
    "Attributes:": "Attributes",
    "Returns:": "Returns",
    "Yields:": "Yields",
    "Raises:": "Raises",
}
KEPT = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`|`[^`]+`_)")
BULLET = re.compile(r"\s*(?:[*-]|\d+\.) ")
ENTRY = re.compile(r"([*\w., ]+?): (.*)", re.DOTALL)


def to_restructured_text(docstring: str) -> str:
    """A whole docstring, its indentation already removed."""
    text, parts = [], []
    lines = docstring.splitlines()
    while lines:
        line = lines.pop(0)
        if line not in SECTIONS:
            text.append(line)
            continue
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        parts += [paragraphs("\n".join(text)), section(SECTIONS[line], dedent("\n".join(body)))]
        text = []
    parts.append(paragraphs("\n".join(text)))
    return "\n\n".join(filter(None, parts)) + "\n"


def paragraphs(text: str) -> str:
    """Text with its special signs escaped; an indented paragraph, an equation as a rule, is shown as it stands."""
    found: list[str] = []
    literal = False  # inside a literal block, or right after the two colons that announce one
    for block in filter(str.strip, re.split(r"\n(?:[ \t]*\n)+", text.strip("\n"))):
        indented = all(line.startswith(" ") for line in block.splitlines())
        if indented and not BULLET.match(block):
            found += [block] if literal else ["::", block]
            literal = True
        else:
            found.append(escape(block))
            literal = block.rstrip().endswith("::")
    return "\n\n".join(found)


def section(title: str, body: str) -> str:
    """A section as a field: a list of names for arguments and errors, plain text for what comes back."""
    if title in ("Returns", "Yields"):
        return f":{title}: {escape(' '.join(body.split()))}"
    entries: list[str] = []
    for line in body.splitlines():
        if line.strip() and not line.startswith(" ") and ENTRY.match(line):
            entries.append(line)
        elif line.strip() and entries:
            entries[-1] += " " + line.strip()
    items = []
    for entry in entries:
        names, text = ENTRY.fullmatch(entry).groups()
        items.append(f"    * ``{names}``: {escape(text)}")
    return "\n".join([f":{title}:", *items])


def escape(text: str) -> str:
    """Escape what reStructuredText would read as emphasis, a substitution or a reference."""
    return "\n".join(_escape_line(line) for line in text.splitlines())


def _escape_line(line: str) -> str:
    start = BULLET.match(line)
    head = start.group() if start else ""
    pieces = KEPT.split(line[len(head) :])
    for index in range(0, len(pieces), 2):
        escaped = re.sub(r"([\\*|`])", r"\\\1", pieces[index])
        pieces[index] = re.sub(r"(\w)_(?!\w)", r"\1\\_", escaped)
    return head + "".join(pieces)
