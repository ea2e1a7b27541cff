"""Data: the digits' split, a data order that is a function of the step, and data sets from a user's own function."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trainer_helpers import hdistill

from hd_trainer import UserError
from hd_trainer.data import (
    Dataset,
    InMemory,
    grid_conditions,
    images_from_arrays,
    load_data,
    load_digits,
    pictures,
    read_all,
)
from hd_trainer.engine.draws import step_indices

# ---- digits


def test_the_split_is_whole_disjoint_and_fixed() -> None:
    digits = load_digits()
    train, held_out = read_all(digits.train), read_all(digits.held_out)
    assert train.x.shape == (1_437, 1, 8, 8)
    assert held_out.x.shape == (360, 1, 8, 8)
    assert digits.shape == (1, 8, 8)
    both = torch.cat([train.x, held_out.x])
    labels = torch.cat([train.cond["labels"], held_out.cond["labels"]])
    bunch = sklearn.datasets.load_digits()
    # Each image of the source appears once, with its label: no image is in both parts.
    ours = sorted((tuple(image), int(label)) for image, label in zip(both.flatten(1).tolist(), labels, strict=True))
    theirs = sorted(
        (tuple(image), int(label)) for image, label in zip((bunch.data / 8 - 1).tolist(), bunch.target, strict=True)
    )
    assert ours == theirs
    assert torch.equal(read_all(load_digits().held_out).x, held_out.x)


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_images_and_labels_keep_their_form(name: str) -> None:
    digits = load_digits()
    split = read_all(getattr(digits, name))
    assert split.x.dtype == torch.float32
    assert (split.x.min(), split.x.max()) == (-1, 1)
    assert len(split.x.unique()) == digits.grey_levels == 17
    assert digits.classes == tuple("0123456789")
    assert digits.null == {"labels": 10}
    labels = split.cond["labels"]
    assert labels.dtype == torch.int64
    # Every class is there, and none dominates: the split was drawn, not cut.
    assert torch.bincount(labels, minlength=10).min() > 0.07 * len(labels)


def test_class_names_are_in_label_order() -> None:
    digits = load_digits()
    train = read_all(digits.train)
    means = torch.stack([train.x[train.cond["labels"] == label].mean(0) for label in range(10)])
    # A zero is hollow, a one is not; only in the right order.
    assert means[digits.classes.index("0"), 0, 3:5, 3:5].mean() < -0.5
    assert means[digits.classes.index("1"), 0, 3:5, 3:5].mean() > 0


def test_data_by_name() -> None:
    assert load_data("digits").name == "digits"
    with pytest.raises(UserError, match=r"unknown data set 'digit'; known: digits, fashion, .*FILE\.py:FUNCTION"):
        load_data("digit")


# ---- the order


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 40), batch=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation(count: int, batch: int, seed: int) -> None:
    epochs = 3
    steps = -(-epochs * count // batch)
    stream = torch.cat([step_indices(step, batch, count, seed) for step in range(steps)])
    assert len(stream) == steps * batch
    for epoch in stream[: epochs * count].split(count):
        assert sorted(epoch.tolist()) == list(range(count))


def test_a_batch_is_a_function_of_the_step_alone() -> None:
    late = step_indices(57, 32, 100, 4)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    for step in (3, 57, 9):
        step_indices(step, 32, 100, 4)
    assert torch.equal(step_indices(57, 32, 100, 4), late)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(step_indices(57, 32, 100, 5), late)
    assert not torch.equal(step_indices(0, 100, 100, 4), step_indices(1, 100, 100, 4))


def test_a_batch_crosses_epochs() -> None:
    whole = torch.cat([step_indices(0, 10, 10, 0), step_indices(1, 10, 10, 0), step_indices(2, 10, 10, 0)])
    assert torch.equal(step_indices(0, 25, 10, 0), whole[:25])
    assert torch.equal(torch.cat([step_indices(step, 7, 10, 0) for step in range(4)]), whole[:28])


# ---- batches and splits


def test_a_split_gives_samples_with_their_conditions_in_the_order_asked_for() -> None:
    split = InMemory(x=torch.arange(5.0).reshape(5, 1, 1, 1), conditions={"labels": torch.arange(5) * 10})
    batch = split.read(torch.tensor([3, 0, 3]))
    assert len(batch) == 3
    assert batch.x.flatten().tolist() == [3, 0, 3]
    assert batch.cond["labels"].tolist() == [30, 0, 30]
    assert split.cond(torch.tensor([1]))["labels"].tolist() == [10]
    moved = batch.to(torch.device("meta"))
    assert (moved.x.device.type, moved.cond["labels"].device.type) == ("meta", "meta")


def images(number: int = 30, shape: tuple[int, ...] = (1, 8, 8), seed: int = 0) -> Tensor:
    """Random images in [-1, 1]."""
    return 2 * torch.rand(number, *shape, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.parametrize(
    ("classes", "shown"),
    [(3, [0, 1, 2]), (10, list(range(10))), (13, [0, 1, 2, 3, 5, 6, 7, 9, 10, 11]), (1000, list(range(0, 1000, 100)))],
)
def test_a_grid_shows_at_most_ten_classes(classes: int, shown: list[int]) -> None:
    labels = torch.arange(1000) % classes
    data = images_from_arrays("mine", images(1000), labels)
    assert grid_conditions(data, rows=2)["labels"].tolist() == shown * 2


def test_a_grid_without_classes_shows_the_first_held_out_conditions() -> None:
    split = InMemory(x=images(6), conditions={"text": torch.arange(6.0)[:, None]})
    data = Dataset(name="mine", train=split, held_out=split, null={"text": torch.zeros(1)})
    assert grid_conditions(data, rows=1)["text"].flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_pictures_are_decoded_where_there_is_a_decoder() -> None:
    split = InMemory(x=10 * images(6, (4, 2, 2)))
    plain = Dataset(name="plain", train=split, held_out=split, decode=lambda x: x[:, :3].clamp(-1, 1))
    assert pictures(plain, split.x).shape == (6, 3, 2, 2)
    assert pictures(load_digits(), images(2)).shape == (2, 1, 8, 8)


# ---- from arrays


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (np.zeros((20, 6, 6), np.uint8), (1, 6, 6)),
        (np.zeros((20, 6, 6, 3), np.uint8), (3, 6, 6)),
        (np.zeros((20, 3, 6, 6), np.float64), (3, 6, 6)),
        (np.zeros((20, 6, 6, 1), np.float16), (1, 6, 6)),
        (torch.zeros(20, 1, 6, 6, dtype=torch.bfloat16), (1, 6, 6)),
    ],
)
def test_arrays_of_every_layout_and_kind_become_float32_images(array: Any, shape: tuple[int, ...]) -> None:
    array[::2] = 1  # else all are alike
    data = images_from_arrays("mine", array, held_out=0.25)
    assert data.shape == shape
    assert read_all(data.train).x.dtype == torch.float32
    assert (len(data.train), len(data.held_out)) == (15, 5)
    assert (data.classes, data.null) == ((), {})


def test_bytes_are_scaled_and_split_with_their_labels() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(256, 1, 1).repeat(4, 1).repeat(4, 2)
    data = images_from_arrays("mine", pixels, np.arange(256) % 7, classes=tuple("abcdefg"))
    for split in (read_all(data.train), read_all(data.held_out)):
        grey = ((split.x[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert torch.equal(grey % 7, split.cond["labels"])
    assert (data.classes, data.null) == (tuple("abcdefg"), {"labels": 7})
    other = images_from_arrays("mine", pixels, seed=1)
    assert not torch.equal(read_all(other.train).x, read_all(data.train).x)


# ---- what is wrong with a data set is said in one line

BAD: dict[str, tuple[str, str]] = {
    "raises": ("raise KeyError('x')", "raised KeyError: 'x'"),
    "is nothing": ("return None", "must return hd_trainer.data.dataset.Dataset; got NoneType"),
    "labels too large": (
        "return images_from_arrays('mine', X, np.arange(30) % 5, classes=('a', 'b'))",
        "labels must lie in 0..1 for 2 classes; got 0..4",
    ),
    "labels below zero": (
        "return images_from_arrays('mine', X, np.arange(30) - 1)",
        "labels must lie in 0..99999; got -1..28",
    ),
    "labels far too large": (
        "return images_from_arrays('mine', X, np.full(30, 10**12))",
        "labels must lie in 0..99999; got 1000000000000..1000000000000",
    ),
    "complex labels": ("return images_from_arrays('mine', X, np.arange(30) * 1j)", "labels must be 30 integers"),
    "fewer labels than images": (
        "return images_from_arrays('mine', X, np.arange(7))",
        "labels must be 30 integers, one per image; got torch.int64 (7,)",
    ),
    "labels with a fraction": (
        "return images_from_arrays('mine', X, np.arange(30) / 2)",
        "labels must be 30 integers, one per image; got torch.float64 (30,)",
    ),
    "labels as words": (
        "return images_from_arrays('mine', X, ['cat'] * 30)",
        "labels are no array of numbers",
    ),
    "no image": ("return images_from_arrays('mine', X[:0])", "0 image(s); at least 8 are needed"),
    "no image but labels": ("return images_from_arrays('mine', X[:0], [])", "0 image(s); at least 8"),
    "one image": ("return images_from_arrays('mine', X[:1])", "1 image(s); at least 8 are needed"),
    "few training images": (
        "return images_from_arrays('mine', X[:9], held_out=0.9)",
        "train holds 1 sample(s); at least 4 are needed",
    ),
    "no pixel": ("return images_from_arrays('mine', X[:, :0])", "must be of shape (N, C, H, W)"),
    "pixels in 0..255": (
        "return images_from_arrays('mine', (X + 1) * 127.5)",
        "must lie in [-1, 1]; got [",
    ),
    "integers": ("return images_from_arrays('mine', X.astype('int32'))", "must be uint8, or floating in [-1, 1]"),
    "all alike": ("return images_from_arrays('mine', X * 0)", "is 0 everywhere: there is nothing to learn"),
    "not finite": ("X[3, 1, 1] = np.nan; return images_from_arrays('mine', X)", "has values that are not finite"),
    "words": ("return images_from_arrays('mine', [['a']])", "images are no array of numbers"),
    "ragged": ("return images_from_arrays('mine', [[1], [1, 2]])", "images are no array of numbers"),
    "a table": ("return images_from_arrays('mine', X[:, :, 0])", "images must be (N, H, W), (N, C, H, W) or"),
    "held out too much": ("return images_from_arrays('mine', X, held_out=1.0)", "held_out must be > 0 and <= 0.9"),
    "float64": (
        "s = InMemory(x=torch.from_numpy(X)[:, None].double()); return Dataset(name='mine', train=s, held_out=s)",
        "must be float32 tensors; got torch.float64",
    ),
    "uint8": (
        "s = InMemory(x=torch.zeros(9, 1, 4, 4, dtype=torch.uint8)); return Dataset(name='mine', train=s, held_out=s)",
        "must be float32 tensors; got torch.uint8",
    ),
    "numpy": (
        "s = InMemory(x=X[:, None]); return Dataset(name='mine', train=s, held_out=s)",
        "train",
    ),
    "no dimension for colour": (
        "s = InMemory(x=torch.from_numpy(X)); return Dataset(name='mine', train=s, held_out=s)",
        "must be of shape (N, C, H, W); got (30, 8, 8)",
    ),
    "labels without names": (
        "s = InMemory(x=torch.from_numpy(X)[:, None], conditions={'labels': torch.arange(30)}); "
        "return Dataset(name='mine', train=s, held_out=s, null={'labels': 30})",
        "the condition labels and the names of classes go together",
    ),
    "names without labels": (
        "s = InMemory(x=torch.from_numpy(X)[:, None]); "
        "return Dataset(name='mine', train=s, held_out=s, classes=('a',))",
        "the condition labels and the names of classes go together",
    ),
    "a condition without null": (
        "s = InMemory(x=torch.from_numpy(X)[:, None], conditions={'text': torch.zeros(30, 2)}); "
        "return Dataset(name='mine', train=s, held_out=s)",
        "has the conditions ['text'], null names []",
    ),
    "a null out of range": (
        "s = InMemory(x=torch.from_numpy(X)[:, None], conditions={'labels': torch.arange(30)}); "
        "return Dataset(name='mine', train=s, held_out=s, classes=tuple(map(str, range(30))), null={'labels': 31})",
        "null of labels must be 30, the number of classes; got 31",
    ),
    "fewer conditions than samples": (
        "s = InMemory(x=torch.from_numpy(X)[:, None], conditions={'text': torch.zeros(29, 2)}); "
        "return Dataset(name='mine', train=s, held_out=s, null={'text': 0.0})",
        "30 samples have 29 text: each needs one",
    ),
    "a null of another shape": (
        "s = InMemory(x=torch.from_numpy(X)[:, None], conditions={'text': torch.zeros(30, 2)}); "
        "return Dataset(name='mine', train=s, held_out=s, null={'text': torch.zeros(3)})",
        "null of text must be a number, or a tensor that broadcasts to (2,)",
    ),
    "a condition that no network takes": (
        "s = InMemory(x=torch.from_numpy(X)[:, None], conditions={'text': torch.zeros(30, 2)}); "
        "return Dataset(name='mine', train=s, held_out=s, null={'text': 0.0})",
        "model dit_nano_2 cannot be called with the data's samples and conditions (text): ",
    ),
    "other shapes held out": (
        "a, b = (InMemory(x=torch.rand(9, 1, n, n)) for n in (4, 8)); return Dataset(name='mine', train=a, held_out=b)",
        "held_out has samples (1, 8, 8), train (1, 4, 4)",
    ),
    "a decoder that fails": (
        "s = InMemory(x=torch.rand(9, 4, 4, 4)); "
        "return Dataset(name='mine', train=s, held_out=s, decode=lambda x: x.nothing)",
        "decode failed on one sample: AttributeError",
    ),
    "a decoder of something else": (
        "s = InMemory(x=torch.rand(9, 4, 4, 4)); return Dataset(name='mine', train=s, held_out=s, decode=lambda x: x)",
        "decode must give images (B, 1 or 3, H, W); got (1, 4, 4, 4)",
    ),
    "one grey level": ("return images_from_arrays('mine', X, grey_levels=1)", "grey_levels must be a whole number"),
    "not square": ("return images_from_arrays('mine', X[:, :4])", "networks take square images"),
    "an odd size": ("return images_from_arrays('mine', X[:, :7, :7])", "model: "),
    "a name that is none": ("return images_from_arrays(7, X)", "the name of a data set must be text; got 7"),
}

HEAD = """
import numpy as np, torch
from hd_trainer.data import Dataset, InMemory, images_from_arrays
X = np.random.default_rng(0).uniform(-1, 1, (30, 8, 8)).astype('float32')

