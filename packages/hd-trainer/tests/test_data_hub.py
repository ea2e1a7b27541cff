"""``hub:ID``, against a stand-in for the library datasets that has the few methods that are used; and the list."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from trainer_helpers import drawn, hdistill

from hd_trainer import UserError
from hd_trainer.data import SOURCES, load_data, read_all


class Image:
    """A column's type."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class ClassLabel:
    """A column's type."""

    def __init__(self, names: list[str]) -> None:
        self.names = names


class Table:
    """Columns by name. An image gives its bytes only once it is cast to an undecoded one."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features, self._fingerprint = columns, features, str(hash(repr(columns)))

    def cast_column(self, name: str, kind: Any) -> Table:
        return Table(self.columns, {**self.features, name: kind})

    def select_columns(self, names: list[str]) -> Table:
        return Table({name: self.columns[name] for name in names}, {name: self.features[name] for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        assert not any(isinstance(kind, Image) and kind.decode for kind in self.features.values())
        return {name: values[key] for name, values in self.columns.items()}


class Library:
    """The module."""

    Image, ClassLabel = Image, ClassLabel

    def __init__(self, table: Table) -> None:
        self.table = table

    def load_dataset(self, name: str, config: str | None, *, split: str) -> Table:
        if name != "someone/shapes":
            raise ConnectionError("Couldn't reach it\nand more")
        if (config, split) not in ((None, "train"), ("large", "test")):
            raise ValueError(f"Unknown split {split}")
        return self.table


def as_bytes(picture: Pillow.Image) -> dict[str, Any]:
    """A cell of an undecoded column."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """40 pictures, by bytes or by path, of two classes; it is what the library loads."""
    cells = [as_bytes(one) for one in drawn(40)]
    (tmp_path / "5.png").write_bytes(cells[5]["bytes"])
    cells[5] = {"bytes": None, "path": str(tmp_path / "5.png")}
    columns = {"id": list(range(40)), "picture": cells, "kind": [index % 2 for index in range(40)]}
    made = Table(columns, {"id": int, "picture": Image(), "kind": ClassLabel(["disc", "ring"])})
    monkeypatch.setitem(sys.modules, "datasets", Library(made))  # type: ignore[arg-type]
    monkeypatch.setenv("HDISTILL_CACHE", str(tmp_path / "cache"))
    return made


def test_columns_are_found_by_their_kind(table: Table) -> None:
    data = load_data("hub:someone/shapes?flip=true&held_out=0.25")
    assert (data.name, data.shape, data.classes) == ("hub:someone/shapes", (3, 12, 12), ("disc", "ring"))
    assert (len(data.train), len(data.reference), len(data.held_out)) == (60, 30, 10)
    wanted = {}
    for index, picture in enumerate(drawn(40)):
        x = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(12, 12, 3).movedim(2, 0)
        wanted[tuple((x / 127.5 - 1).flatten().tolist())] = index % 2
    for split in (data.reference, data.held_out):
        batch = read_all(split)
        for x, label in zip(batch.x, batch.cond["labels"].tolist(), strict=True):
            assert wanted[tuple(x.flatten().tolist())] == label


def test_what_is_asked_for_is_taken(table: Table) -> None:
    data = load_data("hub:someone/shapes?config=large&split=test&image=picture&label=id&size=8&channels=1")
    assert (data.shape, len(data.classes)) == ((1, 8, 8), 40)
    del table.features["kind"], table.columns["kind"]
    assert load_data("hub:someone/shapes").classes == ()


def test_broken_rows_are_named_and_left_out(table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    table.columns["picture"][0] = {"bytes": b"nothing", "path": None}
    table.columns["picture"][7] = {"bytes": None, "path": "/nowhere.png"}
    data = load_data("hub:someone/shapes")
    assert len(data.train) + len(data.held_out) == 38
    told = capsys.readouterr().err
    assert "2 of 40 pictures cannot be read and are left out: row 0 (no picture), row 7 (no file /nowhere.png)" in told


def test_a_second_load_reads_the_cache(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_all(load_data("hub:someone/shapes").train).x
    monkeypatch.setattr("hd_trainer.decoding.decode", None)
    assert torch.equal(read_all(load_data("hub:someone/shapes").train).x, first)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub", "hub: which data set? Name it: hub:OWNER/NAME"),
        ("hub:other", "hub:other cannot be loaded: ConnectionError: Couldn't reach it"),
        ("hub:someone/shapes?split=no", "hub:someone/shapes cannot be loaded: ValueError: Unknown split no"),
        ("hub:someone/shapes?image=x", "has no column 'x' for ?image=; it has id, picture, kind"),
        ("hub:someone/shapes?label=picture", "?label= and ?image= name one column, picture"),
        ("hub:someone/shapes?image=id", "holds no picture that can be read"),
        ("hub:someone/shapes?size=1", "hub: size must be a whole number from 4 to 4,096"),
    ],
)
def test_what_is_wrong_is_one_line(name: str, message: str, table: Table, tmp_path: Path) -> None:
    answer = hdistill("run", "digits", "--data", name, "--out", tmp_path / "new")
    assert answer.code == 2
    assert message in answer.line
    assert not (tmp_path / "new").exists()


def test_pictures_of_different_sizes_need_a_size(table: Table, tmp_path: Path) -> None:
    table.columns["picture"][9] = as_bytes(drawn(1, (9, 9))[0])
    with pytest.raises(UserError, match=r"different sizes \(12x12, row 9 9x9\): choose a side with \?size=32"):
        load_data("hub:someone/shapes")
    assert list((tmp_path / "cache" / "pictures").iterdir()) == []
    assert load_data("hub:someone/shapes?size=8").shape == (3, 8, 8)
    table.columns["picture"][0] = as_bytes(drawn(1, (9, 12))[0])
    with pytest.raises(UserError, match="pictures of 9x12, not square"):
        load_data("hub:someone/shapes")


def test_without_images_or_classes(table: Table) -> None:
    table.columns["kind"] = [1] * 40
    with pytest.raises(UserError, match=r"the column kind holds one class; choose another with \?label="):
        load_data("hub:someone/shapes")
    table.features["picture"] = str
    with pytest.raises(UserError, match="has no column of images; it has id, picture, kind"):
        load_data("hub:someone/shapes")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'needs the library datasets; run: pip install "hd-trainer\[hub\]"'):
        load_data("hub:someone/shapes")


# ---- the list


def test_all_sources_are_listed() -> None:
    answer = hdistill("list", "data")
    assert answer.code == 0
    assert [line.split()[0] for line in answer.out.splitlines()] == list(SOURCES)
    wrong = hdistill("list", "nothing")
    assert wrong.code == 2
    assert wrong.line == "hdistill: hdistill list shows: recipes, data, models, layers; got nothing"
