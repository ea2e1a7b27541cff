"""The command: help that teaches, and bad input that ends in one line, code 2 and nothing half-written."""

from __future__ import annotations

import ast
import inspect
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

import hd_trainer
import hd_zoo
from hd_trainer import checkpoint, evaluation
from hd_trainer.cli import _unframed
from hd_trainer.loop import Stopped
from hd_trainer.run import read_settings

Command = Callable[..., Any]
Contents = Callable[[Path], dict[str, bytes]]

#: The module: `hd_trainer.run` as an attribute is the function of that name.
RUN = sys.modules["hd_trainer.run"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# ---- help


def test_help_names_every_command_and_recipe(hdistill: Command) -> None:
    texts = {hdistill(*words).out for words in ((), ("--help",), ("-h",), ("help",))}
    assert len(texts) == 1
    text = texts.pop()
    for word in ("run", "train", "sample", "evaluate", "report"):
        assert f"hdistill {word} " in text
    assert "no download" in text
    assert hdistill().code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("run",),
        ("run", "digits"),
        ("train",),
        ("train", "teacher"),
        ("train", "trajectory", "digits"),
        ("sample",),
        ("evaluate",),
        ("report",),
    ],
)
def test_every_command_has_help(words: tuple[str, ...], hdistill: Command) -> None:
    answer = hdistill(*words, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert "usage: hdistill " + words[0] in answer.out


def test_the_help_of_a_run_teaches_every_setting(hdistill: Command) -> None:
    text = " ".join(hdistill("run", "digits", "--help").out.split())
    for flag, words in {
        "--out": "the run's folder",
        "--smoke": "in seconds",
        "--seed": "decides every random number of the run",
        "--model.width": "the model's own",
        "--trajectory.interval-share": "share of the samples with r != t",
        "--trajectory.optimizer.lr": "peak learning rate",
        "--distribution.student-every": "iterations per student update",
        "--distribution.adversary.pooling": "{attention,scorer,mean}",
        "--distribution.adversary.merge": "{logits,concatenate}",
        "--distribution.adversary.weighed": "{vectors,logits}",
        "--distribution.adversary.heads": "a divisor of head_width",
        "--evaluation.teacher-steps": "Euler steps",
        "--loop.checkpoint-every": "steps between resumable checkpoints",
    }.items():
        assert flag in text
        assert words in text, words
    assert "--recipe" not in text
    assert "--teacher-weights" not in text
    assert "--teacher-weights" in hdistill("train", "trajectory", "digits", "--help").out


def test_every_field_of_the_settings_is_documented() -> None:
    """Each line of help comes from the text under a field: here it is looked for in the source."""
    stages = [f"stages.{name}" for name in ("teacher", "trajectory", "distribution", "critic")]
    for module in ("settings", "loop", "optim", "evaluation", *stages):
        tree = ast.parse(inspect.getsource(sys.modules[f"hd_trainer.{module}"]))
        for kind in ast.walk(tree):
            if not isinstance(kind, ast.ClassDef) or not kind.name.endswith("Settings"):
                continue
            for field, after in zip(kind.body, [*kind.body[1:], None], strict=True):
                if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                    continue
                nested = "Settings" in ast.unparse(field.annotation)
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented or nested, f"{kind.name}.{field.target.id}"


def test_version(hdistill: Command) -> None:
    assert hdistill("--version").out == f"hdistill {hd_trainer.__version__}\n"


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rum",), "unknown command 'rum'; known: run, train, sample, evaluate, report (try hdistill --help)"),
        (("run",), "needs a recipe first; known: digits"),
        (("run", "--smoke"), "needs a recipe first"),
        (("run", "digit"), "unknown recipe 'digit' (did you mean 'digits'?); known: digits"),
        (("train", "stage1", "digits"), "unknown stage 'stage1'; known: teacher, trajectory, distribution"),
        (("train", "teacher"), "needs a recipe first"),
        (("run", "digits", "extra"), "extra"),
        (("run", "digits", "--seed"), "--seed"),
        (("run", "digits", "--seed", "-1"), "seed must be >= 0 and below 2^32; got -1"),
        (("run", "digits", "--seed", "4294967296"), "seed must be"),
        (
            ("run", "digits", "--trajectory.stepz", "5"),
            "Unrecognized options: --trajectory.stepz, 5; perhaps you meant --trajectory.steps",
        ),
        (("run", "digits", "--trajectory.steps", "x"), "--trajectory.steps"),
        (("run", "digits", "--trajectory.steps", "0"), "steps must be > 0"),
        (("run", "digits", "--trajectory.derivative", "autograd"), "'jvp', 'difference'"),
        (("run", "digits", "--trajectory.guidance-interval", "0.9", "0.1"), "0 <= low <= high <= 1"),
        (("run", "digits", "--trajectory.guidance-scale", "inf"), "guidance_scale must be >= 0 and finite"),
        (("run", "digits", "--teacher.optimizer.lr", "nan"), "lr and clip must be > 0"),
        (("run", "digits", "--distribution.levels", "0.5", "0.5"), "0 <= low < high <= 1"),
        (("run", "digits", "--distribution.adversary.layers", "blocks.9"), "no module 'blocks.9'; nearest:"),
        (("run", "digits", "--distribution.adversary.pooling", "max"), "'attention', 'scorer', 'mean'"),
        (("run", "digits", "--distribution.adversary.heads", "3"), "heads must divide head_width; got 3 and 64"),
        (
            ("run", "digits", "--distribution.adversary.weighed", "logits", "--distribution.adversary.heads", "2"),
            'weighed "logits" goes with heads 1',
        ),
        (("run", "digits", "--evaluation.teacher-steps"), "at least one number of steps"),
        (("run", "digits", "--evaluation.samples", "3"), "samples must be >= 10"),
        (("run", "digits", "--model.width", "30"), "width must be a multiple of 4"),
        (("run", "digits", "--model.name", "dit_nano"), "did you mean 'dit_nano_2'?"),
        (("run", "digits", "--device", "toaster"), 'try "auto"'),
        (("run", "digits", "--precision", "fp8"), "'auto', 'bf16', 'fp32'"),
        (("train", "trajectory", "digits", "--smoke"), "train that stage first, or name another folder"),
        (("train", "distribution", "digits", "--smoke"), "train that stage first, or name another folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], message: str, hdistill: Command, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = (*arguments, "--out", "new") if len(arguments) > 2 and arguments[-1] != "--seed" else arguments
    answer = hdistill(*given)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "3", "10"), "labels must lie in 0..9; got 10"),
        (("--labels", "-1"), "labels must lie in 0..9"),
        (("--count", "0"), "count and steps must be >= 1"),
        (("--steps", "0"), "count and steps must be >= 1"),
        (("--seed", "-1"), "seed must be"),
        (("--guidance-scale", "-2"), "guidance_scale must be"),
        (("--guidance-scale", "2"), "guidance_scale is for teachers"),
        (("--device", "toaster"), 'try "auto"'),
        (("--out", "."), "is a folder; give --out the name of a picture"),
        (("--out", "file/below.png"), "cannot write to file: "),
        (("--out", "/proc/nothing/here.png"), "choose another folder"),
    ],
)
def test_bad_requests_for_samples(
    arguments: tuple[str, ...],
    message: str,
    hdistill: Command,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file", "")
    answer = hdistill("sample", finished / "distribution", *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.line
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json in"),
    "cut weights": (
        lambda folder: write(folder / "model.safetensors", (folder / "model.safetensors").read_bytes()[:-99]),
        "is damaged or not safetensors",
    ),
    "a pickle": (lambda folder: write(folder / "model.safetensors", b"\x80\x04N." * 9), "is damaged or not"),
    "torn config": (lambda folder: write(folder / "config.json", '{"format":\n\n "hd'), "is not JSON"),
    "foreign config": (lambda folder: write(folder / "config.json", '{"a": 1}'), "not a model of this package"),
    "other network": (
        lambda folder: write(
            folder / "config.json", (folder / "config.json").read_text().replace('"depth": 4', '"depth": 3')
        ),
        "does not fit its config.json: unexpected blocks.3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_missing_and_corrupted_weights(
    damage: str, hdistill: Command, copy: Path, tmp_path: Path, short: list[str], contents: Contents
) -> None:
    act, message = DAMAGES[damage]
    act(copy / "teacher")
    out = tmp_path / "new"
    flags = short[2:]
    weights = ("--teacher-weights", copy / "teacher")
    for answer in (
        hdistill("train", "trajectory", "digits", *flags, *weights, "--out", out),
        hdistill("sample", copy / "teacher", "--out", out / "picture.png"),
    ):
        assert (answer.code, answer.out) == (2, "")
        assert message in answer.line
        assert not out.exists()
    before = contents(copy)
    if damage != "no config":  # without it there is no such stage to evaluate
        answer = hdistill("evaluate", copy)
        assert answer.code == 2
        assert message in answer.line
        assert contents(copy) == before


@pytest.mark.parametrize("stage", ["trajectory", "distribution"])
def test_weights_of_another_shape(stage: str, hdistill: Command, finished: Path, tmp_path: Path) -> None:
    foreign = hd_zoo.save_pretrained(hd_zoo.create_model("dit_micro_4", classes=10), tmp_path / "foreign")
    flags = ("--smoke", "--out", tmp_path / "new")
    if stage == "trajectory":
        flags = (*flags, "--teacher-weights", foreign)
    else:
        flags = (*flags, "--teacher-weights", finished / "teacher", "--student-weights", foreign)
    answer = hdistill("train", stage, "digits", *flags)
    assert answer.code == 2
    assert "is for images (1, 28, 28) of 10 classes, the data set 'digits' has (1, 8, 8)" in answer.line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_place_that_cannot_be_written(place: str, hdistill: Command, tmp_path: Path) -> None:
    write(tmp_path / "file", "mine")
    answer = hdistill("run", "digits", "--smoke", "--out", tmp_path / place)
    assert (answer.code, answer.out) == (2, "")
    assert "cannot write to" in answer.line
    assert "choose another folder" in answer.line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_a_run_that_has_become_read_only(
    command: str,
    hdistill: Command,
    copy: Path,
    short: list[str],
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(copy)

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hd_trainer.files.tempfile.TemporaryFile", refuse)
    answer = hdistill(*short, "--out", copy) if command == "run" else hdistill("evaluate", copy)
    assert (answer.code, answer.out) == (2, "")
    assert "Permission denied; choose another folder" in answer.line
    assert contents(copy) == before


def test_a_full_disk_is_one_line(
    hdistill: Command, tmp_path: Path, short: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    answer = hdistill(*short, "--out", tmp_path / "new")
    assert answer.code == 2
    last = answer.err.splitlines()[-1]
    assert last.startswith("hdistill: [Errno 28] No space left on device; check that")
    assert not list((tmp_path / "new").rglob("model.safetensors"))
    assert not list((tmp_path / "new/teacher/checkpoints").iterdir())


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        ("evaluate", None, "is not a run's folder (no recipe.json); make one with: hdistill run digits --out"),
        ("report", None, "is not a run's folder"),
        ("evaluate", "{", "recipe.json is not JSON"),
        ("evaluate", "[]", "recipe.json holds no JSON object"),
        ("evaluate", '{"recipe": "digits", "data": "digits", "x": 1}', "unknown setting(s) x"),
        ("report", '{"recipe": "digits"}', "recipe.json: "),
    ],
)
def test_a_folder_without_a_run(
    command: str, content: str | None, message: str, hdistill: Command, tmp_path: Path
) -> None:
    if content is not None:
        write(tmp_path / "recipe.json", content)
    answer = hdistill(command, tmp_path)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.line
    assert len(list(tmp_path.iterdir())) == (content is not None)


def test_a_run_without_stages_cannot_be_evaluated(hdistill: Command, copy: Path) -> None:
    for stage in ("teacher", "trajectory", "distribution"):
        shutil.rmtree(copy / stage)
    answer = hdistill("evaluate", copy)
    assert answer.code == 2
    assert "no trained stage in" in answer.line


BOXED = """\
╭─ Unrecognized options ─────────────╮
│ Unrecognized options: --trajectory │
│ .stepz, 5                          │
│ ────────────────────────────────── │
│ Perhaps you meant:                 │
│     --trajectory.steps INT         │
│         steps (default: 600)       │
│ ────────────────────────────────── │
│ For full helptext, run p --help    │
╰────────────────────────────────────╯
"""


def test_a_framed_message_is_read_in_every_encoding() -> None:
    expected = "Unrecognized options: --trajectory .stepz, 5; perhaps you meant --trajectory.steps"
    assert _unframed(BOXED) == expected
    plain = BOXED.replace("╭─ Unrecognized options ─────────────╮", " Unrecognized options\n ------------")
    for character, other in (("─", "-"), ("│", " "), ("╰", " "), ("╯", " ")):
        plain = plain.replace(character, other)
    assert plain.isascii()
    assert _unframed(plain) == expected


def test_every_error_is_one_line_whatever_it_says(hdistill: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise hd_trainer.UserError("two\nlines   here")

    monkeypatch.setattr(RUN, "read_settings", fail)
    assert hdistill("evaluate", "x").line == "hdistill: two lines here"


# ---- going on


def test_a_finished_run_trains_nothing_again(
    hdistill: Command, copy: Path, short: list[str], contents: Contents
) -> None:
    def trained() -> dict[str, Any]:
        kept = {name: content for name, content in contents(copy).items() if "/" in name}
        return {**kept, **{name: (copy / name).stat().st_mtime_ns for name in kept}}

    before = trained()
    answer = hdistill(*short, "--out", copy)
    assert answer.code == 0
    for stage in ("teacher", "trajectory", "distribution"):
        assert f"{stage}: done already ({copy / stage})" in answer.out
    assert f"Open {copy / 'report.html'}" in answer.out
    assert trained() == before


def test_a_folder_keeps_its_settings(hdistill: Command, copy: Path, short: list[str], contents: Contents) -> None:
    before = contents(copy)
    answer = hdistill(*short, "--trajectory.batch", "24", "--seed", "5", "--out", copy)
    assert answer.code == 2
    assert "holds a run with other settings (seed: 5 here, 0 there; trajectory.batch: 24 here, 16 there)" in (
        answer.line
    )
    assert "choose another --out or remove it" in answer.line
    assert contents(copy) == before


def test_a_setting_younger_than_the_run_has_its_default(hdistill: Command, copy: Path, short: list[str]) -> None:
    """A run that was made before a setting existed goes on, unless another value than its default is asked for."""
    recipe = json.loads((copy / "recipe.json").read_text())
    for name in ("heads", "merge", "weighed"):
        del recipe["distribution"]["adversary"][name]
    (copy / "recipe.json").write_text(json.dumps(recipe))
    answer = hdistill(*short, "--distribution.adversary.heads", "2", "--out", copy)
    assert answer.code == 2
    assert "holds a run with other settings (distribution.adversary.heads: 2 here, 1 there)" in answer.line
    assert hdistill(*short, "--out", copy).code == 0


def test_many_conflicts_are_counted(hdistill: Command, copy: Path) -> None:
    answer = hdistill("run", "digits", "--smoke", "--out", copy)
    assert answer.code == 2
    assert "more); choose another" in answer.line


def test_evaluation_settings_may_change(hdistill: Command, copy: Path, short: list[str]) -> None:
    changes = ("--evaluation.samples", "30", "--evaluation.student-steps", "1", "2", "--device", "cpu")
    answer = hdistill(*short, *changes, "--out", copy)
    assert answer.code == 0, answer.err
    assert read_settings(copy).evaluation.samples == 30
    assert answer.out.count("distribution") >= 2
    rows = evaluation_rows(copy)
    assert {row["samples"] for row in rows[1:]} == {30}
    assert [row["steps"] for row in rows if row["name"] == "distribution"] == [1, 2]


def evaluation_rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / evaluation.RESULTS).read_text())["rows"]


def test_evaluating_again_gives_the_same_scores(hdistill: Command, copy: Path) -> None:
    before = evaluation_rows(copy)
    answer = hdistill("evaluate", copy)
    assert answer.code == 0
    assert "FD-digits" in answer.out
    for one, other in zip(before, evaluation_rows(copy), strict=True):
        assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}


