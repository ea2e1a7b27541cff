"""Writers: what the loop tells them, and what TensorBoard, W&B and trackio make of it, read back from their files."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_helpers import SHORT, contents, hdistill

from hd_trainer import Settings, UserError
from hd_trainer.engine.loop import LoopSettings, Task, train
from hd_trainer.files import read_records
from hd_trainer.run_folder import read_settings
from hd_trainer.writers import EXTRAS, JsonLines, WriterFactory, check_installed, make_writers

EVERY = LoopSettings(log_every=2, checkpoint_every=4)
CONFIG = {"seed": 7, "teacher": {"steps": 10}}


class Crash(Exception):
    """What no handler expects."""


def counting(steps: int = 10, crash_at: int | None = None) -> Task:
    """A task whose loss at step i is i, counted from 1; it trains nothing."""

    def step(index: int) -> dict[str, Tensor]:
        if index == crash_at:
            raise Crash
        return {"loss": torch.tensor(index + 1.0)}

    return Task(
        name="counting",
        steps=steps,
        modules={"network": nn.Linear(1, 1)},
        optimizers={},
        step=step,
        sample=lambda: torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8),
        save=lambda folder: None,
    )


def stopped_and_resumed(folder: Path, writers: tuple[WriterFactory, ...]) -> None:
    """A stage of 10 steps; it dies after the record of step 6, goes on from the checkpoint of step 4."""
    folder.mkdir(parents=True)
    with pytest.raises(Crash):
        train(counting(crash_at=6), folder, EVERY, writers)
    train(counting(), folder, EVERY, writers)


#: Means over two steps each.
EXPECTED = {2: 1.5, 4: 3.5, 6: 5.5, 8: 7.5, 10: 9.5}


# ---- what the loop tells a writer


class Fake:
    """Notes what it is told."""

    def __init__(self, told: list[Any], folder: Path, step: int) -> None:
        self.told = told
        told.append(("open", folder.name, step))

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        assert seconds >= 0
        self.told.append(("write", step, values))

    def picture(self, step: int, path: Path) -> None:
        assert path.is_file()
        self.told.append(("picture", step, path.name))

    def close(self) -> None:
        self.told.append("close")


def test_a_writer_hears_all_and_is_closed(tmp_path: Path) -> None:
    told: list[Any] = []
    stopped_and_resumed(tmp_path / "stage", (JsonLines, lambda folder, step: Fake(told, folder, step)))
    assert told == [
        ("open", "stage", 0),
        ("write", 2, {"loss": 1.5}),
        ("write", 4, {"loss": 3.5}),
        ("picture", 4, "000004.png"),
        ("write", 6, {"loss": 5.5}),
        "close",
        ("open", "stage", 4),
        ("write", 6, {"loss": 5.5}),
        ("write", 8, {"loss": 7.5}),
        ("picture", 8, "000008.png"),
        ("write", 10, {"loss": 9.5}),
        ("picture", 10, "000010.png"),
        "close",
    ]
    records = read_records(tmp_path / "stage/metrics.jsonl")
    assert {record["step"]: record["loss"] for record in records} == EXPECTED
    assert len(records) == len(EXPECTED)


def test_a_writer_that_cannot_open_closes_those_before_it(tmp_path: Path) -> None:
    told: list[Any] = []

    def broken(folder: Path, step: int) -> Any:
        raise UserError("no network")

    with pytest.raises(UserError, match="no network"):
        train(counting(), tmp_path, EVERY, (lambda folder, step: Fake(told, folder, step), broken))
    assert told == [("open", tmp_path.name, 0), "close"]
    assert not (tmp_path / "checkpoints").exists()


def test_a_picture_that_a_kill_prevented_is_shown_on_resuming(tmp_path: Path) -> None:
    told: list[Any] = []
    with pytest.raises(Crash):
        train(counting(crash_at=4), tmp_path, EVERY)
    (tmp_path / "samples/000004.png").unlink()
    train(counting(), tmp_path, EVERY, (lambda folder, step: Fake(told, folder, step),))
    assert told[:2] == [("open", tmp_path.name, 4), ("picture", 4, "000004.png")]


# ---- the setting


@pytest.mark.parametrize(
    ("given", "got"), [(("tensorbord",), "tensorbord"), (("wandb", "wandb"), "wandb wandb")], ids=str
)
def test_unknown_and_repeated_names_are_one_line(given: tuple[str, ...], got: str, tmp_path: Path) -> None:
    answer = hdistill(*SHORT, "--out", tmp_path / "run", "--writers", *given)
    assert answer.code == 2
    assert f"writers must be some of {', '.join(EXTRAS)}, each once; got {got}" in answer.line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_package_is_one_line_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (name, EXTRAS[name][0]):
        monkeypatch.setitem(sys.modules, module, None)
    answer = hdistill(*SHORT, "--out", tmp_path / "run", "--writers", name)
    assert answer.code == 2
    assert f'pip install "hd-trainer[{name}]"' in answer.line
    answer = hdistill("train", "teacher", *SHORT[1:], "--out", tmp_path / "run", "--writers", name)
    assert answer.code == 2
    assert f'pip install "hd-trainer[{name}]"' in answer.line
    assert not (tmp_path / "run").exists()


def test_writers_may_change_between_two_calls(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    monkeypatch.setattr("hd_trainer.pipeline.check_installed", lambda names: None)
    answer = hdistill("train", "teacher", *SHORT[1:], "--out", copy, "--writers", "trackio", "wandb")
    assert answer.code == 0, answer.err
    assert read_settings(copy).writers == ("trackio", "wandb")
    before = contents(copy)
    # Nothing of them is needed to measure a run or to look at it.
    assert hdistill("report", copy).code == 0
    assert contents(copy).keys() == before.keys()


def test_json_lines_come_first_and_nothing_is_imported_before_a_stage_opens(settings: Settings) -> None:
    first, *others = make_writers(tuple(EXTRAS), CONFIG)
    assert first is JsonLines
    assert len(others) == len(EXTRAS)
    with pytest.raises(UserError, match="writers must be some of"):
        replace(settings, writers=("mlflow",))


# ---- the real libraries, offline


def needed(name: str) -> None:
    """Skip where the library is not installed."""
    try:
        check_installed([name])
    except UserError:
        pytest.skip(f"{name} is not installed")


def test_tensorboard_reads_one_curve_after_a_resume(tmp_path: Path) -> None:
    needed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stopped_and_resumed(tmp_path / "run/teacher", make_writers(["tensorboard"], CONFIG))
    events = EventAccumulator(str(tmp_path / "run/tensorboard/teacher")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == list(EXPECTED.items())
    assert [event.step for event in events.Scalars("seconds")] == list(EXPECTED)
    assert [event.step for event in events.Images("samples")] == [4, 8, 10]
    picture = events.Images("samples")[0]
    assert (picture.width, picture.height) == (364, 40)  # ten places of nine pixels and a last gap, four times
    (text,) = events.Tensors("settings/text_summary")
    assert '"seed": 7' in text.tensor_proto.string_val[0].decode()


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format behind seven bytes of W&B's own."""
    from wandb.proto import wandb_internal_pb2

    data, offset, parts = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    stopped_and_resumed(tmp_path / "run/teacher", make_writers(["wandb"], CONFIG))
    known = json.loads((tmp_path / "run/teacher/wandb.json").read_text())["id"]
    files = sorted(
        (tmp_path / "run/wandb").glob(f"offline-run-*/run-{known}.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert len(files) == 2, "offline, each part of a stage is a folder of its own"
    found: dict[int, float] = {}
    pictures: set[int] = set()
    for path in files:
        for record in wandb_records(path):
            if record.HasField("run"):
                assert (record.run.run_id, record.run.run_group) == (known, "run")
                assert record.run.display_name == "run/teacher"
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert config["seed"] == 7
                assert config["stage"] == "teacher"
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "loss" in items:
                found[int(items["_step"])] = float(items["loss"])
            if any(key.startswith("samples") for key in items):
                pictures.add(int(items["_step"]))
    assert found == EXPECTED
    assert pictures == {4, 8, 10}


def test_trackio_keeps_curves_and_pictures_of_every_stage(tmp_path: Path) -> None:
    """In a process of its own: trackio reads where its files are when it is imported."""
    needed("trackio")
    import os
    import subprocess

    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_writers import CONFIG, make_writers, stopped_and_resumed
stopped_and_resumed(Path({str(tmp_path)!r}) / "my run" / "teacher", make_writers(["trackio"], CONFIG))
import trackio
(run,) = trackio.Api().runs("my-run")
assert run.name == "teacher", run.name
import json
from trackio.sqlite_storage import SQLiteStorage
print("FOUND", json.dumps(SQLiteStorage.get_logs("my-run", "teacher")))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert answer.returncode == 0, answer.stderr
    (line,) = [line for line in answer.stdout.splitlines() if line.startswith("FOUND ")]
    rows = json.loads(line.removeprefix("FOUND "))
    assert {row["step"]: row["loss"] for row in rows if "loss" in row} == EXPECTED
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 6, 8, 10]
    pictures = [(row["step"], row["samples"]["file_path"]) for row in rows if "samples" in row]
    assert [step for step, _ in pictures] == [4, 8, 10]
    assert all((tmp_path / "trackio/media" / path).is_file() for _, path in pictures)
