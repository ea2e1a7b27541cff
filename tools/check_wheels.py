"""Build all five packages, look into their wheels and install each into a virtual environment of its own.

An editable checkout hides what a user would meet: a data file left out of the wheel, a dependency that is
used but not declared. So every wheel is built from its sdist, installed alone with nothing but what it
declares (for hd-trainer: also the four other wheels of this very build), and imported from an empty folder.

    python tools/check_wheels.py [--only hd-awd] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
LEAVES = ("hd-meanflow", "hd-dmd", "hd-awd", "hd-zoo")
TRAINER = "hd-trainer"
OPTIONAL = ("triton", "xformers", "diffusers")  # never needed by an import

# Runs in the fresh environment: what arrived together with the package, apart from what torch itself brings?
IMPORT_CHECK = """
import importlib, sys
import torch
before = set(sys.modules)
module = importlib.import_module(sys.argv[1])
arrived = {name.partition(".")[0] for name in set(sys.modules) - before}
unwanted = sorted(arrived.intersection(sys.argv[2:]))
if unwanted:
    sys.exit(f"importing {sys.argv[1]} also imports {', '.join(unwanted)}")
print(module.__version__)
"""


class CheckFailed(Exception):
    """One package did not pass; the message is what the table shows."""


@dataclass
class Row:
    """One line of the closing table."""

    package: str
    version: str = "-"
    wheel_kib: float = 0.0
    seconds: float = 0.0
    problem: str = ""
    steps: list[str] = field(default_factory=list)


def import_name(package: str) -> str:
    """The name to import: hd-awd is `hd_awd`."""
    return package.replace("-", "_")


def run(command: list[str], what: str, cwd: Path | None = None) -> str:
    """Run one command and return its output; on failure show all that it said and raise `CheckFailed`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment.pop("PIP_CONSTRAINT", None)  # the constraint is given by name below
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise CheckFailed(f"{what} failed (exit {done.returncode}): {last_line(done.stderr)}")
    return done.stdout


def last_line(text: str) -> str:
    """The line of an error that says most, shortened for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:100] if lines else "no output"


def build(package: str, out: Path) -> Path:
    """Build the sdist, and the wheel from that sdist; return the wheel."""
    run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT / "packages" / package)], "build")
    wheels = sorted(out.glob(f"{import_name(package)}-*.whl"))
    sdists = sorted(out.glob(f"{import_name(package)}-*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        raise CheckFailed(f"expected one sdist and one wheel, found {len(sdists)} and {len(wheels)}")
    return wheels[0]


def check_contents(package: str, wheel: Path) -> None:
    """Every source and data file is in the wheel, the licence and the type marker too, and nothing else."""
    name = import_name(package)
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    source = ROOT / "packages" / package / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / name).rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".pyo"}
    }
    missing = sorted(expected - inside)
    if missing:
        raise CheckFailed(f"not in the wheel: {', '.join(missing)}")
    if f"{name}/py.typed" not in inside:
        raise CheckFailed("no py.typed in the wheel")
    if not any(path.endswith(".dist-info/licenses/LICENSE") for path in inside):
        raise CheckFailed("no LICENSE in the wheel")
    extra = sorted(path for path in inside - expected if ".dist-info/" not in path)
    if extra:
        raise CheckFailed(f"does not belong in the wheel: {', '.join(extra)}")
    if any("tests" in Path(path).parts for path in inside):
        raise CheckFailed("tests are in the wheel")
    if package == TRAINER:
        for suffix in (".safetensors", ".html"):
            if not any(path.endswith(suffix) for path in inside):
                raise CheckFailed(f"no *{suffix} in the wheel: the report needs its template and its weights")


def write_constraints(wheels: dict[str, Path], path: Path) -> None:
    """The pinned torch, and for each package of this house the wheel just built and no other of that name."""
    own = [f"{package} @ {wheel.as_uri()}" for package, wheel in wheels.items()]
    path.write_text("\n".join([CONSTRAINTS.read_text(), *own, ""]))


def install(wheel: Path, constraints: Path, folder: Path) -> Path:
    """Make a fresh environment, install one wheel with what it declares; return its folder of commands."""
    venv.create(folder, with_pip=True)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    python = str(commands / "python")
    # --no-compile: most modules of torch are never imported here.
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    run([*pip, "--constraint", str(constraints), str(wheel)], "install")
    run([python, "-m", "pip", "check"], "pip check")
    return commands


def check_import(package: str, commands: Path, cwd: Path) -> str:
    """Import the package from an empty folder; return its version."""
    others = [import_name(leaf) for leaf in (*LEAVES, TRAINER) if leaf != package] if package in LEAVES else []
    arguments = [import_name(package), *others, *OPTIONAL]
    return run([str(commands / "python"), "-I", "-c", IMPORT_CHECK, *arguments], "import", cwd).strip()


def check_package(package: str, wheels: dict[str, Path], work: Path) -> Row:
    """Everything about one built package, as a line of the table."""
    row = Row(package)
    start = time.perf_counter()
    try:
        wheel = wheels[package]
        row.wheel_kib = wheel.stat().st_size / 1024
        check_contents(package, wheel)
        row.steps.append("contents")
        constraints = work / "constraints.txt"
        write_constraints(wheels, constraints)
        with tempfile.TemporaryDirectory(prefix=f"{package}-", dir=work) as folder:
            commands = install(wheel, constraints, Path(folder) / "venv")
            row.steps.append("install")
            row.version = check_import(package, commands, Path(folder))
            row.steps.append("import")
            if package == TRAINER:
                run([str(commands / "hdistill"), "--help"], "hdistill --help", Path(folder))
                row.steps.append("command")
        if f"-{row.version}-" not in wheel.name:
            raise CheckFailed(f"the package says {row.version}, the wheel {wheel.name}")
    except CheckFailed as error:
        row.problem = str(error)
    row.seconds = time.perf_counter() - start
    return row


def print_table(rows: list[Row]) -> None:
    """One line per package: what passed, and what did not."""
    print(f"\n{'package':<12} {'version':<8} {'wheel':>9} {'time':>7}  passed")
    for row in rows:
        passed = ", ".join(row.steps) + (f"  FAILED: {row.problem}" if row.problem else "")
        print(f"{row.package:<12} {row.version:<8} {row.wheel_kib:>5.0f} KiB {row.seconds:>5.0f} s  {passed}")


def main() -> int:
    """Build all, check all, print the table; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*LEAVES, TRAINER], help="check this one package (all are still built)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the built files in this folder")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="hd-wheels-") as folder:
        work = Path(folder)
        out = arguments.keep.resolve() if arguments.keep else work / "dist"
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            print(f"{out} is not empty: name an empty or a new folder", file=sys.stderr)
            return 2
        wheels, rows = {}, []
        for package in (*LEAVES, TRAINER):
            print(f"building {package}", flush=True)
            try:
                wheels[package] = build(package, out)
            except CheckFailed as error:
                rows.append(Row(package, problem=str(error)))
        for package in [arguments.only] if arguments.only else list(wheels):
            if package in wheels:
                print(f"checking {package}", flush=True)
                rows.append(check_package(package, wheels, work))
    print_table(rows)
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
