"""Everything wrong that a person can type or point at: one line that says what to do, code 2, nothing written.

What looks odd and is right works; that is here too. The rules for pictures are in docs/data.md.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trainer_helpers import contents, drawn, hdistill, save_pictures

from hd_trainer.data import load_data

#: Most cases are whole runs: they are tried once, beside all other packages.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case starts in an empty folder; the cache is beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HDISTILL_CACHE", str(tmp_path / "cache"))


def refused(*words: object) -> str:
    """The one line with which the command refuses; nothing is on stdout and nothing was written."""
    before = contents(Path())
    answer = hdistill(*words)
    assert (answer.code, answer.out) == (2, "")
    after = {name: content for name, content in contents(Path()).items() if "__pycache__" not in name}
    assert after == before
    assert len(answer.line) < 700
    return answer.line


# ---- a folder of pictures

PICTURES = Path("pictures")


def nothing_but_text() -> None:
    PICTURES.mkdir()
    (PICTURES / "notes.txt").write_text("no picture")


def one_class() -> None:
    save_pictures(PICTURES / "cat", drawn(9))


def three() -> None:
    save_pictures(PICTURES, drawn(3))


def mixed_sizes() -> None:
    save_pictures(PICTURES, drawn(8))
    save_pictures(PICTURES / "more", drawn(1, (20, 20)))
    (PICTURES / "more" / "000.png").rename(PICTURES / "other.png")


def filled_with(content: bytes, suffix: str) -> Callable[[], None]:
    def make() -> None:
        PICTURES.mkdir()
        for number in range(9):
            (PICTURES / f"{number}{suffix}").write_bytes(content)

    return make


def cut_short() -> None:
    for path in save_pictures(PICTURES, drawn(9, (64, 64)), ".jpg"):
        path.write_bytes(path.read_bytes()[:-300])


def links_in_a_circle() -> None:
    PICTURES.mkdir()
    (PICTURES / "a").symlink_to("b")
    (PICTURES / "b").symlink_to("a")
    (PICTURES / "itself").symlink_to(".")
    (PICTURES / "above").symlink_to("..")
    (PICTURES / "picture.png").symlink_to("picture.png")


FOLDERS: dict[str, tuple[Callable[[], None], str]] = {
    "no pictures": (nothing_but_text, "holds no pictures: give a folder of pictures, or of one sub-folder for each"),
    "one class": (one_class, "has one class (cat): name that folder instead, folder:pictures/cat"),
    "three pictures": (three, "holds 3 picture(s); at least 8 are needed: add some"),
    "mixed sizes": (mixed_sizes, "has pictures of 2 different sizes (000.png 12x12, other.png 20x20): choose a side"),
    "empty files": (filled_with(b"", ".png"), "holds 0 picture(s) that can be read, of 9; at least 8 are needed"),
    "text for pictures": (filled_with(b"hello", ".png"), "(0.png: no picture)"),
    "cut short": (cut_short, "holds 0 picture(s) that can be read, of 9; at least 8 are needed (000.jpg: "),
    "links in a circle": (links_in_a_circle, "holds no pictures"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_used(case: str) -> None:
    make, message = FOLDERS[case]
    make()
    for words in (
        ("run", "digits", "--data", "folder:pictures", "--out", "new"),
        ("new", "mine", "--data", "folder:pictures"),
    ):
        assert message in refused(*words)


def test_a_folder_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    save_pictures(PICTURES, drawn(9))
    if os.geteuid() == 0:  # root reads everything: the answer of the system stands in

        def denied(path: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", denied)
        answer = hdistill("run", "digits", "--data", "folder:pictures", "--out", "new")
    else:
        PICTURES.chmod(0)
        try:
            answer = hdistill("run", "digits", "--data", "folder:pictures", "--out", "new")
        finally:
            PICTURES.chmod(0o755)
    assert (answer.code, answer.out) == (2, "")
    assert "pictures cannot be read: Permission denied" in answer.line
    assert not Path("new").exists()


def odd_but_right() -> dict[str, Callable[[Path], object]]:
    """How each picture is saved: all are 12 x 12 when they are read."""
    one, two = drawn(2, seed=7)
    deep = Image.fromarray((np.arange(144, dtype=np.uint16) * 400).reshape(12, 12))
    clear = one.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((12, 12)))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "deep.png": deep.save,
        "cmyk.jpg": one.convert("CMYK").save,
        "moving.gif": lambda path: one.save(path, save_all=True, append_images=[two]),
        "palette.png": lambda path: one.convert("P").save(path, transparency=0),
        "clear.png": clear.save,
        "grey.png": one.convert("LA").save,
        "bits.png": one.convert("1").save,
        "turned.jpg": lambda path: two.save(path, exif=turned),
        "webp.webp": one.save,
        "LOUD.PNG": two.save,
    }


def test_odd_pictures_are_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    save_pictures(PICTURES / "plain", drawn(8))
    (PICTURES / "odd").mkdir()
    for name, save in odd_but_right().items():
        save(PICTURES / "odd" / name)
    (PICTURES / "odd" / "to_plain").symlink_to("../plain")  # a link to a folder below a class is not followed
    (PICTURES / "itself").symlink_to(".")
    data = load_data("folder:pictures")
    assert (data.shape, data.classes) == ((3, 12, 12), ("odd", "plain"))
    assert len(data.train) + len(data.held_out) == 8 + len(odd_but_right())
    assert capsys.readouterr().err == ""


def test_what_cannot_be_read_among_others_is_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    paths = save_pictures(PICTURES, drawn(20, (64, 64)), ".jpg")
    paths[0].write_bytes(b"")
    paths[1].write_text("hello")
    paths[2].write_bytes(paths[2].read_bytes()[:-300])
    data = load_data("folder:pictures")
    assert len(data.train) + len(data.held_out) == 17
    told = capsys.readouterr().err
    assert "3 of 20 pictures cannot be read and are left out: 000.jpg (" in told
    assert "001.jpg (no picture)" in told
    assert told.count("\n") == 1


# ---- an archive

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
LABELS = np.arange(20) % 4


def without_arrays(path: Path) -> None:
    zipfile.ZipFile(path, "w").close()


ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no arrays": (without_arrays, "needs an array images or arr_0; it holds nothing"),
    "other arrays": (lambda path: np.savez(path, x=IMAGES), "needs an array images or arr_0; it holds x"),
    "objects": (
        lambda path: np.savez(path, images=np.array([{}] * 20, dtype=object)),
        "the array images cannot be read (an array of Python objects",
    ),
    "pixels in [0, 1]": (lambda path: np.savez(path, images=IMAGES / 255), "images must be uint8; got float64"),
    "few labels": (lambda path: np.savez(path, images=IMAGES, labels=LABELS[:19]), "labels must be 20 integers"),
    "labels as words": (lambda path: np.savez(path, images=IMAGES, labels=LABELS.astype(str)), "must be 20 integers"),
    "one label": (lambda path: np.savez(path, images=IMAGES, labels=LABELS * 0), "labels hold one class, 0"),
    "negative labels": (lambda path: np.savez(path, images=IMAGES, labels=LABELS - 1), "must lie in 0..99999; got -1"),
    "five images": (lambda path: np.savez(path, images=IMAGES[:5]), "5 image(s); at least 8 are needed"),
    "two dimensions": (lambda path: np.savez(path, images=IMAGES[0]), "images must be (N, H, W)"),
    "oblong": (lambda path: np.savez(path, images=IMAGES[:, :6]), "square"),
    "an odd side": (lambda path: np.savez(path, images=IMAGES[:, :7, :7]), "7"),
    "text": (lambda path: path.write_text("hello"), "is no .npz archive"),
    "cut short": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), "is no .npz archive"),
    "a folder": (Path.mkdir, "mine.npz is not a file"),
    "absent": (lambda path: None, "mine.npz is not there"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_cannot_be_used(case: str) -> None:
    make, message = ARCHIVES[case]
    make(Path("mine.npz"))
    for words in (
        ("run", "digits", "--data", "npz:mine.npz", "--out", "new"),
        ("new", "mine", "--data", "npz:mine.npz"),
    ):
        assert message in refused(*words)


# ---- functions of one's own

FUNCTIONS = """
import sys
import numpy as np
import torch
from hd_trainer import Settings, UserError, load_recipe
from hd_trainer.data import Dataset, InMemory, images_from_arrays

