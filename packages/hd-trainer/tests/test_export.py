"""A run as a folder to upload: it works without the trainer, says what it is, and is whole or not there."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from trainer_helpers import SHORT, Answer, contents, hdistill

import hd_zoo
from hd_trainer.files import INCOMPLETE

#: Most cases are whole runs: they are tried once, beside all other packages.
pytestmark = pytest.mark.slow

#: What the script must do without: the trainer, the other packages, and what only they bring.
ELSEWHERE = ("hd_trainer", "hd_dmd", "hd_awd", "hd_meanflow", "numpy", "sklearn", "matplotlib", "diffusers", "jinja2")

RUN_ALONE = """
import runpy, sys
path, hidden, *rest = sys.argv[1:]
for name in hidden.split(","):
    sys.modules[name] = None
sys.argv = [path, *rest]
runpy.run_path(path, run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, exported; shared by all, so copy it before changing anything."""
    folder = tmp_path_factory.mktemp("exported") / "new" / "folder"
    answer = hdistill("export", finished, "--out", folder, "--license", "apache-2.0", "--name", "Digits in one step")
    assert answer.code == 0, answer.err
    return folder


def alone(folder: Path, *arguments: object, hidden: tuple[str, ...] = ELSEWHERE) -> Answer:
    """The folder's script in a process that has hd_zoo and PyTorch, and nothing of the trainer."""
    words = [str(folder / "sample.py"), ",".join(hidden), *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_ALONE, *words],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """(front matter, the rest) of the model card."""
    _, front, rest = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    lines = [line for line in front.splitlines() if not line.startswith("#")]
    found: dict[str, Any] = {}
    for line in lines:
        if line.startswith("- "):
            found[list(found)[-1]] = [*(found[list(found)[-1]] or []), line[2:]]
        else:
            key, value = re.fullmatch(r"([a-z_]+):(?: (\S+))?", line).groups()  # type: ignore[union-attr]
            found[key] = value
    return found, rest


# ---- the script


def test_the_script_draws_without_the_trainer(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.png"
    answer = alone(exported, "--count", 12, "--seed", 5, "--labels", 3, 7, "--out", out)
    assert answer.code == 0, answer.err
    student: Any = hd_zoo.from_pretrained(exported)
    noise = hd_zoo.seeded_noise(student.sample_shape, range(5, 17))
    images = hd_zoo.sample_jumps(student, noise, labels=torch.tensor([3, 7] * 6))
    expected = ((images.clamp(-1, 1) + 1) * 127.5).round()[:, 0].numpy()
    with Image.open(out) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (16, 80, 3), "two rows of ten places"
    for index in range(12):
        top, left = 8 * (index // 10), 8 * (index % 10)
        for channel in range(3):
            assert np.abs(pixels[top : top + 8, left : left + 8, channel] - expected[index]).max() <= 1
    assert not pixels[8:, 16:].any()


def test_the_script_is_short_and_knows_hd_zoo_alone(exported: Path) -> None:
    text = (exported / "sample.py").read_text()
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [one.name for one in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"argparse", "pathlib", "torch", "hd_zoo", "PIL"}
    assert len([line for line in text.splitlines() if line.strip()]) <= 28


def test_the_card_says_how_its_picture_is_drawn(exported: Path, tmp_path: Path) -> None:
    _, text = card_of(exported)
    words = re.search(r"`python sample.py ([^`]*)` draws them again", text)
    assert words is not None
    assert alone(exported, *words[1].split(), "--out", tmp_path / "again.png").code == 0
    with Image.open(exported / "samples.png") as shown, Image.open(tmp_path / "again.png") as again:
        small = np.asarray(again).astype(int)
        # The card's picture has a grey line around each image and is enlarged four times.
        large = np.asarray(shown.convert("RGB")).astype(int)[::4, ::4]
    for row in range(8):
        for column in range(10):
            one = large[9 * row + 1 : 9 * row + 9, 9 * column + 1 : 9 * column + 9]
            assert np.abs(one - small[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]).max() <= 1


def test_latents_and_other_conditions(tmp_path: Path) -> None:
    """Data whose samples are no pictures, without classes: the script writes latents."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom hd_trainer.data import Dataset, InMemory\n"
        "def data():\n"
        "    x = torch.randn(60, 4, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "    return Dataset(name='latents', train=InMemory(x=x[:50]), held_out=InMemory(x=x[50:]))\n"
    )
    short = [*SHORT[:2], "--data", f"{tmp_path / 'mine.py'}:data", *SHORT[2:]]
    assert hdistill(*short, "--out", tmp_path / "run").code == 0
    answer = hdistill("export", tmp_path / "run")
    assert answer.code == 0, answer.err
    folder = tmp_path / "run/export"
    hidden = tuple(name for name in ELSEWHERE if name != "numpy")  # by which safetensors writes
    answer = alone(folder, "--count", 3, "--out", tmp_path / "mine.safetensors", hidden=hidden)
    assert answer.code == 0, answer.err
    student: Any = hd_zoo.from_pretrained(folder)
    expected = hd_zoo.sample_jumps(student, hd_zoo.seeded_noise((4, 8, 8), range(3)))
    torch.testing.assert_close(load_file(tmp_path / "mine.safetensors")["latents"], expected)
    front, text = card_of(folder)
    assert "license" not in front
    assert "4 x 8 x 8 latents" in text
    assert "no distance was measured" in text
    assert 'packages/hd-zoo" numpy\n' in text


@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "latents"])
@pytest.mark.parametrize("further", [[], ["prompt"]], ids=["", "prompt"])
@pytest.mark.parametrize("classes", [0, 3])
def test_every_form_of_the_script_runs(classes: int, further: list[str], pictures: bool, tmp_path: Path) -> None:
    """With a student that takes just those conditions, in hd_zoo's place."""
    from hd_trainer.sharing.card import environment

    facts = {"classes": classes, "further": further, "pictures": pictures}
    (tmp_path / "sample.py").write_text(environment().get_template("sample.py.jinja").render(**facts))
    save_file({"prompt": torch.arange(2.0)}, tmp_path / "conditions.safetensors")
    (tmp_path / "hd_zoo.py").write_text(
        "import torch\n"
        "def from_pretrained(folder):\n    return type('Student', (), {'sample_shape': (3, 2, 2)})\n"
        "def seeded_noise(shape, seeds):\n    return torch.zeros(len(seeds), *shape)\n"
        "def sample_jumps(student, noise, **cond):\n"
        "    print({name: value.tolist() for name, value in cond.items()})\n    return noise\n"
    )
    out = tmp_path / ("out.png" if pictures else "out.safetensors")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "sample.py"), "--count", "5", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = {"prompt": [0.0, 1.0, 0.0, 1.0, 0.0]} if further else {}
    expected |= {"labels": [0, 1, 2, 0, 1]} if classes else {}
    assert ast.literal_eval(done.stdout) == expected
    assert out.is_file()


# ---- the card


def test_the_card_holds_the_measured_table_and_where_all_came_from(exported: Path, finished: Path) -> None:
    front, text = card_of(exported)
    assert front["library_name"] == "hd-zoo"
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert "one-step-generation" in front["tags"]
    assert "# Digits in one step\n" in text
    results = json.loads((finished / "evaluation.json").read_text())
    table = [
        [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        for line in text[text.index("## Measured") : text.index("## How it was made")].splitlines()
        if line.startswith("|")
    ]
    assert table[0][1:6] == ["steps", "calls", "N", "FD-digits", "KID"]
    assert len(table) == 2 + len(results["rows"])
    for line, row in zip(table[2:], results["rows"], strict=True):
        cells = dict(zip(table[0], line, strict=True))
        assert row["name"] in line[0]
        assert cells["N"] == f"{row['samples']:,}"
        values = sorted(one["fd"] for one in row["per_seed"])
        spread = f" ({values[0]:.2f} to {values[-1]:.2f})" if len(values) > 1 else ""
        assert cells["FD-digits"] == f"{row['fd']:.2f}{spread}"
        assert cells["recall"].startswith(f"{row['recall']:.3f}")
    assert "It is not FID" in text
    sources = json.loads((finished / "distribution/sources.json").read_text())
    assert f"Teacher: trained in this run, SHA-256 of its weights `{sources['teacher']['sha256']}`" in text
    assert sources["student"]["sha256"] in text
    assert "far from the data" in text, "the smoke run's warning stands among the limits"
    assert str(finished.parent) not in text
    assert "{{" not in text
    assert "{%" not in text


def test_files_are_the_runs(exported: Path, finished: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        assert (exported / name).read_bytes() == (finished / "distribution" / name).read_bytes()
    assert (exported / "recipe.json").read_bytes() == (finished / "recipe.json").read_bytes()
    names = {"README.md", "config.json", "model.safetensors", "recipe.json", "sample.py", "samples.png"}
    assert {path.name for path in exported.iterdir()} - {"diffusers"} == names
    assert os.access(exported, os.R_OK | os.X_OK)
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_weights_that_were_brought_are_named_by_their_last_folders(finished: Path, tmp_path: Path) -> None:
    brought = ["--teacher-weights", finished / "teacher", "--student-weights", finished / "trajectory"]
    assert hdistill(*SHORT, "--out", tmp_path / "second", *brought).code == 0
    assert hdistill("export", tmp_path / "second").code == 0
    _, text = card_of(tmp_path / "second/export")
    assert "# second\n" in text
    assert f"Teacher: `{finished.name}/teacher`, SHA-256" in text
    assert "| teacher |" not in text[text.index("## How it was made") :], "it was not trained in this run"
    assert str(tmp_path) not in text


# ---- for diffusers


def test_diffusers_makes_the_same_samples(exported: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = exported / "diffusers"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    student: Any = hd_zoo.from_pretrained(exported)
    noise = hd_zoo.seeded_noise(student.sample_shape, range(4))
    expected = hd_zoo.sample_jumps(student, noise, labels=torch.arange(4))
    found = pipeline(class_labels=[0, 1, 2, 3], latents=noise, output_type="latent").images
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert pipeline(class_labels=[5]).images[0].size == (8, 8)


def test_without_diffusers_it_is_said(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffusers" else real(name))
    answer = hdistill("export", finished, "--out", tmp_path / "folder")
    assert answer.code == 0, answer.err
    assert "no folder for diffusers: diffusers not installed: pip install diffusers" in answer.out
    assert not (tmp_path / "folder/diffusers").exists()
    assert "diffusers" not in card_of(tmp_path / "folder")[1]


# ---- whole or not at all


def test_an_export_is_replaced_and_nothing_else_is(exported: Path, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "folder"))
    (folder / "old").write_text("from before")
    assert hdistill("export", finished, "--out", folder).code == 0
    assert not (folder / "old").exists()
    for name in ("full", "run"):
        other = tmp_path / name
        other.mkdir()
        (other / ("recipe.json" if name == "run" else "letter.txt")).write_text("{}")
        before = contents(other)
        answer = hdistill("export", finished, "--out", other)
        assert answer.code == 2
        assert "holds something else than an export; choose another --out" in answer.line
        assert contents(other) == before
    assert hdistill("export", finished, "--out", finished).code == 2
    (tmp_path / "empty").mkdir()
    assert hdistill("export", finished, "--out", tmp_path / "empty").code == 0


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("evaluation.json", "is not evaluated yet; run: hdistill evaluate"),
        ("distribution/done.json", "is not finished (distribution); go on with: hdistill run digits --out"),
        ("distribution/model.safetensors", "no model.safetensors in"),
        ("recipe.json", "is not a run's folder"),
    ],
)
def test_an_unfinished_run_is_one_line(missing: str, message: str, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / missing).unlink()
    before = contents(copy)
    answer = hdistill("export", copy)
    assert answer.code == 2
    assert message in answer.line
    assert contents(copy) == before
    assert not list(tmp_path.rglob(f"{INCOMPLETE}*"))


def test_a_failure_on_the_way_leaves_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hd_trainer.sharing.folder.write_card", full)
    answer = hdistill("export", finished, "--out", tmp_path / "new/folder")
    assert answer.code == 2
    assert "No space left" in answer.line
    assert list((tmp_path / "new").iterdir()) == []


def test_an_impossible_licence_is_one_line(finished: Path, tmp_path: Path) -> None:
    answer = hdistill("export", finished, "--out", tmp_path / "folder", "--license", "mine: yes\nx")
    assert answer.code == 2
    assert "--license must be one of the hub's names" in answer.line
    assert not (tmp_path / "folder").exists()
