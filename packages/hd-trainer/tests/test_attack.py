"""What a run survives: kills and stops at any moment, full disks, odd paths, diverged networks, damaged files."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn
from trainer_helpers import SHORT, contents, hdistill, with_flags

from hd_trainer import UserError
from hd_trainer.engine.draws import step_generator
from hd_trainer.engine.loop import LoopSettings, Task, train
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings
from hd_trainer.evaluation import read_results
from hd_trainer.report.summary import summarise, warnings
from hd_trainer.run_folder import RECIPE, brought, claim, note_sources, read_settings, stage_folders

DRIVER = Path(__file__).parent / "attack_driver.py"


# ---- kills, stops and full disks, each in processes of their own


def attack(mode: str, base: Path) -> list[str]:
    """What the driver found; see attack_driver.py."""
    done = subprocess.run(
        [sys.executable, DRIVER, mode, base],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_kill_before_any_file_event_leaves_no_trace(tmp_path: Path) -> None:
    assert attack("kills", tmp_path) == []


@pytest.mark.slow
def test_a_stop_at_any_moment_is_one_line_and_leaves_no_trace(tmp_path: Path) -> None:
    assert attack("stops", tmp_path) == []


@pytest.mark.slow
def test_a_stop_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    assert attack("imports", tmp_path) == []


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_one_line_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    assert attack("limited", tmp_path) == []


def can_mount(place: Path) -> bool:
    """Whether this process may mount a small disk of its own."""
    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", place]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        return False
    subprocess.run(["umount", place], check=True)
    return True


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    if not can_mount(tmp_path / "probe"):
        pytest.skip("only root may mount a small disk")
    assert attack("full", tmp_path) == []


# ---- networks that have diverged


def test_a_network_that_diverged_in_its_last_update_is_not_saved(tmp_path: Path) -> None:
    command = ["train", "teacher", *with_flags(SHORT[1:], "--teacher.steps", "1"), "--teacher.optimizer.lr", "1e38"]
    answer = hdistill(*command, "--out", tmp_path)
    assert answer.code == 2
    assert "no longer finite after step 1; lower its learning rate" in answer.err.splitlines()[-1]
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"recipe.json", "sources.json", "metrics.jsonl"}


@pytest.mark.parametrize("command", ["sample", "report", "evaluate"])
def test_a_network_that_is_not_finite_is_not_used(command: str, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    path = run / "distribution/model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, path)
    before = contents(run)
    answer = hdistill(command, run, *(["--out", run / "picture.png"] if command == "sample" else []))
    assert answer.code == 2
    assert str(run / "distribution") in answer.line
    assert "not finite" in answer.line
    assert contents(run) == before


# ---- paths


@pytest.mark.parametrize("command", [["train", "teacher", *SHORT[1:], "--out"], ["sample"], ["evaluate"], ["report"]])
def test_a_path_that_is_not_utf8_is_refused_in_words(command: list[str], tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/na\xffme"
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"hd_trainer", *(word.encode() for word in command), odd],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("hdistill: arguments must be UTF-8; got ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_utf8_may_stand_above(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / os.fsdecode(b"na\xffme")
    odd.mkdir()
    shutil.copytree(finished, odd / "run")
    monkeypatch.chdir(odd)
    assert hdistill("sample", "run", "--count", 10).code == 0
    assert (odd / "samples.png").exists()
    (odd / "run/distribution/done.json").unlink()
    answer = hdistill("train", "distribution", *SHORT[1:], "--out", "run")
    assert answer.code == 0, answer.err


# ---- damaged files


def linear_task() -> Task:
    """A linear map trained for seven steps: fast enough for hundreds of resumed runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
    optimizer = Optimizer(model, OptimizerSettings(lr=0.05, warmup=2), steps=7)

    def step(index: int) -> dict[str, Tensor]:
        x = torch.randn(4, 2, generator=step_generator(0, "linear", index))
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.update(loss, index)
        return {"loss": loss.detach()}

    return Task(
        name="linear",
        steps=7,
        modules={"model": model},
        optimizers={"model": optimizer},
        step=step,
        sample=lambda: model.weight.detach()[None, None],
        save=lambda folder: save_file(model.state_dict(), folder / "model.safetensors"),
    )


EVERY = LoopSettings(log_every=3, checkpoint_every=4)


