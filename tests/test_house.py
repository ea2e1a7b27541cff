"""The rules of the house that no single package can check about itself."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = ("hd-meanflow", "hd-dmd", "hd-awd", "hd-zoo")
PACKAGES = (*LEAVES, "hd-trainer")

FOLDER_LINES = 1000  # one subject, read in one sitting: a leaf, or a folder of one
FILE_LINES = 400  # a file past 300 lines is named, past this one it fails
FUNCTION_LINES = 60  # without signature and docstring
IMPORTED_MODULES = 50  # what importing a leaf may add to `import torch`
DECLARED = {"hd-meanflow": set(), "hd-dmd": set(), "hd-awd": {"einops"}, "hd-zoo": {"einops", "safetensors"}}

# Names that meant several things, or nothing to a reader from outside, and what stands in their place. Old files are
# still read: there these words are strings in a table.
RETIRED = {
    "adversary": "discriminator",
    "amount": "num_tokens or num_queries",
    "critics": "discriminator",
    "deceit": "gan_loss",
    "fake_optimizer": "fake_score_optimizer",
    "heads": "num_heads, or layer_heads of a discriminator",
    "moving": "r_below_t",
    "student_every": "student_update_every",
    "told_apart": "discriminator_accuracy",
    "weighed": "pool_over",
}

# Modules that no import may bring: optional accelerators, and libraries whose only purpose is the network.
UNWANTED = ("triton", "xformers", "diffusers", "requests", "httpx", "aiohttp", "huggingface_hub", "wandb")

IMPORT_SCRIPT = """
import socket, sys

def refuse(*arguments, **keywords):
    raise SystemExit(f"{sys.argv[1]} opened a network connection on import")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
import torch
before = set(sys.modules)
__import__(sys.argv[1])
arrived = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(arrived.intersection(sys.argv[2:])))
"""

ARRIVED_SCRIPT = """
import sys
import torch
before = set(sys.modules)
__import__(sys.argv[1])
print(*sorted(set(sys.modules) - before))
"""


def import_name(package: str) -> str:
    """The name to import: hd-awd is `hd_awd`."""
    return package.replace("-", "_")


def sources(package: str) -> list[Path]:
    """The package's Python files; a package without any is an error, not a pass."""
    files = sorted((ROOT / "packages" / package / "src").rglob("*.py"))
    assert files, f"{package} has no Python files under src/"
    return files


def count_lines(path: Path) -> int:
    """Lines of a file, blank ones and comments included: what a reader scrolls through."""
    return len(path.read_text(encoding="utf-8").splitlines())


def imported_modules(path: Path) -> set[str]:
    """First parts of all names that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def run_python(script: str, *arguments: str) -> str:
    """Run a script in an interpreter of its own, without a GPU; return what it printed."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def repository_files() -> list[Path]:
    """The text files that git would commit, or all that there are outside a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_never_import_a_neighbour(leaf: str) -> None:
    neighbours = {import_name(package) for package in PACKAGES if package != leaf}
    for path in sources(leaf):
        wrong = imported_modules(path) & neighbours
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def definitions(path: Path, name: str) -> list[str]:
    """The source of a class or function of a module, without the layout of its lines; none or one."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name]
    return [" ".join(ast.unparse(node).split()) for node in nodes]


# What several leaves write down for themselves, as none may import another: (file, name, at least in so many leaves).
COPIES = [
    ("field.py", "Field", 3),
    ("field.py", "expand_times", 3),
    ("field.py", "check_output", 2),
    *(
        ("checks.py", name, 2)
        for name in ("is_finite", "check_finite", "check_positive", "check_share", "check_sampler")
    ),
]


@pytest.mark.parametrize(("file", "name", "leaves"), COPIES)
def test_the_copies_of_a_contract_are_equal(file: str, name: str, leaves: int) -> None:
    """Signature, docstring and body; the `Field` protocol with its docstring is the contract of all networks."""
    paths = [ROOT / "packages" / leaf / "src" / import_name(leaf) / file for leaf in LEAVES]
    copies = {path: copy for path in paths if path.is_file() for copy in definitions(path, name)}
    assert len(copies) >= leaves, f"{name} is expected in {leaves} leaves; found in {[*map(str, copies)]}"
    (first, wanted), *others = copies.items()
    for path, copy in others:
        assert copy == wanted, f"{name} differs between {first.relative_to(ROOT)} and {path.relative_to(ROOT)}"


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_stays_small(leaf: str) -> None:
    folders: dict[Path, int] = {}
    for path in sources(leaf):
        folders[path.parent] = folders.get(path.parent, 0) + count_lines(path)
    long = {str(folder.relative_to(ROOT)): lines for folder, lines in folders.items() if lines > FOLDER_LINES}
    assert not long, f"more than {FOLDER_LINES} lines of source in a folder: {long}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_long(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = {path.relative_to(ROOT): count_lines(path) for path in sources(package)}
    for path, lines in lengths.items():
        if 300 < lines <= FILE_LINES:
            with capsys.disabled():
                print(f"\n{path} has {lines} lines: time to split it")
    assert not {path: lines for path, lines in lengths.items() if lines > FILE_LINES}


