"""Runs from disk to disk: going on, weights from elsewhere, what is loaded how often, folders of the first version."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import SHORT, contents, hdistill, with_flags

import hd_zoo
from hd_trainer import cli, pipeline
from hd_trainer.evaluation import RESULTS
from hd_trainer.report.page import command_line
from hd_trainer.run_folder import read_settings
from hd_trainer.signals import Stopped
from hd_trainer.stages import STAGES

FIRST_FORMAT = Path(__file__).parent / "data" / "run_of_0.1.0"
WEIGHTS = "model.safetensors"

#: The whole way with networks of one block in two steps a stage, each with one image row.
TINY = [
    *("run", "digits", "--smoke", "--precision", "fp32", "--model.width", "16", "--model.depth", "1"),
    *("--teacher.steps", "2", "--trajectory.steps", "2", "--distribution.steps", "2", "--teacher.batch", "8"),
    *("--trajectory.batch", "8", "--distribution.batch", "8", "--distribution.discriminator.layers", "blocks.0"),
    *("--evaluation.samples", "10", "--evaluation.teacher-steps", "1", "--evaluation.timing-repeats", "1"),
]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A finished run of the first format, to be changed at will."""
    return Path(shutil.copytree(FIRST_FORMAT, tmp_path / "old"))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The table of a run."""
    found: list[dict[str, Any]] = json.loads((folder / RESULTS).read_text())["rows"]
    return found


def flags_of(folder: Path) -> list[str]:
    """The flags that ask for a run's settings once more."""
    return command_line(read_settings(folder), {}).split()[3:]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two stages' folders hold the same weights to the last bit."""
    return (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()


# ---- going on


def test_a_finished_run_trains_nothing_again(copy: Path) -> None:
    def trained() -> dict[str, tuple[bytes, int]]:
        kept = {name: content for name, content in contents(copy).items() if "/" in name}
        return {name: (content, (copy / name).stat().st_mtime_ns) for name, content in kept.items()}

    before = trained()
    answer = hdistill(*SHORT, "--out", copy)
    assert answer.code == 0
    for stage in STAGES:
        assert f"{stage}: done already ({copy / stage})" in answer.out
    assert f"Open {copy / 'report.html'}" in answer.out
    assert trained() == before


def test_a_folder_keeps_its_settings(copy: Path) -> None:
    before = contents(copy)
    answer = hdistill(*with_flags(SHORT, "--trajectory.batch", "24"), "--seed", "5", "--out", copy)
    assert answer.code == 2
    assert "holds a run with other settings (seed: 5 here, 0 there; trajectory.batch: 24 here, 16 there)" in (
        answer.line
    )
    assert "choose another --out or remove it" in answer.line
    assert contents(copy) == before


def test_a_setting_younger_than_the_run_has_its_default(copy: Path) -> None:
    """A run that was made before a setting existed goes on, unless another value than its default is asked for."""
    recipe = json.loads((copy / "recipe.json").read_text())
    for name in ("num_heads", "merge", "pool_over"):
        del recipe["distribution"]["discriminator"]["network"][name]
    (copy / "recipe.json").write_text(json.dumps(recipe))
    answer = hdistill(*SHORT, "--distribution.discriminator.num-heads", "2", "--out", copy)
    assert answer.code == 2
    expected = "holds a run with other settings (distribution.discriminator.network.num_heads: 2 here, 1 there)"
    assert expected in answer.line
    assert hdistill(*SHORT, "--out", copy).code == 0


def test_many_conflicts_are_counted(copy: Path) -> None:
    answer = hdistill("run", "digits", "--smoke", "--out", copy)
    assert answer.code == 2
    assert "more); choose another" in answer.line


def test_evaluation_settings_may_change(copy: Path) -> None:
    changes = ("--evaluation.samples", "30", "--evaluation.student-steps", "1", "2", "--device", "cpu")
    answer = hdistill(*with_flags(SHORT, *changes), "--out", copy)
    assert answer.code == 0, answer.err
    assert read_settings(copy).evaluation.samples == 30
    assert answer.out.count("distribution") >= 2
    assert {row["samples"] for row in rows(copy)[1:]} == {30}
    assert [row["steps"] for row in rows(copy) if row["name"] == "distribution"] == [1, 2]


def test_evaluating_again_gives_the_same_scores(copy: Path) -> None:
    before = rows(copy)
    answer = hdistill("evaluate", copy)
    assert answer.code == 0
    assert "FD-digits" in answer.out
    for one, other in zip(before, rows(copy), strict=True):
        assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}


