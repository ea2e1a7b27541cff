"""A virtual environment in which one package and what it declares can be imported, and nothing else.

Installing torch takes longer than everything else together. So it is not installed again for each package: a folder
of links shows the torch of the environment that runs this file, with torch's own dependencies and nothing more, and
each new environment reads that folder through a .pth file. pip sees what is there as installed. `check_isolation`
proves that nothing else came along.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# Runs in the environment: where modules come from, and which distributions there are with what they require.
LOOK_AROUND = """
import importlib.metadata, json, sys
found = [
    {"name": d.metadata["Name"], "version": d.version, "requires": d.requires or []}
    for d in importlib.metadata.distributions()
]
print(json.dumps({"path": sys.path, "base": sys.base_prefix, "distributions": found}))
"""


class CheckFailed(Exception):
    """One check did not pass; the message is one line for a table."""


def canonical(name: str) -> str:
    """A distribution's name as pip compares it: lower case, one dash for any run of dashes, dots and underscores."""
    return re.sub(r"[-_.]+", "-", name).lower()


def run(command: list[str], what: str, cwd: Path | None = None, *, quiet: bool = False, **variables: str) -> str:
    """Run one command and return its output; on failure print all that it said (unless quiet), raise `CheckFailed`."""
    dropped = ("PYTHON", "PIP_CONSTRAINT", "VIRTUAL_ENV", "HATCH_")  # the tool's own environment must not reach in
    environment = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    environment |= variables
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and not quiet:
        print(f"--- {what}: {' '.join(command)[:300]}", done.stdout, done.stderr, sep="\n", file=sys.stderr)
    if done.returncode:
        raise CheckFailed(f"{what} failed (exit {done.returncode}): {last_line(done.stderr or done.stdout)}")
    return done.stdout


def last_line(text: str) -> str:
    """The line of an error that says most, shortened for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:100] if lines else "no output"


def closure(names: list[str], requires: dict[str, list[str]]) -> set[str]:
    """These distributions and all that they require, by the requirements of each; a missing one counts too.

    `names` may carry extras, as in "hd-awd[test]".
    """
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonical(requirement.name)
        found.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in requires.get(name, []):
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return found


def link_torch(folder: Path) -> None:
    """Fill a new folder with links to the torch of this environment and to what torch requires."""
    installed = {canonical(d.metadata["Name"]): d for d in metadata.distributions()}
    if "torch" not in installed:
        raise SystemExit("torch is not installed here: run this by `hatch run wheels:all` or `hatch run unit:all`")
    requires = {name: distribution.requires or [] for name, distribution in installed.items()}
    folder.mkdir(parents=True)
    for name in closure(["torch"], requires) & installed.keys():
        distribution = installed[name]
        entries = {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}
        for entry in sorted(entries):
            link, target = folder / entry, Path(str(distribution.locate_file(entry))).resolve()
            if not link.exists() and target.exists():
                link.symlink_to(target)


class BareEnvironment:
    """A new virtual environment without pip, whose only content is the linked torch."""

    def __init__(self, folder: Path, torch_folder: Path, constraints: Path) -> None:
        venv.create(folder, with_pip=False)
        self.commands = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = str(self.commands / "python")
        self.torch_folder = torch_folder
        self.constraints = constraints
        (site,) = folder.glob("lib/python*/site-packages") if os.name != "nt" else [folder / "Lib/site-packages"]
        self.site = site
        (site / "torch_only.pth").write_text(f"{torch_folder}\n")

    def pip(self, what: str, *arguments: str) -> str:
        """Run this environment's pip command, with the pip of the environment that runs this file."""
        return run([sys.executable, "-m", "pip", "--python", self.python, *arguments], what)

    def install(self, *requirements: str) -> None:
        """Install, with what is declared, and let pip check that all fits together."""
        # Not compiled: most modules are never imported here.
        quiet = ("--quiet", "--disable-pip-version-check", "--no-compile")
        self.pip("install", "install", *quiet, "--constraint", str(self.constraints), *requirements)
        self.pip("pip check", "check", "--disable-pip-version-check")

    def check_isolation(self, package: str) -> None:
        """What can be imported is the standard library, `package`, and what these require; else `CheckFailed`."""
        seen = json.loads(run([self.python, "-I", "-c", LOOK_AROUND], "looking around"))
        base, own = Path(seen["base"]).resolve(), {self.site.resolve(), self.torch_folder.resolve()}
        for path in map(Path, filter(None, seen["path"])):
            of_python = path.resolve().is_relative_to(base) and path.name not in ("site-packages", "dist-packages")
            if path.resolve() not in own and not of_python:
                raise CheckFailed(f"modules also come from {path}")
        requires = {canonical(entry["name"]): entry["requires"] for entry in seen["distributions"]}
        surplus = set(requires) - closure([package, "torch"], requires)
        if surplus:
            raise CheckFailed(f"installed beside {package}, but not declared: {', '.join(sorted(surplus))}")