class Crash(Exception):
    """Ends a training in the middle."""


def crashed_run(folder: Path) -> None:
    """A training that ended within its sixth step: a checkpoint of four steps, a record of three, a sum of one."""
    task = linear_task()

    def step(index: int) -> dict[str, Tensor]:
        if index == 5:
            raise Crash
        return task.step(index)

    with pytest.raises(Crash):
        train(Task(**{**vars(task), "step": step}), folder, EVERY)


#: What stands in a damaged file where something else should.
ODD = [None, True, 0, -1, 3, 2.5, 1e308, -1e308, math.nan, math.inf, 10**30, 10**400, "", "x", "\ud800", "\0", [], {}]
ODD += [[[1]], {"a": {"b": 1}}, [0.0, 0], "y" * 10_000]


def damaged_text(text: bytes, draw: random.Random) -> bytes:
    """The bytes with a few of them lost, changed or added."""
    at, size = draw.randrange(len(text) + 1), draw.choice([1, 1, 2, 8, 50])
    kind = draw.choice(["cut", "lost", "changed", "added", "empty", "twice"])
    random_bytes = bytes(draw.choice([draw.randrange(256), *b'0129-.eE[]{}",:n']) for _ in range(size))
    return {
        "cut": text[:at],
        "lost": text[:at] + text[at + size :],
        "changed": text[:at] + random_bytes + text[at + size :],
        "added": text[:at] + random_bytes + text[at:],
        "empty": b"",
        "twice": text + text,
    }[kind]


def damaged_json(text: bytes, draw: random.Random) -> bytes:
    """The JSON value with one entry lost, added or replaced by something odd."""
    value = json.loads(text)
    places = list(entries(value))
    if not places or draw.random() < 0.05:
        return json.dumps(draw.choice(ODD)).encode()
    parent, key = draw.choice(places)
    if draw.random() < 0.25:
        del parent[key]
    elif draw.random() < 0.1 and isinstance(parent, dict):
        parent[draw.choice(["x", "", "step", key * 2])] = draw.choice(ODD)
    elif draw.random() < 0.05:
        parent[key] = nested(draw.choice([60, 400, 900]))
    else:
        parent[key] = draw.choice(ODD)
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(4300)


def entries(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in entries(value[key])]


def nested(depth: int) -> Any:
    """Lists within lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def damaged_lines(text: bytes, draw: random.Random) -> bytes:
    """JSON lines with one of them damaged."""
    lines = text.splitlines()
    at = draw.randrange(len(lines))
    lines[at] = damaged_json(lines[at], draw)
    return b"\n".join(lines) + b"\n"


def damaged_tensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with one tensor lost, added, or of other form or content."""
    tensors = load(data)
    name = draw.choice(sorted(tensors))
    one = tensors.pop(name)
    kind = draw.choice(["lost", "renamed", "whole", "double", "half", "flat", "large", "nan", "negative", "zero"])
    if kind == "renamed":
        tensors[draw.choice(["x", "optimizer.model.7.step", "optimizer.model.x.step", "module.x"])] = one
    elif kind != "lost":
        tensors[name] = {
            "whole": one.long(),
            "double": one.double(),
            "half": one.half(),
            "flat": one.reshape(-1)[:1].clone(),
            "large": torch.zeros(100_000),
            "nan": torch.full_like(one, math.nan),
            "negative": -one.abs() - 1,
            "zero": torch.zeros_like(one),
        }[kind]
    return save(tensors)


