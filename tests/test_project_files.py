"""Files for people and services around the repository: they parse, and what they name exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hd-meanflow", "hd-dmd", "hd-awd", "hd-zoo", "hd-trainer")


def read_yaml(name: str) -> dict[str, Any]:
    """A YAML file as a dictionary."""
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict), f"{name} is no mapping"
    return content


def read_toml(name: str) -> dict[str, Any]:
    """A TOML file as a dictionary."""
    return tomllib.loads((ROOT / name).read_text(encoding="utf-8"))


def repository_url() -> str:
    """The URL that CITATION.cff states."""
    return str(read_yaml("CITATION.cff")["repository-code"])


def test_the_workflow_calls_ci_run_and_nothing_else() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML 1.1 reads the word `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    *actions, last = job["steps"]
    assert [step["uses"].partition("@")[0] for step in actions] == ["actions/checkout", "actions/setup-python"]
    assert last == {"run": ".ci/run"}
    assert (ROOT / ".ci/run").stat().st_mode & 0o111, ".ci/run cannot be executed"


def test_the_workflows_versions_are_the_packages() -> None:
    (job,) = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    versions = job["strategy"]["matrix"]["python-version"]
    for package in PACKAGES:
        classifiers = read_toml(f"packages/{package}/pyproject.toml")["project"]["classifiers"]
        stated = [one.rpartition(" ")[2] for one in classifiers if re.search(r":: Python :: 3\.\d+$", one)]
        assert versions == [stated[0], stated[-1]], f"{package}: the workflow runs the oldest and the newest it states"


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_an_issue_form_has_what_is_needed(name: str) -> None:
    form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"]
    assert form["description"]
    fields = form["body"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes", "markdown"}
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    assert all(field["attributes"]["label"] for field in fields)


def test_the_bug_form_knows_every_package() -> None:
    fields = {field["id"]: field for field in read_yaml(".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert set(PACKAGES) < set(fields["package"]["attributes"]["options"])


def test_the_hooks_call_environments_of_hatch() -> None:
    environments = read_toml("hatch.toml")["envs"]
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    for hook in local["hooks"]:
        assert {"id", "name", "entry", "language"} <= hook.keys()
        words = hook["entry"].split()
        assert words[:2] == ["hatch", "run"]
        environment, _, command = words[2].partition(":")
        tools = environments["develop"]["dependencies"]
        installed = any(tool.startswith(command) for tool in tools)
        assert installed or command in environments[environment]["scripts"], hook["entry"]


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "license", "version"} <= citation.keys()
    (paper,) = citation["references"]
    assert paper["url"].endswith("/2511.08930")
    assert len(paper["authors"]) == 7
    for package in PACKAGES:
        path = read_toml(f"packages/{package}/pyproject.toml")["tool"]["hatch"]["version"]["path"]
        source = (ROOT / "packages" / package / path).read_text(encoding="utf-8")
        assert f'__version__ = "{citation["version"]}"' in source, package


@pytest.mark.parametrize("package", PACKAGES)
def test_metadata_is_alike(package: str) -> None:
    """What only some of the five say is what tells them apart; the rest is the same."""
    mine, first = (read_toml(f"packages/{name}/pyproject.toml") for name in (package, PACKAGES[0]))
    for key in ("requires-python", "license", "authors", "classifiers"):
        assert mine["project"][key] == first["project"][key], key
    assert mine["build-system"] == first["build-system"]
    url = repository_url()
    urls = mine["project"]["urls"]
    assert all(
        urls[name].startswith(url) for name in ("Homepage", "Documentation", "Repository", "Issues", "Changelog")
    )
    rules = mine["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    assert all(rule["replacement"].startswith(f"]({url}/blob/main/") for rule in rules)


def install_lines(text: str) -> list[str]:
    """The packages that a page installs from a URL, as `name url folder`."""
    pattern = r"([\w-]+)(?:\[\w+\])? @ git\+([^\s#\"']+)#subdirectory=packages/([\w-]+)"
    return [" ".join(found) for found in re.findall(pattern, text)]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_install_lines_name_this_repository(package: str) -> None:
    text = (ROOT / "packages" / package / "README.md").read_text(encoding="utf-8")
    wanted = PACKAGES if package == "hd-trainer" else (package,)
    assert install_lines(text) == [f"{name} {repository_url()} {name}" for name in wanted]


def test_no_file_has_another_url_of_the_repository() -> None:
    url = repository_url()
    _, _, owner_and_name = url.partition("//")
    owner = owner_and_name.split("/")[1]
    command = ["git", "grep", "-I", "-n", "-o", "-E", rf"https?://[a-z.]+/{owner}/[A-Za-z0-9_.-]*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip("not a git checkout")
    wrong = [line for line in found.stdout.splitlines() if not line.endswith(f":{url}")]
    assert not wrong, "run tools/repository_url.py instead of writing another one"


def test_the_security_page_matches_the_code() -> None:
    """No module reads a pickle through one that would run it, and none evaluates text."""
    forbidden = r"\btorch\.load\((?!.*weights_only=True)|"
    forbidden += r"\bpickle\.(load|loads|Unpickler)\b|allow_pickle=True|(?<![.\w])(eval|exec)\("
    sources = sorted((ROOT / "packages").glob("*/src/**/*.py"))
    assert len(sources) > 50
    wrong = [str(path.relative_to(ROOT)) for path in sources if re.search(forbidden, path.read_text(encoding="utf-8"))]
    assert not wrong, f"SECURITY.md says that nothing is executed: {wrong}"