def test_stages_one_by_one_are_the_whole_run(
    hdistill: Command, finished: Path, tmp_path: Path, short: list[str]
) -> None:
    out = tmp_path / "new"
    for stage in ("teacher", "trajectory", "distribution"):
        answer = hdistill("train", stage, *short[1:], "--out", out)
        assert answer.code == 0, answer.err
        for name in ("model.safetensors", "config.json"):
            assert (out / stage / name).read_bytes() == (finished / stage / name).read_bytes()


def test_weights_from_elsewhere_are_taken(hdistill: Command, finished: Path, tmp_path: Path, short: list[str]) -> None:
    flags = (*short[1:], "--out", tmp_path / "new")
    teacher = ("--teacher-weights", finished / "teacher")
    student = ("--student-weights", finished / "teacher")
    assert hdistill("train", "trajectory", *flags, *teacher).code == 0
    weights = "trajectory/model.safetensors"
    assert (tmp_path / "new" / weights).read_bytes() == (finished / weights).read_bytes()
    # Stage 2 straight from the teacher: another start, another end.
    assert hdistill("train", "distribution", *flags, *teacher, *student).code == 0
    weights = "distribution/model.safetensors"
    assert (tmp_path / "new" / weights).read_bytes() != (finished / weights).read_bytes()


