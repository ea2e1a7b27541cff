"""Several runs on one page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_report import Page, picture
from trainer_helpers import SHORT, contents, hdistill

from hd_trainer import UserError
from hd_trainer.report import run_names
from hd_trainer.report.compare import differing

#: Most cases are whole runs: they are tried once, beside all other packages.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def other(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second run, with the first one's teacher and stage 1 and another discriminator."""
    folder = tmp_path_factory.mktemp("other") / "gap"
    brought = ["--teacher-weights", finished / "teacher", "--student-weights", finished / "trajectory"]
    pooling = ["--distribution.discriminator.pooling", "mean", "--distribution.optimizer.lr", "0.05"]
    answer = hdistill(*SHORT, "--out", folder, *brought, *pooling)
    assert answer.code == 0, answer.err
    return folder


def test_two_runs_side_by_side(finished: Path, other: Path, tmp_path: Path) -> None:
    before = contents(finished) | contents(other)
    out = tmp_path / "new" / "compare.html"
    answer = hdistill("report", finished, other, "--out", out)
    assert (answer.code, answer.out) == (0, f"Wrote {out}\n"), answer.err
    assert contents(finished) | contents(other) == before
    page = Page(out.read_text(encoding="utf-8"))
    assert page.open == []
    assert all(not (attributes.get("src") or "data:").startswith("http") for _, attributes in page.tags)
    # The tables: every row of both, the settings that differ, the seconds.
    names = ["run0/digits", "other0/gap"]
    rows = {
        name: json.loads((run / "evaluation.json").read_text())["rows"]
        for name, run in zip(names, (finished, other), strict=True)
    }
    header, *lines = page.cells
    assert header[:2] == ["run", "stage"]
    expected = [(name, f"{row['fd']:.2f}", f"{row['recall']:.3f}") for name in names for row in rows[name]]
    assert [(line[0], line[5], line[8]) for line in lines[: len(expected)]] == expected
    rest = {line[0]: line[1:] for line in lines[len(expected) :]}
    assert rest["setting"] == names
    assert rest["distribution.discriminator.network.pooling"] == ["attention", "mean"]
    assert rest["teacher_weights"] == ["", str((finished / "teacher").resolve())]
    assert not any(setting.startswith(("teacher.", "trajectory.")) for setting in rest)
    # The pictures: one noise, two students.
    images = [picture(attributes) for attributes in page.named("img")]
    assert len(images) == 2
    assert images[0].size == images[1].size
    assert images[0].tobytes() != images[1].tobytes()
    # Overlaid curves: both runs in the legend of stage 2, the first alone before.
    assert len(page.named("svg")) == 3
    assert "The same noise" in page.headings


def test_runs_on_other_data_are_said_not_to_compare(finished: Path, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "import numpy as np\nfrom hd_trainer.data import images_from_arrays\n"
        "def data():\n"
        "    rng = np.random.default_rng(0)\n"
        "    return images_from_arrays('mine', rng.integers(0, 255, (60, 6, 6), dtype=np.uint8))\n"
    )
    short = [*SHORT[:2], "--data", f"{script}:data", *SHORT[2:]]
    assert hdistill(*short, "--out", tmp_path / "mine").code == 0
    answer = hdistill("report", finished, tmp_path / "mine", "--out", tmp_path / "c.html")
    assert answer.code == 0, answer.err
    words = " ".join((tmp_path / "c.html").read_text(encoding="utf-8").split())
    assert "different data or extractors" in words
    assert "samples of different sizes: their noise differs" in words


def test_one_run_goes_where_it_is_asked_to(finished: Path, tmp_path: Path) -> None:
    before = contents(finished)
    answer = hdistill("report", finished, "--out", tmp_path / "page.html")
    assert (answer.code, answer.out) == (0, f"Wrote {tmp_path / 'page.html'}\n")
    assert contents(finished) == before


def test_wrong_calls_are_one_line(finished: Path, tmp_path: Path) -> None:
    unfinished = Path(shutil.copytree(finished, tmp_path / "copy"))
    (unfinished / "evaluation.json").unlink()
    for arguments, message in (
        ([finished, finished], "is given twice"),
        ([finished, tmp_path / "nothing"], "is not a run's folder"),
        ([finished, unfinished], "is not evaluated yet"),
        ([finished, "--out", tmp_path], "is a folder; give --out the name of a page"),
        ([], ""),
    ):
        out = [] if "--out" in arguments or not arguments else ["--out", tmp_path / "c.html"]
        answer = hdistill("report", *arguments, *out)
        assert answer.code == 2
        assert message in answer.line
        assert not (tmp_path / "c.html").exists()


def test_names_are_as_short_as_they_can_be() -> None:
    assert run_names([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert run_names([Path("runs/seeds/0"), Path("runs/digits")]) == ["seeds/0", "digits"]
    assert run_names([Path("x/digits"), Path("y/digits")]) == ["x/digits", "y/digits"]
    with pytest.raises(UserError, match="is given twice"):
        run_names([Path("runs/../runs/a"), Path("runs/a")])


def test_only_what_differs_is_listed() -> None:
    settings = {
        "a": {"seed": 0, "teacher": {"steps": 5, "betas": [0.9, 0.99]}, "same": None},
        "b": {"seed": 1, "teacher": {"steps": 5, "betas": [0.5, 0.99]}, "same": None},
        "c": {"seed": 1, "teacher": {"steps": 5, "betas": [0.5, 0.99], "ema": 0.9}, "same": None},
    }
    assert differing(settings) == [
        ("seed", ["0", "1", "1"]),
        ("teacher.betas", ["0.9 0.99", "0.5 0.99", "0.5 0.99"]),
        ("teacher.ema", ["", "", "0.9"]),
    ]
