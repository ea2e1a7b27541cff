"""What the READMEs promise is true: their first code block runs, and the commands they name exist."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hd-meanflow", "hd-dmd", "hd-awd", "hd-zoo", "hd-trainer")
READMES = ("README.md", *(f"packages/{package}/README.md" for package in PACKAGES))
#: All pages whose commands a reader may copy.
PAGES = (*READMES, "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
#: A recipe that the reader is about to make, or that a run has left, has the flags of one that is there.
YET_TO_BE_MADE = r"(mine|drawn)\.py(:\w+)?|runs/.*/recipe\.json"
OWN_RECIPE = str(ROOT / "examples/own_recipe.py")
BLOCK_SECONDS = 120

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def read(name: str) -> str:
    """A page's text; a page that is missing fails the test by name."""
    path = ROOT / name
    assert path.is_file(), f"{name} is missing"
    return path.read_text(encoding="utf-8")


def first_python_block(text: str) -> str | None:
    """The first fenced block marked `python`."""
    return next((body for language, body in FENCE.findall(text) if language == "python"), None)


def command_lines(text: str, program: str) -> list[str]:
    """Every command line of `program` in a page, from its code blocks and its inline code.

    Prompts, comments and launchers (`python -m`, `pipx run`, a folder) are dropped; pipes and `&&` part two
    commands. A line that only mentions the program in passing is not a command line: it must start with it.
    """
    blocks = [body.replace("\\\n", " ") for language, body in FENCE.findall(text) if language != "python"]
    pieces = [line for body in blocks for line in body.splitlines()] + INLINE.findall(FENCE.sub("", text))
    parts = [part.split(" #")[0] for piece in pieces for part in re.split(r"&&|\|\||[|;]", piece)]
    start = r"\s*(?:\$\s+)?(?:python3? -m\s+|pipx run\s+|\S*/)?"
    found = (re.match(rf"{start}({program}(?:\s.*)?)$", part) for part in parts)
    return [match[1].strip() for match in found if match]


@functools.cache
def hatch_environments() -> dict[str, dict]:
    """The environments of hatch.toml by name; a matrix also under each of its generated names."""
    environments = dict(tomllib.loads(read("hatch.toml"))["envs"])
    for name, settings in list(environments.items()):
        for matrix in settings.get("matrix", []):
            for value in matrix["package"]:
                environments[f"{name}.{value}"] = settings
    return environments


def hatch_target(line: str) -> tuple[str, str]:
    """`hatch run check:all ...` is environment `check`, script `all`; a bare name belongs to `default`."""
    words = [word for word in shlex.split(line)[2:] if not word.startswith(("+", "-"))]
    environment, colon, script = words[0].partition(":")
    return (environment, script) if colon else ("default", environment)


@functools.cache
def help_text(*words: str) -> str:
    """What `hdistill WORDS --help` prints; it must end with 0."""
    command = shutil.which("hdistill", path=sysconfig.get_path("scripts"))
    assert command, "the command hdistill is not installed in this environment"
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    arguments = [command, *words, "--help"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"`hdistill {' '.join(words)} --help` ends with {done.returncode}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("readme", READMES)
def test_the_first_python_block_runs(readme: str, tmp_path: Path) -> None:
    block = first_python_block(read(readme))
    assert block, f"{readme} has no ```python block"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", block]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BLOCK_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{readme}:\n{block}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES)
def test_every_hatch_command_exists(page: str) -> None:
    lines = [line for line in command_lines(read(page), "hatch run") if line != "hatch run"]
    assert lines or page not in ("README.md", "CONTRIBUTING.md"), f"{page} names no hatch command"
    for line in lines:
        environment, script = hatch_target(line)
        known = hatch_environments()
        assert environment in known, f"{page}: `{line}`: hatch.toml has no environment {environment}"
        scripts = known[environment].get("scripts", {})
        assert script in scripts, f"{page}: `{line}`: environment {environment} has no script {script}"


@pytest.mark.parametrize("page", PAGES)
def test_every_hdistill_command_is_understood(page: str) -> None:
    for line in command_lines(read(page), "hdistill"):
        words = [OWN_RECIPE if re.fullmatch(YET_TO_BE_MADE, word) else word for word in shlex.split(line)[1:]]
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        first_option = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        text = help_text(*words[:first_option])
        for option in options:
            pattern = rf"(?<![\w-]){re.escape(option)}(?![\w-])"
            assert re.search(pattern, text), f"{page}: `{line}`: no option {option}"


def test_the_command_reader_reads_commands() -> None:
    page = "Run `hatch run check:all`, then:\n\n```bash\n"
    page += "$ python -m hatch run digits --x 1 && hdistill run digits  # now\n"
    page += "this is what hatch run does\n```\n"
    assert command_lines(page, "hatch run") == ["hatch run digits --x 1", "hatch run check:all"]
    assert command_lines(page, "hdistill") == ["hdistill run digits"]
    assert hatch_target("hatch run digits --x 1") == ("default", "digits")
    assert hatch_target("hatch run +package=hd-awd unit:all") == ("unit", "all")


def test_table_is_the_one_of_the_committed_results() -> None:
    """The README's numbers are written from benchmarks/results, not by hand."""
    command = [sys.executable, str(ROOT / "tools/update_readme.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
