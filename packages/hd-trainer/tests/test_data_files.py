"""``npz:FILE`` and ``fashion``: files of arrays, written here; whatever is damaged is one line."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from trainer_helpers import hdistill

from hd_trainer import UserError
from hd_trainer.data import ByteImages, fashion, load_data, read_all
from hd_trainer.data.fashion import CLASSES, DEBIAN, read_idx
from hd_trainer.data.npz import read_array
from hd_trainer.decoding import UnreadableError, decode

# ---- npz


def pixels(*shape: int) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_an_archive_is_what_numpy_reads(save: object, order: str, tmp_path: Path) -> None:
    arrays = {"images": np.asarray(pixels(20, 6, 5, 3), order=order), "labels": np.arange(20, dtype=np.int16)}
    save(tmp_path / "a.npz", **arrays)  # type: ignore[operator]
    for name, wanted in arrays.items():
        found = read_array(tmp_path / "a.npz", name)
        assert (found == wanted).all()
        assert found.dtype == wanted.dtype
        # What is not compressed is not read into memory.
        assert isinstance(found, np.memmap) == (save is np.savez)


@pytest.mark.parametrize(
    ("shape", "sample"),
    [((20, 8, 8), (1, 8, 8)), ((20, 3, 8, 8), (3, 8, 8)), ((20, 8, 8, 3), (3, 8, 8)), ((20, 8, 8, 1), (1, 8, 8))],
)
def test_images_of_every_layout(shape: tuple[int, ...], sample: tuple[int, ...], tmp_path: Path) -> None:
    array = pixels(*shape)
    np.savez(tmp_path / "a.npz", array)  # as arr_0
    data = load_data(f"npz:{tmp_path / 'a.npz'}?held_out=0.5")
    assert (data.name, data.shape, data.classes) == ("npz:a", sample, ())
    assert isinstance(data.train, ByteImages)
    first = int(data.train.rows[0])
    wanted = torch.from_numpy(array[first])
    wanted = wanted.movedim(2, 0) if shape[-1] in (1, 3) else wanted.reshape(sample)
    assert torch.equal(data.train.read(torch.tensor([0])).x[0], wanted / 127.5 - 1)


def test_labels_and_the_names_of_classes(tmp_path: Path) -> None:
    images, labels = pixels(20, 4, 4), np.arange(20) % 3
    images[:, 0, 0] = labels
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=["x", "y", "z"])
    data = load_data(f"npz:{tmp_path / 'a.npz'}?flip=true")
    assert (data.classes, data.null) == (("x", "y", "z"), {"labels": 3})
    batch = read_all(data.reference)
    assert torch.equal(((batch.x[:, 0, 0, 0] + 1) * 127.5).round().long(), batch.cond["labels"])
    assert len(data.train) == 2 * len(data.reference)
    np.savez(tmp_path / "b.npz", images, labels)  # as arr_0 and arr_1, as ADM's references are
    assert load_data(f"npz:{tmp_path / 'b.npz'}").classes == ("0", "1", "2")


ARRAYS: dict[str, tuple[dict[str, object], str]] = {
    "no images": ({"pictures": pixels(20, 4, 4)}, "needs an array images or arr_0; it holds pictures"),
    "floats": (
        {"images": np.zeros((20, 4, 4))},
        "images must be uint8; got float64: convert them, or write a function",
    ),
    "a table": ({"images": pixels(20, 4)}, "images must be (N, H, W), (N, C, H, W) or (N, H, W, C)"),
    "four channels": ({"images": pixels(20, 4, 4, 4)}, "C of 1 or 3; got (20, 4, 4, 4)"),
    "few": ({"images": pixels(7, 4, 4)}, "7 image(s); at least 8 are needed"),
    "none": ({"images": pixels(0, 4, 4)}, "0 image(s); at least 8 are needed"),
    "no labels left": ({"images": pixels(0, 4, 4), "labels": np.zeros(0, int)}, "0 image(s)"),
    "fewer labels": (
        {"images": pixels(20, 4, 4), "labels": np.arange(7)},
        "labels must be 20 integers; got int64 (7,)",
    ),
    "labels below 0": ({"images": pixels(20, 4, 4), "labels": np.arange(20) - 1}, "must lie in 0..99999; got -1..18"),
    "a label of 2^60": ({"images": pixels(20, 4, 4), "labels": np.full(20, 2**60)}, "must lie in 0..99999"),
    "one class": ({"images": pixels(20, 4, 4), "labels": np.full(20, 4)}, "labels hold one class, 4: leave them out"),
    "objects": ({"images": np.array([{}] * 20, dtype=object)}, "the array images cannot be read"),
    "objects as labels": (
        {"images": pixels(20, 4, 4), "labels": np.array([{}] * 20, dtype=object)},
        "the array labels cannot be read",
    ),
    "few names": (
        {"images": pixels(20, 4, 4), "labels": np.arange(20), "classes": ["a"]},
        "classes must name at least 20 classes",
    ),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_of_another_kind_are_one_line_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    arrays, message = ARRAYS[case]
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    answer = hdistill("run", "digits", "--data", f"npz:{tmp_path / 'a.npz'}", "--out", tmp_path / "new")
    assert answer.code == 2
    assert message in answer.line
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "npz: which file? Name it: npz:PATH"), ("no.npz", "npz: no.npz is not there"), (".", "npz: . is not a file")],
)
def test_the_file_must_be_there(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_data(f"npz:{name}")
    assert str(caught.value) == message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_archive_loads_or_is_one_line(
    save: object, where: float, value: int, cut: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    save(path, images=pixels(12, 4, 4), labels=np.arange(12) % 2)  # type: ignore[operator]
    content = bytearray(path.read_bytes())
    place = int(where * (len(content) - 1))
    content[place] = value
    path.write_bytes(content[:place] if cut else content)
    said = ""
    try:
        read_all(load_data(f"npz:{path}").train)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 400


# ---- IDX


def idx(array: np.ndarray) -> bytes:
    """The file format of MNIST: two zeros, 8 for bytes, the dimensions, each size in four bytes, the data."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, train: int = 40, test: int = 12) -> dict[str, np.ndarray]:
    """A small set in the form of Fashion-MNIST: two files packed, two not; the arrays by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "train-images-idx3-ubyte": pixels(train, 28, 28),
        "train-labels-idx1-ubyte": (np.arange(train) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": pixels(train + test, 28, 28)[train:],
        "t10k-labels-idx1-ubyte": (np.arange(test) % 10).astype(np.uint8),
    }
    for name, array in arrays.items():
        if name.startswith("train"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def test_fashion_has_its_own_split_and_names(tmp_path: Path) -> None:
    arrays = write_fashion(tmp_path)
    data = load_data(f"fashion:{tmp_path}")
    for split, part in ((data.train, "train"), (data.held_out, "t10k")):
        batch = read_all(split)
        images = torch.from_numpy(arrays[f"{part}-images-idx3-ubyte"])[:, None]
        assert torch.equal(batch.x, images / 127.5 - 1)
        assert batch.cond["labels"].tolist() == arrays[f"{part}-labels-idx1-ubyte"].tolist()
    assert (data.name, data.shape, len(data.classes), data.classes[9]) == ("fashion", (1, 28, 28), 10, "ankle boot")
    assert data.null == {"labels": 10}
    assert len(load_data(f"fashion:{tmp_path}?flip=true").train) == 80


def test_fashion_is_looked_for_where_debian_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path("/usr/share/datasets/fashion-mnist") == DEBIAN
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "debian")
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist; or, without root: apt-get download"):
        load_data("fashion")
    write_fashion(tmp_path / "debian")
    assert len(load_data("fashion").train) == 40
    assert len(load_data("fashion?flip=true").train) == 80


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    data = load_data("fashion")
    assert (len(data.train), len(data.held_out), data.shape) == (60_000, 10_000, (1, 28, 28))
    labels = data.train.cond(torch.arange(60_000))["labels"]
    assert torch.bincount(labels).tolist() == [6_000] * 10
    assert len(CLASSES) == 10


DAMAGED: dict[str, tuple[bytes | None, str]] = {
    "not there": (None, "has no t10k-labels-idx1-ubyte.gz; install it with: apt-get install dataset-fashion-mnist"),
    "empty": (b"", "is no IDX file of bytes in 1 dimension(s)"),
    "text": (b"no array", "is no IDX file of bytes in 1 dimension(s)"),
    "images": (idx(pixels(12, 2, 2)), "is no IDX file of bytes in 1 dimension(s)"),
    "short": (idx(np.zeros(12, np.uint8))[:-1], "is damaged: it must hold 12 bytes of data; get it again"),
    "long": (idx(np.zeros(12, np.uint8)) + b"\0", "is damaged: it must hold 12 bytes of data; get it again"),
    "others": (idx(np.zeros(11, np.uint8)), "t10k has 12 images and 11 labels"),
    "eleven classes": (idx(np.full(12, 10, np.uint8)), "labels must lie in 0..9 for 10 classes; got 10..10"),
    "petabytes": (bytes([0, 0, 8, 1, 255, 255, 255, 255]), "is damaged: it must hold 4294967295 bytes"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_idx_files_are_one_line(case: str, tmp_path: Path) -> None:
    content, message = DAMAGED[case]
    write_fashion(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_data(f"fashion:{tmp_path}")
    assert message in str(caught.value)


@pytest.mark.parametrize("cut", [1, 12, 40])
def test_a_torn_gzip_file_is_one_line(cut: int, tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(pixels(20, 6, 6)))[:-cut])
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(tmp_path / "a.gz", 3)
    (tmp_path / "b.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(tmp_path / "b.gz", 3)


# ---- pictures


@settings(deadline=None, max_examples=300)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), data=st.data())
def test_a_damaged_picture_is_read_or_unreadable(kind: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(9, 9, 3)).save(buffer, format=kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    said = ""
    try:
        assert decode(bytes(content), 8, 3).shape == (8, 8, 3)
    except UnreadableError as error:
        said = str(error)
    assert len(said) <= 80