def test_a_stage_is_not_gone_on_with_from_other_weights(
    hdistill: Command, finished: Path, copy: Path, short: list[str], contents: Contents
) -> None:
    """Same shape, other values: the folder was begun from one teacher and is now given another."""
    flags = (*short[1:], "--out", copy)
    (copy / "trajectory" / "done.json").unlink()
    before = contents(copy)
    result = hdistill("train", "trajectory", *flags, "--teacher-weights", finished / "distribution")
    assert result.code == 2
    assert "was begun from another teacher" in result.err
    assert contents(copy) == before
    assert hdistill("train", "trajectory", *flags, "--teacher-weights", finished / "teacher").code == 0


def test_stopped_is_130(hdistill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Stopped("teacher stopped after step 3 of 5; the same command goes on from there")

    monkeypatch.setattr(RUN, "train_stage", stop)
    answer = hdistill("run", "digits", "--smoke", "--out", tmp_path / "new")
    assert answer.code == 130
    assert "stopped after step 3" in answer.line

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RUN, "train_stage", interrupt)
    answer = hdistill("run", "digits", "--smoke", "--out", tmp_path / "new")
    assert answer.code == 130
    assert "interrupted" in answer.line


# ---- as a process of its own


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "hd_trainer", "run", "digit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hdistill: unknown recipe 'digit' (did you mean 'digits'?); known: digits\n"


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_goes_on_where_it_was(
    hdistill: Command, finished: Path, tmp_path: Path, short: list[str]
) -> None:
    out = tmp_path / "new"
    command = [sys.executable, "-m", "hd_trainer", "train", "teacher", *short[1:], "--out", str(out)]
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
    assert "the same command goes on" in errors.splitlines()[-1]
    assert "Traceback" not in printed + errors
    assert hdistill("train", "teacher", *short[1:], "--out", out).code == 0
    weights = "teacher/model.safetensors"
    assert (out / weights).read_bytes() == (finished / weights).read_bytes()


@pytest.mark.slow
def test_the_smoke_form_takes_less_than_a_minute(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hd_trainer", "run", "digits", "--smoke"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    assert (tmp_path / "runs/digits-smoke/report.html").stat().st_size > 20_000
    assert "FD-digits" in done.stdout