def damaged_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header says something odd, of the right length."""
    size = int.from_bytes(data[:8], "little")
    header = damaged_json(data[8 : 8 + size], draw)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def survives(path: Path, damage: Callable[[bytes, random.Random], bytes], act: Callable[[], Any], seed: int) -> bool:
    """Damage the file, ``act()``, mend it; whether that was refused. What is refused is refused in one short line."""
    whole = path.read_bytes()
    path.write_bytes(damage(whole, random.Random(seed)))
    try:
        act()
    except UserError as error:
        message = str(error)
        # A weight that is merely odd shows itself only when training has gone on.
        assert path.name in message or path.parent.name in message or "no longer finite" in message, (seed, message)
        assert len(message) < 900, (seed, message)
        return True
    finally:
        if path.parent.exists():  # a checkpoint that has been gone on from may be tidied up
            path.write_bytes(whole)
    return False


@pytest.mark.parametrize("damage", [damaged_text, damaged_json])
def test_a_damaged_state_json_is_refused_or_gone_on_with(
    damage: Callable[[bytes, random.Random], bytes], tmp_path: Path
) -> None:
    refused = damaged_checkpoints(tmp_path, "checkpoints/000004/state.json", damage, 150)
    assert refused > 75


@pytest.mark.parametrize("damage", [damaged_text, damaged_tensors, damaged_header])
def test_damaged_tensors_of_a_state_are_refused_or_gone_on_with(
    damage: Callable[[bytes, random.Random], bytes], tmp_path: Path
) -> None:
    refused = damaged_checkpoints(tmp_path, "checkpoints/000004/state.safetensors", damage, 120)
    assert refused > 60


@pytest.mark.parametrize("damage", [damaged_text, damaged_lines])
def test_damaged_records_are_refused_or_gone_on_with(
    damage: Callable[[bytes, random.Random], bytes], tmp_path: Path
) -> None:
    refused = damaged_checkpoints(tmp_path, "metrics.jsonl", damage, 100)
    assert 20 < refused < 100


def damaged_checkpoints(base: Path, name: str, damage: Callable[[bytes, random.Random], bytes], number: int) -> int:
    """How many of so many damages of a file are refused by the training that goes on from there."""
    before, folder = base / "before", base / "run"
    before.mkdir()
    crashed_run(before)
    refused = 0
    for seed in range(number):
        shutil.copytree(before, folder)
        refused += survives(folder / name, damage, lambda: train(linear_task(), folder, EVERY), seed)
        shutil.rmtree(folder)
    return refused


@pytest.mark.parametrize("damage", [damaged_text, damaged_json])
def test_a_damaged_recipe_is_refused_or_understood(
    damage: Callable[[bytes, random.Random], bytes], finished: Path, tmp_path: Path
) -> None:
    settings = read_settings(finished)
    shutil.copy(finished / RECIPE, tmp_path)

    def act() -> None:
        read_settings(tmp_path)
        claim(settings, tmp_path)

    refused = sum(survives(tmp_path / RECIPE, damage, act, seed) for seed in range(250))
    assert refused > 100


@pytest.mark.parametrize("damage", [damaged_text, damaged_json])
def test_damaged_sources_are_refused_or_understood(
    damage: Callable[[bytes, random.Random], bytes], finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sources = {"teacher": finished / "teacher", "student": finished / "trajectory"}
    run.mkdir()
    note_sources(run, sources)

    def act() -> None:
        for folder in (*stage_folders(run).values(), *brought(run).values()):
            (Path(folder) / "config.json").exists()
        note_sources(run, sources)

    refused = sum(survives(run / "sources.json", damage, act, seed) for seed in range(150))
    assert refused > 50


@pytest.mark.parametrize("damage", [damaged_text, damaged_json])
def test_damaged_results_are_refused_or_understood(
    damage: Callable[[bytes, random.Random], bytes], finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))

    def act() -> None:
        rows, _ = read_results(run)
        warnings(rows, summarise(rows), run)

    refused = sum(survives(run / "evaluation.json", damage, act, seed) for seed in range(200))
    assert refused > 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluation.json", "trajectory/metrics.jsonl", "distribution/metrics.jsonl"])
def test_a_report_of_damaged_files_is_refused_or_written(name: str, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    damage = damaged_json if name == "evaluation.json" else damaged_lines

    def act() -> None:
        answer = hdistill("report", run)
        if answer.code:
            assert answer.code == 2
            raise UserError(answer.line)

    for seed in range(1000, 1012):
        survives(run / name, damage, act, seed)


@pytest.mark.parametrize("damage", [damaged_text, damaged_json])
def test_a_damaged_note_of_the_end_is_refused_or_understood(
    damage: Callable[[bytes, random.Random], bytes], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    rows, _ = read_results(run)
    monkeypatch.setattr("hd_trainer.evaluation.evaluate", lambda *_: rows)

    def act() -> None:
        answer = hdistill("evaluate", run)
        if answer.code:
            assert answer.code == 2
            raise UserError(answer.line)

    refused = sum(survives(run / "teacher/done.json", damage, act, seed) for seed in range(40))
    assert refused > 0  # an impossible time is left out
