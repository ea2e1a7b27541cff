"""The command: help that teaches, and bad input that ends in one line, code 2 and nothing half-written."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from trainer_helpers import SHORT, contents, hdistill

import hd_trainer
import hd_zoo
from hd_trainer import files, load_recipe, pipeline
from hd_trainer.options import SampleOptions, _unframed
from hd_trainer.settings import to_json


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def write(path: Path, content: str | bytes) -> None:
    """A file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


# ---- help


def test_help_names_every_command_and_recipe() -> None:
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
    ids=" ".join,
)
def test_every_command_has_help(words: tuple[str, ...]) -> None:
    answer = hdistill(*words, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert "usage: hdistill " + words[0] in answer.out


def test_the_help_of_a_run_teaches_every_setting() -> None:
    text = " ".join(hdistill("run", "digits", "--help").out.replace("│", " ").split())
    for flag, words in {
        "--out": "the run's folder",
        "--smoke": "in seconds",
        "--seed": "decides every random number of the run",
        "--teacher": "a teacher that is trained already",
        "--teacher-weights": "another name of --teacher, for a folder",
        "--student-weights": "folder of the student that stage 2 starts from",
        "--model.width": "the model's own",
        "--trajectory.times.interval-share": "share of the samples with r != t",
        "--trajectory.optimizer.lr": "peak learning rate",
        "--distribution.student-update-every": "iterations per student update",
        "--distribution.discriminator.pooling": "{attention,scorer,mean}",
        "--distribution.discriminator.merge": "{logits,concatenate}",
        "--distribution.discriminator.pool-over": "{features,logits}",
        "--distribution.discriminator.num-heads": "a divisor of head_width",
        "--distribution.noise-levels.low": "lowest level, in [0, high)",
        "--evaluation.teacher-steps": "Euler steps",
        "--loop.checkpoint-every": "steps between resumable checkpoints",
    }.items():
        assert flag in text
        assert words in text, words
    assert "--recipe" not in text
    assert "--teacher-weights" in hdistill("train", "trajectory", "digits", "--help").out


def setting_modules() -> set[str]:
    """The trainer's modules that define settings."""
    source = Path(hd_trainer.__file__).parent
    found = (
        path for path in source.rglob("*.py") if "Settings:\n" in path.read_text() or "Options:\n" in path.read_text()
    )
    return {".".join(("hd_trainer", *path.relative_to(source).with_suffix("").parts)) for path in found}


@pytest.mark.parametrize("name", sorted(setting_modules()))
def test_every_field_of_the_settings_is_documented(name: str) -> None:
    """Each line of help comes from the text under a field: here it is looked for in the source."""
    tree = ast.parse(inspect.getsource(importlib.import_module(name)))
    for kind in ast.walk(tree):
        if not isinstance(kind, ast.ClassDef) or not kind.name.endswith(("Settings", "Options")):
            continue
        for field, after in zip(kind.body, [*kind.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            nested = "Settings" in ast.unparse(field.annotation)
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented or nested, f"{kind.name}.{field.target.id}"


def test_version() -> None:
    assert hdistill("--version").out == f"hdistill {hd_trainer.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["train", "--help"],
        ["train", "teacher", "--help"],
        ["sample", "--help"],
        ["evaluate", "--help"],
        ["report", "--help"],
    ],
)
def test_help_waits_for_no_large_library(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom hd_trainer.cli import main\n"
        "try:\n"
        f"    code = main({arguments!r})\n"
        "except SystemExit as stop:  # tyro's way to end after its help\n"
        "    code = stop.code\n"
        "large = {'torch', 'sklearn', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "print('loaded:', sorted(large))\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "loaded: []"


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "rum",
            "unknown command 'rum'; known: run, new, train, sample, evaluate, report, export, list, emoji (try ",
        ),
        ("run", "needs a recipe first; known: digits"),
        ("run --smoke", "needs a recipe first"),
        ("run digit", "unknown recipe 'digit' (did you mean 'digits'?); known: digits"),
        ("train stage1 digits", "unknown stage 'stage1'; known: teacher, trajectory, distribution"),
        ("train teacher", "needs a recipe first"),
        ("run digits extra", "extra"),
        ("run digits --seed", "--seed"),
        ("run digits --seed -1", "seed must be a whole number >= 0 and below 2^32; got -1"),
        ("run digits --seed 4294967296", "seed must be"),
        (
            "run digits --trajectory.stepz 5",
            "Unrecognized options: --trajectory.stepz, 5; perhaps you meant --trajectory.steps",
        ),
        ("run digits --trajectory.steps x", "--trajectory.steps"),
        ("run digits --trajectory.steps 0", "steps must be a whole number from 1 to 100,000,000; got 0"),
        ("run digits --trajectory.meanflow.derivative autograd", "'jvp', 'difference'"),
        ("run digits --trajectory.guidance.interval 0.9 0.1", "0 <= low <= high <= 1"),
        ("run digits --trajectory.guidance.scale inf", "scale must be >= 0"),
        ("run digits --teacher.optimizer.lr nan", "lr must be > 0 and finite; got nan"),
        ("run digits --teacher.times.interval-share 0.5", "times.interval_share of a teacher must be 0"),
        ("run digits --distribution.noise-levels.low 0.99", "0 <= low < high <= 1"),
        ("run digits --distribution.discriminator.layers blocks.9", "no module 'blocks.9'; nearest:"),
        ("run digits --distribution.discriminator.pooling max", "'attention', 'scorer', 'mean'"),
        ("run digits --distribution.discriminator.num-heads 3", "num_heads must divide head_width; got 3 and 64"),
        (
            "run digits --distribution.discriminator.pool-over logits --distribution.discriminator.num-heads 2",
            'pool_over "logits" goes with num_heads 1',
        ),
        ("run digits --evaluation.teacher-steps", "at least one number of steps"),
        ("run digits --evaluation.samples 3", "samples must be a whole number from 10 to"),
        ("run digits --model.width 30", "width must be a multiple of 4"),
        ("run digits --model.name dit_nano", "did you mean 'dit_nano_2'?"),
        ("run digits --device toaster", 'try "auto"'),
        ("run digits --device meta", 'device "meta" holds no numbers; try "auto"'),
        ("run digits --precision fp8", "'auto', 'bf16', 'fp32'"),
        ("run digits --data cifar", "unknown data set 'cifar'; known: digits, fashion, emoji, folder:PATH, npz:FILE,"),
        (
            "run digits --teacher-weights nowhere",
            "no network 'nowhere': there is no such folder. A teacher is one of FOLDER,",
        ),
        ("run digits --student-weights nowhere", "no config.json in nowhere"),
        ("train trajectory digits --smoke", "train that stage first, or name another folder"),
        ("train distribution digits --smoke", "train that stage first, or name another folder"),
        # Names of the first version: the new ones are near.
        ("run digits --trajectory.interval-share 0.5", "--trajectory.times.interval-share"),
        ("run digits --distribution.student-every 2", "--distribution.student-update-every"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = arguments.split()
    given = [*words, "--out", "new"] if len(words) > 2 and words[-1] != "--seed" else words
    answer = hdistill(*given)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.line
    assert len(answer.line) < 700
    assert list(tmp_path.iterdir()) == []


# ---- numbers

NAN, ENDLESS, HUGE = "nan", "1e400", "9" * 25
#: Numbers that a setting may well take.
FINE = {("teacher.times.mean", "-1"), ("trajectory.times.mean", "-1")}
FINE |= {(f"{name}.clip", ENDLESS) for name in ("teacher.optimizer", "trajectory.optimizer", "distribution.optimizer")}
FINE |= {(f"distribution.{name}.clip", ENDLESS) for name in ("fake_score_optimizer", "discriminator.optimizer")}


def numeric_settings(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Path and numbers of every numeric setting; a None among them stands for a number."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numeric_settings(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], (int, float)):
            yield prefix + name, value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, [value]
        elif value is None and name in ("width", "depth", "samples"):
            yield prefix + name, [1]


NUMERIC = dict(numeric_settings({k: v for k, v in to_json(load_recipe("digits", smoke=True)).items() if k != "format"}))


def flag_of(path: str) -> str:
    """The flag of a setting; the discriminator's network has its flags beside the discriminator's own."""
    return "--" + path.replace("discriminator.network.", "discriminator.").replace("_", "-")


def test_every_numeric_flag_of_the_help_is_walked_over() -> None:
    words = hdistill("run", "digits", "--help").out.replace("│", " ").split()
    kinds = ("INT", "FLOAT", "{None}|INT", "[INT")
    flags = {word for word, kind in itertools.pairwise(words) if word.startswith("--") and kind in kinds}
    assert flags == {flag_of(path) for path in NUMERIC}
    assert len(flags) > 60


@pytest.mark.parametrize("path", NUMERIC)
def test_impossible_numbers_of_a_run_are_one_line(path: str, tmp_path: Path) -> None:
    numbers = NUMERIC[path]
    wrong = ["-1", HUGE, NAN] if all(isinstance(one, int) for one in numbers) else ["-1", ENDLESS, NAN]
    for value in wrong:
        if (path, value) in FINE:
            continue
        answer = hdistill("run", "digits", "--smoke", flag_of(path), *[value] * len(numbers), "--out", tmp_path / "new")
        assert (answer.code, answer.out) == (2, ""), value
        assert path.rsplit(".", 1)[-1].replace("_", "-") in answer.line.replace("_", "-"), value
        assert len(answer.line) < 300
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["count", "seed", "steps", "guidance_scale", "labels"])
@pytest.mark.parametrize("value", ["-1", HUGE, NAN, ENDLESS, "0x10"])
def test_impossible_numbers_of_a_sample_are_one_line(name: str, value: str, finished: Path, tmp_path: Path) -> None:
    flag = "--" + name.replace("_", "-")
    answer = hdistill("sample", finished, flag, value, "--out", tmp_path / "a.png")
    assert (answer.code, answer.out) == (2, "")
    assert name in answer.line or flag in answer.line
    assert len(answer.line) < 300
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_of_a_sample_are_these() -> None:
    numeric = {one.name for one in dataclasses.fields(SampleOptions) if {"int", "float"} & set(_words(str(one.type)))}
    assert numeric == {"count", "seed", "steps", "guidance_scale", "labels"}


def _words(text: str) -> list[str]:
    return "".join(character if character.isalnum() else " " for character in text).split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "3", "10"), "labels must lie in 0..9; got 10"),
        (("--labels", "-1"), "labels must lie in 0..9"),
        (("--count", "0"), "count must be a whole number from 1 to 100,000; got 0"),
        (("--steps", "0"), "steps must be a whole number from 1 to 10,000; got 0"),
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
    arguments: tuple[str, ...], message: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file", "")
    answer = hdistill("sample", finished / "distribution", *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.line
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# ---- damaged folders

Damage = tuple[Callable[[Path], Any], str]
DAMAGES: dict[str, Damage] = {
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
def test_missing_and_corrupted_weights(damage: str, copy: Path, tmp_path: Path) -> None:
    act, message = DAMAGES[damage]
    act(copy / "teacher")
    out = tmp_path / "new"
    weights = ("--teacher-weights", copy / "teacher")
    for answer in (
        hdistill("train", "trajectory", *SHORT[1:], *weights, "--out", out),
        hdistill(*SHORT, *weights, "--out", out),
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
def test_weights_of_another_shape(stage: str, finished: Path, tmp_path: Path) -> None:
    foreign = hd_zoo.save_pretrained(hd_zoo.create_model("dit_micro_4", classes=10), tmp_path / "foreign")
    teacher, student = ("teacher", foreign), ("student", foreign)
    given = [teacher] if stage == "trajectory" else [("teacher", finished / "teacher"), student]
    weights = [word for name, folder in given for word in (f"--{name}-weights", folder)]
    for command in (("train", stage, "digits", "--smoke"), ("run", "digits", "--smoke")):
        answer = hdistill(*command, *weights, "--out", tmp_path / "new")
        assert answer.code == 2
        assert "is for samples (1, 28, 28) of 10 classes, the data set 'digits' has (1, 8, 8) and 10" in answer.line
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nothing"])
def test_a_place_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    write(tmp_path / "file", "mine")
    answer = hdistill("run", "digits", "--smoke", "--out", tmp_path / place)
    assert (answer.code, answer.out) == (2, "")
    assert "cannot write to" in answer.line
    assert "choose another folder" in answer.line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "evaluate"])
def test_a_run_that_has_become_read_only(command: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(copy)

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    answer = hdistill(*SHORT, "--out", copy) if command == "run" else hdistill("evaluate", copy)
    assert (answer.code, answer.out) == (2, "")
    assert "Permission denied; choose another folder" in answer.line
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        ("evaluate", None, "is not a run's folder (no recipe.json); make one with: hdistill run digits --out"),
        ("report", None, "is not a run's folder"),
        ("evaluate", "{", "recipe.json is not JSON"),
        ("evaluate", "[]", "recipe.json holds no JSON object"),
        ("evaluate", '{"recipe": "digits", "data": "digits", "x": 1}', "unknown setting(s) x"),
        ("report", '{"recipe": "digits"}', "recipe.json: "),
        ("evaluate", "[" * 100_000, "recipe.json is not JSON"),
        ("evaluate", '{"seed": ' + "9" * 5_000 + "}", "recipe.json"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_folder_without_a_run(command: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        write(tmp_path / "recipe.json", content)
    answer = hdistill(command, tmp_path)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.line
    assert len(list(tmp_path.iterdir())) == (content is not None)


def test_a_run_without_stages_cannot_be_evaluated(copy: Path) -> None:
    for stage in ("teacher", "trajectory", "distribution"):
        shutil.rmtree(copy / stage)
    answer = hdistill("evaluate", copy)
    assert answer.code == 2
    assert "no trained stage in" in answer.line


def test_weights_with_values_that_are_not_finite_are_refused(copy: Path, tmp_path: Path) -> None:
    for stage in ("teacher", "distribution"):
        tensors = files.read_tensors(copy / stage / "model.safetensors")
        next(iter(tensors.values()))[0] = float("nan")
        save_file(tensors, copy / stage / "model.safetensors")
    for arguments in (("sample", copy, "--out", tmp_path / "a.png"), ("report", copy), ("evaluate", copy)):
        answer = hdistill(*arguments)
        assert answer.code == 2
        assert "the weights are not finite" in answer.line
    assert not (tmp_path / "a.png").exists()


# ---- messages

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


def test_every_error_is_one_line_whatever_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise hd_trainer.UserError("two\nlines   here")

    monkeypatch.setattr(pipeline, "read_settings", fail)
    assert hdistill("evaluate", "x").line == "hdistill: two lines here"


@pytest.mark.parametrize("command", ["run", "train", "evaluate", "report", "sample"])
def test_one_of_several_processes_is_refused_in_one_line(
    command: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun each process would write into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = contents(finished)
    arguments = {
        "run": ("digits", "--smoke", "--out", tmp_path / "new"),
        "train": ("teacher", "digits", "--smoke", "--out", tmp_path / "new"),
        "sample": (finished, "--out", tmp_path / "new.png"),
    }.get(command, (finished,))
    answer = hdistill(command, *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert "one of 2 (WORLD_SIZE). Start it without torchrun" in answer.line
    assert list(tmp_path.iterdir()) == []
    assert contents(finished) == before


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "hd_trainer", "run", "digit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    known = "known: digits, fashion, or a file (recipe.py:function, recipe.json)"
    assert done.stderr == f"hdistill: unknown recipe 'digit' (did you mean 'digits'?); {known}\n"
