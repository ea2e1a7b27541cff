"""Each thing a reader looks for happens in one file of the trainer, and imports go one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hd_trainer

SOURCE = Path(hd_trainer.__file__).parent

#: What is looked for, the words that give it away, and the one file or folder where it happens.
ROOMS = {
    "a gradient is taken": (r"\.backward\(|autograd\.grad\(", "engine/optimizer.py"),
    "a random number begins": (
        r"torch\.(rand|randn|randint|rand_like|randn_like|randperm|normal|bernoulli|multinomial|manual_seed)\(|"
        r"np\.random|import random|\.(normal_|uniform_|bernoulli_)\(|Generator\(\)|seeded_noise\(|fork_rng",
        "engine/draws.py",
    ),
    "a file is written": (
        r"\.write_text\(|\.write_bytes\(|save_file\(|torch\.save\(|os\.replace\(|mkdtemp|mkstemp|rmtree|\.unlink\(|"
        r"open\([^)]*['\"][wax]",
        "files.py",
    ),
    "a network is made, loaded or saved": (
        r"create_model\(|from_pretrained\(|save_pretrained\(|to_student\(|add_interval\(|load_published\(|from_diffusers\(",
        "networks/",
    ),
    "the number of processes matters": (
        r"WORLD_SIZE|torch\.distributed|cuda\.is_available|LOCAL_RANK",
        "engine/parallel.py",
    ),
    "a signal is handled": (r"signal\.signal\(|SIGTERM", "signals.py"),
}

#: From the bottom up: a room imports none above it.
FLOORS = [
    ("errors.py", "version.py", "earlier.py", "signals.py"),
    ("checks.py", "decoding.py", "files.py", "options.py", "progress.py", "user_code.py"),
    ("images.py", "writers/"),
    ("engine/",),
    ("data/",),
    ("context.py",),
    ("networks/",),
    ("evaluation/",),
    ("stages/",),
    ("settings.py",),
    ("recipes/", "memory.py", "rules.py", "run_folder.py"),
    ("new_recipe.py", "run_options.py", "sample.py", "report/"),
    ("sharing/",),
    ("pipeline.py",),
    ("dry_run.py",),
    ("__init__.py", "commands.py"),
    ("cli.py",),
    ("__main__.py",),
]


def code_of(path: Path) -> str:
    """The file without comments and strings: what it does, not what it says."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)


def floor_of(module: str) -> int | None:
    """The floor of ``hd_trainer.engine.loop`` and its like; None for what is not the trainer's."""
    if module.split(".")[0] != "hd_trainer":
        return None
    path = "/".join(module.split(".")[1:]) or "__init__"
    for number, rooms in enumerate(FLOORS):
        for room in rooms:
            if path + ".py" == room or (room.endswith("/") and f"{path}/".startswith(room)):
                return number
    raise AssertionError(f"{module} stands on no floor: give it one")


@pytest.mark.parametrize("what", ROOMS)
def test_it_happens_in_one_place(what: str) -> None:
    words, room = ROOMS[what]
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if re.search(words, code_of(path))}
    assert found
    assert all(path == room or (room.endswith("/") and path.startswith(room)) for path in found), found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    module = ".".join(("hd_trainer", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    own = floor_of(module)
    assert own is not None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at import time; later imports may look up
        for name in imported(node):
            floor = floor_of(name)
            assert floor is None or floor <= own, f"{module} imports {name}, which stands above it"


def imported(node: ast.stmt) -> list[str]:
    """Modules that a statement imports; ``from hd_trainer import signals`` names hd_trainer.signals."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return []
    if node.module == "hd_trainer":
        return [f"hd_trainer.{alias.name}" for alias in node.names]
    return [node.module]