def functions(path: Path) -> list[ast.FunctionDef]:
    """All functions of a file but Triton's kernels, which the compiler wants in one piece."""
    found = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    return [node for node in found if not any("triton" in ast.unparse(mark) for mark in node.decorator_list)]


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its signature and its docstring, which grow with what there is to explain."""
    start = function.body[0]
    first = (start.end_lineno or 0) + 1 if ast.get_docstring(function) is not None else start.lineno
    return max((function.end_lineno or 0) - first + 1, 0)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_is_long(package: str) -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}": body_lines(function)
        for path in sources(package)
        for function in functions(path)
    }
    assert not {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES}


def names_given(path: Path) -> set[str]:
    """The names that a file gives: to functions, classes, arguments, variables and attributes of `self`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_retired_names_stay_away(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name} is called {RETIRED[name]} here"
        for path in sources(package)
        for name in names_given(path) & RETIRED.keys()
    }
    assert not found


def modules(package: str) -> dict[str, Path]:
    """The package's modules by their dotted names; a folder goes by its own name."""
    source = ROOT / "packages" / package / "src"
    parts = {path: path.relative_to(source).with_suffix("").parts for path in sources(package)}
    return {".".join(name[:-1] if name[-1] == "__init__" else name): path for path, name in parts.items()}


def imports_at_once(body: list[ast.stmt]) -> list[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported: not those in a function, nor those for type checkers."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found += imports_at_once(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                found += imports_at_once(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                found += imports_at_once(handler.body)
    return found


def import_graph(package: str) -> dict[str, set[str]]:
    """Which modules of the package each module imports at once, by their dotted names."""
    known = modules(package)
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in imports_at_once(ast.parse(path.read_text(encoding="utf-8")).body):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            else:
                assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: a relative import"
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [one if one in known else str(node.module) for one in wanted]
            graph[name].update(one for one in wanted if one in known and one != name)
    return graph


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    try:
        list(graphlib.TopologicalSorter(import_graph(package)).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_a_circle_would_be_found() -> None:
    source = "import a\nif TYPE_CHECKING:\n    import b\ntry:\n    import c\nexcept ImportError:\n    import d\n"
    source += "def later():\n    import e\n"
    names = [alias.name for node in imports_at_once(ast.parse(source).body) for alias in node.names]
    assert names == ["a", "c", "d"]
    graph = import_graph("hd-zoo")
    assert sum(map(len, graph.values())) >= len(graph) / 2, "hardly any import was seen"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_complete(package: str) -> None:
    folder = ROOT / "packages" / package
    module = folder / "src" / import_name(package)
    for path in (
        folder / "pyproject.toml",
        folder / "README.md",
        module / "py.typed",
        module / "__init__.py",
    ):
        assert path.is_file(), f"{path.relative_to(ROOT)} is missing"
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert list((folder / "tests").glob("test_*.py")), f"{package} has no tests"
    stated = re.search(r'\[tool\.hatch\.version\]\npath = "(.+)"', (folder / "pyproject.toml").read_text())
    assert stated is not None
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', (folder / stated[1]).read_text(), re.MULTILINE)


def test_the_packages_share_one_version() -> None:
    script = "import sys; print(*{__import__(name).__version__ for name in sys.argv[1:]})"
    versions = run_python(script, *map(import_name, PACKAGES)).split()
    assert len(versions) == 1, f"several versions: {versions}"


@pytest.mark.parametrize("package", PACKAGES)
def test_an_import_needs_no_network_and_no_extras(package: str) -> None:
    neighbours = [import_name(other) for other in PACKAGES if package in LEAVES and other != package]
    arrived = run_python(IMPORT_SCRIPT, import_name(package), *UNWANTED, *neighbours)
    assert not arrived, f"importing {package} also imports {arrived}"


@pytest.mark.parametrize("leaf", LEAVES)
def test_importing_a_leaf_brings_little(leaf: str) -> None:
    """Itself and what it declares, a few dozen modules in all: that is why it is quick."""
    arrived = run_python(ARRIVED_SCRIPT, import_name(leaf)).split()
    foreign = {name.partition(".")[0] for name in arrived} - {import_name(leaf)}
    assert foreign <= DECLARED[leaf], f"importing {leaf} also imports {foreign - DECLARED[leaf]}"
    assert len(arrived) <= IMPORTED_MODULES, f"importing {leaf} brings {len(arrived)} modules"


def test_no_file_names_a_package_registry() -> None:
    # Spelled in pieces, so that this file passes its own test.
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"))]
    hosts += [".".join(parts) for parts in (("npmjs", "org"), ("download", "pytorch", "org"), ("debian", "org"))]
    wrong = {
        f"{path.relative_to(ROOT)} names {host}"
        for path in repository_files()
        for host in hosts
        if host in path.read_text(encoding="utf-8", errors="replace")
    }
    assert not wrong
