"""Images kept as bytes: the numbers of a float copy without the copy, mirror images, and a memory-mapped file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from hd_trainer import UserError
from hd_trainer.data import ByteImages, images_from_arrays, images_from_bytes, read_all
from hd_trainer.engine.draws import step_indices


def pixels(number: int = 20, size: int = 6, channels: int = 3) -> np.ndarray:
    """Random bytes (N, H, W, C)."""
    return np.random.default_rng(0).integers(0, 256, (number, size, size, channels), np.uint8)


def test_bytes_give_the_numbers_and_the_split_of_a_float_copy() -> None:
    labels = torch.arange(20) % 3
    ours = images_from_bytes("mine", pixels(), labels, classes=("a", "b", "c"))
    floats = images_from_arrays("mine", pixels(), labels, classes=("a", "b", "c"))
    for split, other in ((ours.train, floats.train), (ours.held_out, floats.held_out)):
        assert torch.equal(read_all(split).x, read_all(other).x)
        assert torch.equal(read_all(split).cond["labels"], read_all(other).cond["labels"])
    assert (ours.null, ours.classes, ours.shape) == (floats.null, floats.classes, floats.shape)


def test_a_flipped_split_is_the_images_and_then_their_mirror_images() -> None:
    data = images_from_bytes("mine", pixels(), torch.arange(20), classes=tuple(map(str, range(20))), flip=True)
    plain = images_from_bytes("mine", pixels(), torch.arange(20), classes=tuple(map(str, range(20))))
    number = len(plain.train)
    both, once = read_all(data.train), read_all(plain.train)
    assert len(data.train) == 2 * number
    assert torch.equal(both.x, torch.cat([once.x, once.x.flip(-1)]))
    assert torch.equal(both.cond["labels"], once.cond["labels"].repeat(2))
    # What is measured and compared with is the images as they are, and held-out ones are never mirrored.
    assert torch.equal(read_all(data.reference).x, once.x)
    assert torch.equal(read_all(plain.reference).x, once.x)
    assert torch.equal(read_all(data.held_out).x, read_all(plain.held_out).x)


def test_an_epoch_shows_each_image_and_each_mirror_image_once() -> None:
    train = images_from_bytes("mine", pixels(), flip=True).train
    seen = torch.cat([train.read(step_indices(step, 8, len(train), seed=4)).x for step in range(4)])
    wanted = read_all(train).x
    assert sorted(map(tuple, seen.flatten(1).tolist())) == sorted(map(tuple, wanted.flatten(1).tolist()))


def test_rows_pick_what_belongs_to_the_data_set() -> None:
    array, labels = pixels(30), torch.arange(30) // 15
    data = images_from_bytes("mine", array, labels, rows=torch.arange(0, 30, 2), classes=("a", "b"))
    found = torch.cat([read_all(data.train).x, read_all(data.held_out).x])
    wanted = torch.from_numpy(array[::2]).permute(0, 3, 1, 2) / 127.5 - 1
    assert sorted(map(tuple, found.flatten(1).tolist())) == sorted(map(tuple, wanted.flatten(1).tolist()))
    given = torch.cat([read_all(data.train).cond["labels"], read_all(data.held_out).cond["labels"]])
    assert torch.bincount(given).tolist() == [8, 7]


def test_neither_making_nor_reading_it_copies_the_set() -> None:
    array = pixels(3_000, 32)  # 9 MB; as float32 it would be 37 MB
    tracemalloc.start()
    try:
        data = images_from_bytes("mine", array, flip=True)
        data.train.read(torch.arange(64))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < array.nbytes / 4
    assert isinstance(data.train, ByteImages)
    assert data.train.pixels is array


def test_a_memory_map_stays_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels())
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    data = images_from_bytes("mine", mapped)
    assert isinstance(data.train, ByteImages)
    assert isinstance(data.train.pixels, np.memmap)
    assert torch.equal(read_all(data.train).x, read_all(images_from_bytes("mine", pixels()).train).x)


def test_grey_images_in_any_layout_are_read(tmp_path: Path) -> None:
    grey = pixels(channels=1)
    data = images_from_bytes("mine", np.asfortranarray(grey))
    assert torch.equal(read_all(data.train).x, read_all(images_from_bytes("mine", grey).train).x)
    assert data.shape == (1, 6, 6)


def test_what_is_wrong_is_one_line() -> None:
    with pytest.raises(UserError, match=r"7 image\(s\); at least 8 are needed: add some"):
        images_from_bytes("mine", pixels(7))
    with pytest.raises(UserError, match="is one value everywhere: there is nothing to learn"):
        images_from_bytes("mine", np.full((20, 4, 4, 1), 9, np.uint8))
    with pytest.raises(UserError, match=r"labels must lie in 0\.\.1 for 2 classes"):
        images_from_bytes("mine", pixels(), torch.arange(20), classes=("a", "b"))
    with pytest.raises(UserError, match="15 samples have 14 labels"):
        ByteImages(pixels=pixels(), rows=torch.arange(15), conditions={"labels": torch.arange(14)})