IMAGES, LABELS = np.zeros((20, 8, 8), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None], np.arange(20) % 4
def raising(): raise KeyError("x")
def leaving(): sys.exit(3)
def leaving_well(): sys.exit()
def falling(): return falling()
class Odd(BaseException): pass
def odd(): raise Odd("really")
class Silent(Exception):
    def __str__(self): raise ValueError("no word")
def silent(): raise Silent
def long(): raise ValueError("long\\n" * 1000)
def none(): return None
def a_class(): return Settings
def a_dict(): return {"data": "digits"}
def needing(argument): return argument
def few_labels(): return images_from_arrays("mine", IMAGES, LABELS[:3])
def whole_numbers(): return images_from_arrays("mine", IMAGES.astype(int))
def words(): return images_from_arrays("mine", np.array(["a"] * 20))
def in_255(): return images_from_arrays("mine", IMAGES.astype(float))
def vectors(): return images_from_arrays("mine", IMAGES.reshape(20, 64))
def doubles():
    x = torch.rand(20, 1, 8, 8, dtype=torch.float64)
    return Dataset(name="mine", train=InMemory(x=x), held_out=InMemory(x=x))
def two_shapes():
    return Dataset(name="mine", train=InMemory(x=torch.rand(20, 1, 8, 8)), held_out=InMemory(x=torch.rand(20, 1, 4, 4)))