"""


def data_file(folder: Path, body: str) -> Path:
    """A user's file with a function ``data`` of that body."""
    path = folder / "mine.py"
    path.write_text(HEAD + "def data():\n" + textwrap.indent(body, "    ") + "\n")
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_data_of_a_users_function_is_one_line_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    body, message = BAD[case]
    path = data_file(tmp_path, body)
    answer = hdistill("run", "digits", "--smoke", "--data", f"{path}:data", "--out", tmp_path / "new")
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.line
    assert len(answer.line) < 500
    assert [one.name for one in tmp_path.iterdir() if one.name != "__pycache__"] == ["mine.py"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.py", "no file nothing.py"),
        ("nothing.py:data", "no file nothing.py"),
        ("mine.py:other", "mine.py has no function 'other'; it has images_from_arrays"),
        ("mine.py:X", "mine.py has no function 'X'"),
        ("broken.py", "broken.py cannot be imported: SyntaxError"),
        ("exits.py", "exits.py cannot be imported: SystemExit"),
        (
            "mine",
            "unknown data set 'mine'; known: digits, fashion, emoji, folder:PATH, npz:FILE, hub:ID, FILE.py:FUNCTION",
        ),
    ],
)
def test_a_users_file_that_cannot_be_used(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("from hd_trainer.data import images_from_arrays\nX = 3\n")
    Path("broken.py").write_text("def data(:\n")
    Path("exits.py").write_text("import sys\nsys.exit(0)\n")
    answer = hdistill("run", "digits", "--smoke", "--data", name, "--out", "new")
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.line
    assert not Path("new").exists()


def test_a_users_function_may_say_what_is_wrong_itself(tmp_path: Path) -> None:
    path = data_file(tmp_path, "from hd_trainer import UserError\nraise UserError('mount the disk first')")
    assert hdistill("run", "digits", "--data", path, "--out", tmp_path / "new").line == "hdistill: mount the disk first"


# ---- good data goes all the way

SHORT_RUN = (
    *("--smoke", "--precision", "fp32", "--model.width", "16", "--model.depth", "1", "--loop.checkpoint-every", "2"),
    *("--teacher.steps", "2", "--trajectory.steps", "2", "--distribution.steps", "2", "--teacher.batch", "8"),
    *("--trajectory.batch", "8", "--distribution.batch", "8", "--distribution.discriminator.layers", "blocks.0"),
    *("--evaluation.samples", "10", "--evaluation.teacher-steps", "1", "--evaluation.timing-repeats", "1"),
)

GOOD: dict[str, str] = {
    "colour without labels": (
        "colours = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), 'uint8')\n"
        "return images_from_arrays('mine', colours)"
    ),
    "grey with 13 classes": "return images_from_arrays('mine', X, np.arange(30) % 13)",
    "latents": (
        "a, b = (InMemory(x=5 * torch.randn(n, 4, 8, 8)) for n in (20, 6))\n"
        "return Dataset(name='mine', train=a, held_out=b, decode=None)"
    ),
    "latents with a decoder": (
        "a, b = (InMemory(x=5 * torch.randn(n, 4, 8, 8)) for n in (20, 6))\n"
        "up = torch.nn.Upsample(scale_factor=2)\n"
        "return Dataset(name='mine', train=a, held_out=b, decode=lambda z: up(z[:, :3]).tanh())"
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_users_data_goes_all_the_way_to_a_report(case: str, tmp_path: Path) -> None:
    path, out = data_file(tmp_path, GOOD[case]), tmp_path / "new"
    answer = hdistill("run", "digits", *SHORT_RUN, "--evaluation.extractors", "none", "--data", path, "--out", out)
    assert answer.code == 0, answer.err
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "No extractor was used" in page
    assert hdistill("sample", out, "--count", "3", "--out", tmp_path / "picture.png").code == 0