def test_stopped_is_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Stopped("teacher stopped after step 3 of 5; the same command goes on from there")

    monkeypatch.setattr(pipeline, "train_stage", stop)
    answer = hdistill("run", "digits", "--smoke", "--out", tmp_path / "new")
    assert answer.code == 130
    assert "stopped after step 3" in answer.line

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train_stage", interrupt)
    answer = hdistill("run", "digits", "--smoke", "--out", tmp_path / "new")
    assert answer.code == 130
    assert "interrupted" in answer.line


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_goes_on_where_it_was(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    command = [sys.executable, "-m", "hd_trainer", "train", "teacher", *SHORT[1:], "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 120
        # The file is there once the loop has begun, and with it the handlers.
        while not (out / "teacher/checkpoints/000005/state.json").exists() and time.monotonic() < limit:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGTERM)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "the same command" in errors.splitlines()[-1]
    assert "Traceback" not in printed + errors
    assert hdistill("train", "teacher", *SHORT[1:], "--out", out).code == 0
    assert same_weights(out / "teacher", finished / "teacher")


# ---- stages and weights


def test_stages_one_by_one_are_the_whole_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    for stage in STAGES:
        answer = hdistill("train", stage, *SHORT[1:], "--out", out)
        assert answer.code == 0, answer.err
        assert same_weights(out / stage, finished / stage)
        assert (out / stage / "config.json").read_bytes() == (finished / stage / "config.json").read_bytes()


def test_one_stage_takes_weights_from_elsewhere(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    teacher = ("--teacher-weights", finished / "teacher")
    assert hdistill("train", "trajectory", *SHORT[1:], "--out", out, *teacher).code == 0
    assert same_weights(out / "trajectory", finished / "trajectory")
    # Stage 2 straight from the teacher: another start, another end.
    student = ("--student-weights", finished / "teacher")
    assert hdistill("train", "distribution", *SHORT[1:], "--out", out, *teacher, *student).code == 0
    assert not same_weights(out / "distribution", finished / "distribution")


def test_a_run_takes_weights_from_elsewhere_and_trains_only_the_rest(finished: Path, tmp_path: Path) -> None:
    """The GAP ablation of the help: teacher and stage 1 are those of another run."""
    out = tmp_path / "gap"
    brought = ("--teacher-weights", finished / "teacher", "--student-weights", finished / "trajectory")
    command = (*SHORT, "--distribution.discriminator.pooling", "mean", *brought, "--out", out)
    before = contents(finished)
    answer = hdistill(*command)
    assert answer.code == 0, answer.err
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["distribution"]
    assert [(row["name"], row["steps"]) for row in rows(out)] == [(row["name"], row["steps"]) for row in rows(finished)]
    for ours, theirs in zip(rows(out)[:5], rows(finished)[:5], strict=True):  # all but stage 2's
        assert {**ours, "images_per_second": 0} == {**theirs, "images_per_second": 0}
    assert f"--teacher {(finished / 'teacher').resolve()}" in (out / "report.html").read_text()
    assert contents(finished) == before
    # The folder remembers where its weights came from.
    assert hdistill("report", out).code == 0
    assert hdistill("sample", out, "--out", tmp_path / "a.png").code == 0
    assert "distribution: done already" in hdistill(*command).out


def test_with_the_same_weights_a_run_is_the_run(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    assert hdistill(*SHORT, "--teacher-weights", finished / "teacher", "--out", out).code == 0
    for stage in STAGES[1:]:
        assert same_weights(out / stage, finished / stage)


def test_a_stage_is_not_gone_on_with_from_other_weights(finished: Path, copy: Path, tmp_path: Path) -> None:
    """Same shape, other values: the folder was begun from one teacher and is now given another."""
    flags = (*SHORT[1:], "--out", copy)
    (copy / "trajectory" / "done.json").unlink()
    before = contents(copy)
    other = hd_zoo.from_pretrained(finished / "teacher")
    with torch.no_grad():
        next(other.parameters()).mul_(0.5)
    folder = hd_zoo.save_pretrained(other, tmp_path / "other")
    result = hdistill("train", "trajectory", *flags, "--teacher-weights", folder)
    assert result.code == 2
    assert "was begun from another teacher" in result.line
    assert contents(copy) == before
    assert hdistill("train", "trajectory", *flags, "--teacher-weights", finished / "teacher").code == 0


def noise_predicting_teacher(folder: Path) -> Path:
    """A DiT that predicts the noise of a discrete diffusion, behind its converter."""
    network = hd_zoo.create_model("dit_nano_2", classes=10, width=16, depth=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return hd_zoo.save_pretrained(hd_zoo.DiffusedNoise(network), folder)


def test_a_noise_predicting_network_behind_its_converter_is_a_full_teacher(tmp_path: Path) -> None:
    teacher, out = noise_predicting_teacher(tmp_path / "dit"), tmp_path / "run"
    before = contents(teacher)
    answer = hdistill(
        *with_flags(TINY, "--distribution.discriminator.layers", "blocks.0", "blocks.1"),
        *("--out", out, "--teacher-weights", teacher, "--trajectory.guidance.scale", "1.5"),
    )
    assert answer.code == 0, answer.err
    assert contents(teacher) == before
    for stage in STAGES[1:]:
        student = hd_zoo.from_pretrained(out / stage)
        assert isinstance(student, hd_zoo.DiffusedNoise)
        assert student.takes_r
    assert [row["name"] for row in rows(out)] == ["held-out data", "teacher", "trajectory", "distribution"]
    page = (out / "report.html").read_text()
    # The token weights of the layers inside.
    assert page.count("<h3>blocks.") == 2
    assert hdistill("evaluate", out).code == 0
    assert hdistill("report", out).code == 0
    for number, folder in enumerate((out, teacher)):
        assert hdistill("sample", folder, "--count", "3", "--out", tmp_path / f"{number}.png").code == 0


# ---- what is loaded, and how often


@pytest.mark.parametrize("command", ["run", "train", "evaluate", "report"])
def test_a_command_makes_one_context_and_loads_the_data_once(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, calls = tmp_path / "mine.py", tmp_path / "calls"
    data.write_text(
        "from hd_trainer.data import load_digits\n\n\n"
        "def data():\n"
        f"    with open({str(calls)!r}, 'a') as file:\n"
        "        file.write('loaded ')\n"
        "    return load_digits()\n"
    )
    flags = (*TINY[1:], "--data", data, "--out", tmp_path / "run")
    arguments: dict[str, tuple[object, ...]] = {"run": ("run", *flags), "train": ("train", "teacher", *flags)}
    if command in ("evaluate", "report"):
        assert hdistill("run", *flags).code == 0
        calls.unlink()
    contexts: list[Any] = []
    make_context: Callable[..., Any] = pipeline.make_context

    def noting(*args: Any, **kwargs: Any) -> Any:
        contexts.append(make_context(*args, **kwargs))
        return contexts[-1]

    monkeypatch.setattr(pipeline, "make_context", noting)
    answer = hdistill(*arguments.get(command, (command, tmp_path / "run")))
    assert answer.code == 0, answer.err
    assert len(contexts) == 1
    assert calls.read_text() == "loaded "


def test_nothing_but_the_command_line_makes_a_context() -> None:
    """The stages, the evaluation and the report are handed one."""
    source = Path(cli.__file__).parent
    users = {
        path.relative_to(source).as_posix() for path in source.rglob("*.py") if "make_context(" in path.read_text()
    }
    assert users == {"context.py", "pipeline.py"}


# ---- runs of the first format


def test_a_run_of_the_first_format_is_evaluated_reported_and_sampled(old: Path, tmp_path: Path) -> None:
    before = {row["name"]: row["fd"] for row in rows(old)}
    trained = {name: content for name, content in contents(old).items() if "/" in name}
    assert hdistill("evaluate", old).code == 0
    floor, *generated = rows(old)
    assert floor["name"] == "held-out data"
    # The networks are read as they were: the same noise, that of the first sampling seed, gives the same distances.
    for row in generated:
        assert row["per_seed"][0]["fd"] == pytest.approx(before[row["name"]], rel=1e-3)
    assert all(row["deviation"] is not None for row in rows(old))
    assert hdistill("report", old).code == 0
    assert hdistill("sample", old, "--count", "3", "--out", tmp_path / "a.png").code == 0
    assert {name: content for name, content in contents(old).items() if "/" in name} == trained


def test_stages_of_the_first_format_are_weights_for_a_new_run(tmp_path: Path) -> None:
    weights = ("--teacher-weights", FIRST_FORMAT / "teacher", "--student-weights", FIRST_FORMAT / "trajectory")
    assert hdistill(*TINY, *weights, "--out", tmp_path / "new").code == 0


def test_an_unfinished_run_of_the_first_format_is_not_gone_on_with(old: Path) -> None:
    (old / "distribution" / "done.json").unlink()
    checkpoint = old / "distribution" / "checkpoints" / "000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 2, "seconds": 1.0, "sums": {}}')
    before = contents(old)
    answer = hdistill("run", "digits", *flags_of(old), "--out", old)
    assert answer.code == 2
    assert "was begun by an earlier version" in answer.line
    assert "choose another --out" in answer.line
    assert contents(old) == before


def test_a_finished_run_of_the_first_format_is_finished(old: Path) -> None:
    answer = hdistill("run", "digits", *flags_of(old), "--out", old)
    assert answer.code == 0, answer.err
    assert answer.out.count("done already") == 3