def untyped():
    full = load_recipe("digits")
    stages = {name: getattr(full, name) for name in ("teacher", "trajectory", "distribution")}
    return Settings(recipe="x", data=None, **stages)
def half():
    full = load_recipe("digits")
    return Settings(recipe="x", data="digits", teacher=None, trajectory=full.trajectory, distribution=full.distribution)
NUMBER = 3
"""

#: By function: what is said of it as a recipe, and as data.
WRONG_FUNCTIONS = {
    "raising": "raised KeyError: 'x'",
    "leaving": "raised SystemExit: 3",
    "leaving_well": "raised SystemExit",
    "falling": "raised RecursionError: maximum recursion depth exceeded",
    "odd": "raised Odd: really",
    "silent": "raised Silent",
    "long": "raised ValueError: long long",
    "none": "; got NoneType",
    "a_class": "; got type",
    "a_dict": "; got dict",
    "needing": "raised TypeError: needing() missing 1 required positional argument",
    "NUMBER": "has no function 'NUMBER'; it has",
    "absent": "has no function 'absent'; it has",
}
WRONG_DATA = {
    "few_labels": "labels must be 20 integers, one per image",
    "whole_numbers": "images must be uint8, or floating in [-1, 1]; got torch.int64",
    "words": "images are no array of numbers",
    "in_255": "must lie in [-1, 1]; got [",
    "vectors": "images must be (N, H, W), (N, C, H, W) or (N, H, W, C); got (20, 64)",
    "doubles": "must be float32 tensors; got torch.float64",
    "two_shapes": "held_out has samples (1, 4, 4), train (1, 8, 8)",
}
WRONG_RECIPES = {
    "untyped": "data must be str; got None",
    "half": "teacher",
    "few_labels": "labels must be 20 integers",
}


@pytest.mark.parametrize("name", WRONG_FUNCTIONS | WRONG_RECIPES)
def test_a_recipe_that_cannot_be_used(name: str) -> None:
    Path("mine.py").write_text(FUNCTIONS)
    message = (WRONG_FUNCTIONS | WRONG_RECIPES)[name]
    for command in (("run",), ("train", "teacher")):
        assert message in refused(*command, f"mine.py:{name}", "--out", "new")


@pytest.mark.parametrize("name", WRONG_FUNCTIONS | WRONG_DATA)
def test_data_of_ones_own_that_cannot_be_used(name: str) -> None:
    Path("mine.py").write_text(FUNCTIONS)
    message = (WRONG_FUNCTIONS | WRONG_DATA)[name]
    assert message in refused("run", "digits", "--data", f"mine.py:{name}", "--out", "new")
    assert message in refused("new", "other", "--data", f"mine.py:{name}")


FILES: dict[str, tuple[str | bytes | None, str]] = {
    "raises": ("raise OSError('at once')", "mine.py cannot be imported: OSError: at once"),
    "leaves": ("import sys; sys.exit(5)", "mine.py cannot be imported: SystemExit: 5"),
    "falls": ("def f(): return f()\nf()", "mine.py cannot be imported: RecursionError"),
    "imports itself": ("import mine_that_is_absent", "No module named 'mine_that_is_absent'"),
    "no Python": ("def recipe(:", "mine.py cannot be imported: SyntaxError"),
    "no text": (b"\x00\xff\xfe", "mine.py cannot be imported"),
    "empty": ("", "mine.py has no function 'recipe'; it has none"),
    "absent": (None, "no file mine.py"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_imported(case: str) -> None:
    content, message = FILES[case]
    if content is not None:
        Path("mine.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused("run", "mine.py", "--out", "new")


def test_folders_and_other_files_in_place_of_a_recipe() -> None:
    for name in ("folder.py", "folder.json", "runs/old"):
        Path(name).mkdir(parents=True)
    Path("runs/old/recipe.json").write_text("{")
    assert "no file folder.py" in refused("run", "folder.py")
    assert "folder.json cannot be read (Is a directory)" in refused("run", "folder.json")
    assert "(did you mean runs/old/recipe.json?)" in refused("run", "runs/old")
    assert "runs/old/recipe.json is not JSON" in refused("run", "runs/old/recipe.json")
    assert "no file absent.json" in refused("run", "absent.json")


# ---- the command line

LINES = {
    "run": "needs a recipe first",
    "run digits --data digits --data fashion": "--data is given more than once",
    "run digits --teacher.batch 4 --teacher.batch=8": "--teacher.batch is given more than once",
    "run digits --date digits": "Unrecognized options: --date",
    "run digits --teacher.batch -4": "batch must be a whole number from 1 to 1,000,000; got -4",
    "run digits --teacher.steps 1.5": "--teacher.steps",
    "run digits --model.width -64": "width must be a whole number from 1 to 65,536; got -64",
    "run digits --model.width 65536": "--model.width and --model.depth: this needs",
    "run digits --model.width 4096 --model.depth 1024": "--model.width and --model.depth: this needs",
    "run digits --model.depth 99999": "depth must be a whole number from 1 to 1,024; got 99999",
    "run digits --distribution.batch 1000000": "--distribution.batch: this needs",
    "run digits --teacher.steps 99999999999": "steps must be a whole number from 1 to 100,000,000",
    "run digits --data folder:": "folder: which folder? Name it: folder:PATH",
    "run digits --data ftp:there": "unknown data set 'ftp:there'",
    "run digits --out /dev/null/x": "/dev/null",
    "run digits --dry-run --out /dev/null/x": "/dev/null is not a folder; choose another --out",
    "run digits --dry-run --teacher.steps 0": "steps must be a whole number",
    "run digits --smoke --smoke=3": "--smoke",
    "list": "hdistill list shows: ",
    "list colours": "hdistill list shows: ",
    "list recipes more": "hdistill list recipes takes nothing more; got more",
    "new": "--data",
    "new mine": "--data",
    "new --data digits": "name",
    "new 2nd --data digits": "a recipe's name must be a Python name",
    "new my-recipe --data digits": "a recipe's name must be a Python name",
    "new ../mine --data digits": "a recipe's name must be a Python name",
    "new class --data digits": "a recipe's name must be a Python name",
    "new digits --data digits": "digits is a recipe that comes with hdistill; choose another name",
    "new torch --data digits": "torch.py would hide the Python module 'torch'; choose another name",
    "new json --data digits": "json.py would hide the Python module 'json'; choose another name",
    "new mine --data digits --out mine.txt": "a recipe's file must end in .py; got mine.txt",
    "new mine --data digits --out absent/mine.py": "no folder absent; make it first",
    "new mine --data digits --minutes 0": "minutes must be > 0",
    "new mine --data nothing": "unknown data set 'nothing'",
    "new mine --data digits --device toaster": 'device "toaster" cannot be used here',
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_cannot_be_meant(line: str) -> None:
    assert LINES[line] in refused(*line.split())


def test_memory_that_runs_out_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from hd_trainer import pipeline

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(pipeline, "check", full)
    assert "lower --teacher.batch and its like" in refused("run", "digits", "--out", "new")
