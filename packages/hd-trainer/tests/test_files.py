"""Files are written whole or not at all; pictures are what the tensors say; devices and precision."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from hd_trainer import UserError
from hd_trainer.engine import precision
from hd_trainer.engine.parallel import choose_device
from hd_trainer.engine.precision import Precision, autocast
from hd_trainer.files import (
    make_folder,
    read_json,
    read_records,
    read_tensors,
    remove_incomplete,
    write_atomically,
    write_files,
    write_folder,
    write_json,
)
from hd_trainer.images import save_grid, tile


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, lambda place: place.write_text("old"))

    def half(place: Path) -> None:
        place.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda place: place.write_text("new"))
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_json_goes_to_disk_and_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None], "é": "ü"})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, None], "é": "ü"}
    assert (tmp_path / "a.json").read_text().endswith("}\n")
    with pytest.raises(UserError, match="no file"):
        read_json(tmp_path / "b.json")
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(UserError, match=r"a\.json is not JSON .* remove it"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "[" * 10_000 + "]" * 10_000 + "}", "is not JSON"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "is nested more than 50 levels deep"),
        ('{"a": ' + "9" * 5_000 + "}", "is not JSON"),
        ("3", "holds no JSON object"),
    ],
)
def test_strange_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json {message}.*; remove it and run again$") as caught:
        read_json(tmp_path / "a.json")
    assert len(str(caught.value)) < 500


def test_records_end_where_a_line_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + '\n{"st')
    assert read_records(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "{}", '{"step": 1.5}', '{"step": true}', '{"step": 2, "loss": "x"}', '{"step": 2, "l": NaN}'],
)
def test_a_damaged_record_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged in line 2; remove that line"):
        read_records(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": 3},
    ],
    ids=["sub-byte", "overflow", "huge", "empty and huge", "negative", "reversed", "no entry"],
)
def test_a_damaged_header_of_tensors_is_one_short_line(header: dict[str, object], tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(UserError, match=r"a\.safetensors is missing or damaged") as caught:
        read_tensors(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 400


def test_a_replaced_folder_is_the_new_one_and_nothing_is_left_over(tmp_path: Path) -> None:
    for content in ("old", "new"):
        write_folder(tmp_path / "it", lambda place, content=content: (place / content).write_text(content))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["it", "it/new"]

    def half(place: Path) -> None:
        (place / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "it", half)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["it", "it/new"]


def test_files_arrive_together_and_the_last_one_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[str] = []
    rename = os.replace
    monkeypatch.setattr("hd_trainer.files.os.replace", lambda a, b: (arrived.append(Path(b).name), rename(a, b)))

    def fill(place: Path) -> None:
        for name in ("b", "a", "c"):
            (place / name).write_text(name)

    write_files(tmp_path, fill, last="a")
    assert (sorted(arrived), arrived[-1]) == (["a", "b", "c"], "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_full_disk_under_safetensors_is_an_os_error(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match=r"could not be written .*No space left"):
        write_files(tmp_path, full, last="config.json")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_behind_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".incomplete-folder/inner").mkdir(parents=True)
    (tmp_path / ".incomplete-file.json").write_text("{")
    (tmp_path / "kept").write_text("")
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_folders_are_made_or_refused(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a/b").is_dir()
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nothing/here")):
        with pytest.raises(UserError, match=r"cannot write to .*; choose another folder"):
            make_folder(bad)


def test_a_read_only_folder_is_noticed_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hd_trainer.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"cannot write to .* Permission denied; choose another folder"):
        make_folder(tmp_path)


def test_tiles_stand_where_they_belong() -> None:
    images = torch.stack([torch.full((1, 2, 3), value) for value in (-1.0, 0.0, 1.0, 5.0)])
    picture = np.asarray(tile(images, 3, gap=1))
    assert picture.shape == (2 * 3 + 1, 3 * 4 + 1, 3)
    for index, value in enumerate((0, 128, 255, 255)):
        top, left = index // 3 * 3 + 1, index % 3 * 4 + 1
        assert (picture[top : top + 2, left : left + 3] == value).all()
    assert (picture[0] == 128).all()
    assert (picture[4:, 5:] == 128).all()
    large = np.asarray(tile(images, 3, gap=1, scale=4))
    assert (large == picture.repeat(4, 0).repeat(4, 1)).all()


def test_colour_pictures_keep_their_channels() -> None:
    image = torch.tensor([1.0, -1.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert np.asarray(tile(image, 1, gap=0))[2, 2].tolist() == [255, 0, 128]


def test_grids_are_png_files(tmp_path: Path) -> None:
    save_grid(torch.zeros(12, 1, 8, 8), tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == ((10 * 9 + 1) * 4, (2 * 9 + 1) * 4)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for bad in ("toaster", "cuda:99"):
        with pytest.raises(UserError, match=rf'device "{bad}" cannot be used here .*try "auto"') as caught:
            choose_device(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "hardware", "low"),
    [("fp32", True, False), ("bf16", False, True), ("auto", True, True), ("auto", False, False)],
)
def test_precision(wanted: Precision, hardware: bool, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda _: hardware)
    layer = torch.nn.Linear(4, 4)
    with autocast(torch.device("cpu"), wanted):
        output = layer(torch.ones(1, 4))
    assert (output.dtype == torch.bfloat16) == low
