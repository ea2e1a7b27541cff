"""``folder:PATH``: what is a picture and a class, how a picture becomes bytes, the cache, and all that is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_helpers import contents, drawn, hdistill, save_pictures

from hd_trainer import UserError
from hd_trainer.data import ByteImages, Dataset, load_data, read_all
from hd_trainer.data import folder as folders
from hd_trainer.decoding import UnreadableError, decode, read_head
from hd_trainer.evaluation import read_results
from hd_trainer.evaluation.extractors import classifier

# ---- one picture


def grey_ramp(mode: str) -> Image.Image:
    """16 x 16, in 16 bits, the byte 0x12 of every pixel's upper half counting up."""
    return Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)).convert(mode)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_become_the_nearest_eight(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.png" if mode == "I;16" else tmp_path / "deep.tiff"
    grey_ramp(mode).save(path)
    assert read_head(path) == ((16, 16), True)
    assert decode(path, None, 1).flatten().tolist() == list(range(256))
    assert (decode(path, None, 3) == decode(path, None, 1)).all()


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    picture.putpixel((0, 0), (255, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 51))  # a fifth of black
    picture.save(tmp_path / "a.png")
    found = decode(tmp_path / "a.png", None, 3)
    assert found[0, :3].tolist() == [[255, 255, 255], [204, 204, 204], [255, 0, 0]]


@pytest.mark.parametrize("mode", ["LA", "P"])
def test_transparency_of_grey_and_of_palettes_counts_too(mode: str, tmp_path: Path) -> None:
    if mode == "LA":
        Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "a.png")
    else:
        picture = Image.new("P", (2, 2), 3)
        picture.putpalette([0] * 768)
        picture.save(tmp_path / "a.png", transparency=3)
    assert (decode(tmp_path / "a.png", None, 3) == 255).all()


def test_cmyk_is_read_as_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tiff")
    assert decode(tmp_path / "a.tiff", None, 3)[0, 0].tolist() == [255, 0, 0]


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (6, 6), "red"), Image.new("RGB", (6, 6), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert decode(tmp_path / "a.gif", None, 3)[0, 0].tolist() == [255, 0, 0]


def test_it_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 4), "white")
    picture.paste("black", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees: what was left is on top
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_head(tmp_path / "a.png")[0] == (4, 8)
    found = decode(tmp_path / "a.png", None, 1)[..., 0]
    assert (found[:4].max(), found[4:].min()) == (0, 255)


def test_the_centre_square_is_scaled_with_antialiasing(tmp_path: Path) -> None:
    stripes = np.zeros((32, 64), np.uint8)
    stripes[:, 16:48:2] = 255  # in the centre one pixel wide
    Image.fromarray(stripes).save(tmp_path / "a.png")
    # Every other pixel taken would be all black or all white; the mean of both is grey.
    inner = decode(tmp_path / "a.png", 8, 1)[1:-1, 1:-1]
    assert inner.min() > 118
    assert inner.max() < 138
    # A picture that has the size already keeps its pixels.
    assert (decode(tmp_path / "a.png", 32, 1)[..., 0] == stripes[:, 16:48]).all()
    # A smaller one is enlarged.
    Image.new("L", (2, 3), 77).save(tmp_path / "b.png")
    assert (decode(tmp_path / "b.png", 8, 1) == 77).all()


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + 40 * b"\0", b"P5 3 3 255 ab"])
def test_what_is_no_picture_says_so_in_a_few_words(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    for source in (tmp_path / "a.png", content):
        with pytest.raises(UnreadableError) as caught:
            decode(source, 8, 3)
        assert 0 < len(str(caught.value)) <= 80


def test_floating_point_pixels_and_larger_numbers_are_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tiff")
    with pytest.raises(UnreadableError, match="floating-point pixels have no stated range"):
        decode(tmp_path / "a.tiff", None, 1)
    Image.new("I", (4, 4), 70_000).save(tmp_path / "b.tiff")
    with pytest.raises(UnreadableError, match="more than 16 bits"):
        decode(tmp_path / "b.tiff", None, 1)


# ---- a folder


def everything(data: Dataset) -> dict[tuple[float, ...], int]:
    """Label by the pixels, of all samples of both splits; -1 for none."""
    found = {}
    for batch in (read_all(data.reference), read_all(data.held_out)):
        labels = batch.cond["labels"].tolist() if batch.cond else [-1] * len(batch)
        found |= dict(zip(map(tuple, batch.x.flatten(1).tolist()), labels, strict=True))
    return found


def wanted(picture: Image.Image) -> tuple[float, ...]:
    """A picture's sample, computed here."""
    return tuple((torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1).flatten().tolist())


def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    cats, birds = drawn(9, seed=1), drawn(8, seed=2)
    save_pictures(tmp_path / "cat", cats[:5])
    save_pictures(tmp_path / "cat" / "small", cats[5:])
    save_pictures(tmp_path / "Bird", birds, ".bmp")
    save_pictures(tmp_path / ".hidden", drawn(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture, and passed over")
    data = load_data(f"folder:{tmp_path}")
    assert data.classes == ("Bird", "cat")
    assert data.shape == (3, 12, 12)
    assert data.null == {"labels": 2}
    assert everything(data) == {wanted(one): 0 for one in birds} | {wanted(one): 1 for one in cats}


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_that_are_not_utf8_are_read_and_can_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDISTILL_CACHE", str(tmp_path / "cache"))
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "shapes") + b"/caf\xe9"))
    save_pictures(odd, drawn(8))
    save_pictures(tmp_path / "shapes" / "z", drawn(8, seed=1))
    Path(os.fsdecode(os.fsencode(odd) + b"/\xff.png")).write_bytes(b"nothing")
    for limit in (1, 1 << 30):  # through the workers, and here
        monkeypatch.setattr(folders, "LARGE", limit)
        data = load_data(f"folder:{tmp_path / 'shapes'}")
        assert data.classes == ("caf\\udce9", "z")
        assert len(everything(data)) == 16
        assert "1 of 17 pictures cannot be read" in capsys.readouterr().err


def test_a_folder_without_sub_folders_has_no_classes(tmp_path: Path) -> None:
    pictures = drawn(20)
    save_pictures(tmp_path, pictures)
    data = load_data(f"folder:{tmp_path}?held_out=0.25")
    assert (data.classes, data.null) == ((), {})
    assert everything(data) == {wanted(one): -1 for one in pictures}
    assert (len(data.train), len(data.held_out)) == (15, 5)


def test_two_passes_see_the_same_order_whatever_the_folder_lists_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(tmp_path, drawn(20))
    first = read_all(load_data(f"folder:{tmp_path}").train).x
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(list(listed(self))[::-1]))
    assert torch.equal(read_all(load_data(f"folder:{tmp_path}").train).x, first)


def test_grey_pictures_have_one_channel_and_a_single_coloured_one_makes_it_three(tmp_path: Path) -> None:
    grey = [one.convert("L") for one in drawn(12)]
    save_pictures(tmp_path, grey)
    assert load_data(f"folder:{tmp_path}").shape == (1, 12, 12)
    assert load_data(f"folder:{tmp_path}?channels=3").shape == (3, 12, 12)
    drawn(1, seed=5)[0].save(tmp_path / "z.png")
    assert load_data(f"folder:{tmp_path}").shape == (3, 12, 12)
    assert load_data(f"folder:{tmp_path}?channels=1").shape == (1, 12, 12)


def test_with_a_size_all_become_squares_of_it(tmp_path: Path) -> None:
    save_pictures(tmp_path / "a", drawn(8, (30, 20)))
    save_pictures(tmp_path / "b", drawn(8, (9, 14)))
    data = load_data(f"folder:{tmp_path}?size=16&flip=true")
    assert data.shape == (3, 16, 16)
    assert len(data.train) == 2 * len(data.reference) == 2 * (16 - 4)


def test_broken_pictures_are_named_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = drawn(20, (40, 40))
    paths = save_pictures(tmp_path, pictures)
    paths[3].write_bytes(paths[3].read_bytes()[:90])  # a head, and no end
    paths[7].write_bytes(b"nothing")
    data = load_data(f"folder:{tmp_path}")
    told = capsys.readouterr().err
    assert "2 of 20 pictures cannot be read and are left out: 003.png (" in told
    assert "007.png (no picture)" in told
    assert told.count("\n") == 1
    assert everything(data) == {wanted(one): -1 for index, one in enumerate(pictures) if index not in (3, 7)}


# ---- large ones: decoded by worker processes, once


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 40 pictures that counts as a large one; its cache is beside it."""
    monkeypatch.setattr(folders, "LARGE", 1)
    monkeypatch.setenv("HDISTILL_CACHE", str(tmp_path / "cache"))
    save_pictures(tmp_path / "pictures", drawn(40, (30, 20)))
    return tmp_path / "pictures"


def test_workers_and_the_cache_give_what_decoding_here_gives(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (large / "003.png").write_bytes(b"nothing")
    (large / "004.png").write_bytes((large / "004.png").read_bytes()[:90])
    cached = load_data(f"folder:{large}?size=16")
    assert isinstance(cached.train, ByteImages)
    assert isinstance(cached.train.pixels, np.memmap)
    monkeypatch.setattr(folders, "LARGE", 1 << 30)
    assert everything(cached) == everything(load_data(f"folder:{large}?size=16"))
    assert len(everything(cached)) == 38


def test_a_second_load_decodes_nothing_and_a_change_decodes_again(
    large: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (large / "003.png").write_bytes(b"nothing")
    calls: list[int] = []
    decode_files = folders.decode_files

    def counted(files: list[Path], rows: list[int], pixels: np.ndarray, size: int | None) -> dict[int, str]:
        calls.append(len(rows))
        return decode_files(files, rows, pixels, size, workers=1)

    monkeypatch.setattr(folders, "decode_files", counted)
    first = everything(load_data(f"folder:{large}?size=16"))
    capsys.readouterr()
    assert everything(load_data(f"folder:{large}?size=16")) == first
    assert calls == [39]
    assert "1 of 40 pictures cannot be read and are left out: 003.png" in capsys.readouterr().err
    load_data(f"folder:{large}?size=8")
    os.utime(large / "005.png", (1, 1))
    load_data(f"folder:{large}?size=16")
    assert calls == [39, 39, 39]


def test_a_damaged_cache_is_made_again(large: Path, tmp_path: Path) -> None:
    first = everything(load_data(f"folder:{large}?size=16"))
    (kept,) = (tmp_path / "cache" / "pictures").iterdir()
    for name in ("images.npy", "pictures.json"):
        (kept / name).write_bytes(b"{")
        assert everything(load_data(f"folder:{large}?size=16")) == first


def test_what_a_killed_process_left_is_removed_a_day_later(large: Path, tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "pictures"
    for name in (".incomplete-old", ".incomplete-new"):
        (kept / name).mkdir(parents=True)
        (kept / name / "images.npy").write_bytes(b"half")
    for path in (kept / ".incomplete-old" / "images.npy", kept / ".incomplete-old"):
        os.utime(path, (1, 1))
    load_data(f"folder:{large}?size=16")
    assert [path.name for path in kept.glob(".incomplete-*")] == [".incomplete-new"]


def test_a_picture_that_brings_its_decoder_down_is_left_out(
    large: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A picture cannot be made to crash Pillow at will; a worker that exits over one name stands for it.
    script = "import hd_trainer.decoding as d, os, pathlib\nreal = d.decode\n"
    script += "d.decode = lambda path, *rest: os._exit(9) if path.name == '011.png' else real(path, *rest)\nd.serve()\n"
    popen = folders.decode_files.__globals__["subprocess"].Popen

    def start(command: list[str], **settings: object) -> object:
        return popen(
            [*command[:2], command[2].replace("from hd_trainer.decoding import serve; serve()", script)], **settings
        )

    monkeypatch.setattr(folders.decode_files.__globals__["subprocess"], "Popen", start)
    data = load_data(f"folder:{large}?size=16")
    assert "1 of 40 pictures cannot be read and are left out: 011.png (its decoder crashed)" in capsys.readouterr().err
    assert len(everything(data)) == 39


def test_an_interruption_leaves_no_half_cache_and_no_process(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    module = folders.decode_files.__globals__
    popen = module["subprocess"].Popen

    def start(*arguments: object, **settings: object) -> object:
        started.append(popen(*arguments, **settings))
        return started[-1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module["subprocess"], "Popen", start)
    monkeypatch.setitem(module, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_data(f"folder:{large}?size=16")
    assert started
    assert all(process.poll() is not None for process in started)  # type: ignore[attr-defined]
    assert list((tmp_path / "cache" / "pictures").iterdir()) == []


# ---- what is refused, in one line, with nothing written


def few(folder: Path) -> None:
    save_pictures(folder, drawn(3))


def one_class(folder: Path) -> None:
    save_pictures(folder / "cat", drawn(9))


def mixed(folder: Path) -> None:
    save_pictures(folder, drawn(8))
    save_pictures(folder / "cat", drawn(8))


def sizes(folder: Path) -> None:
    save_pictures(folder / "a", drawn(8))
    save_pictures(folder / "b", drawn(8, (20, 16)))


def oblong(folder: Path) -> None:
    save_pictures(folder, drawn(8, (20, 16)))


def broken(folder: Path) -> None:
    for path in save_pictures(folder, drawn(10)):
        path.write_bytes(b"nothing")


def alike(folder: Path) -> None:
    save_pictures(folder, [Image.new("RGB", (8, 8), "white")] * 10)


def odd(folder: Path) -> None:
    save_pictures(folder, drawn(10, (7, 7)))


def good(folder: Path) -> None:
    save_pictures(folder, drawn(10))


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "an empty folder": (Path.mkdir, "", "holds no pictures: give a folder of pictures, or of one sub-folder for each"),
    "no folder": (lambda folder: None, "", "pictures is not there"),
    "a file": (Path.touch, "", "pictures is not a folder"),
    "three pictures": (few, "", "holds 3 picture(s); at least 8 are needed: add some"),
    "one class": (one_class, "", "has one class (cat): name that folder instead, folder:"),
    "pictures beside classes": (mixed, "", "has pictures beside class folders (000.png, cat/): move them"),
    "sizes": (
        sizes,
        "",
        "has pictures of 2 different sizes (a/000.png 12x12, b/000.png 20x16): choose a side, e.g. fol",
    ),
    "oblong": (oblong, "", "has pictures of one size that is not square (000.png 20x16): choose a side"),
    "all broken": (
        broken,
        "",
        "holds 0 picture(s) that can be read, of 10; at least 8 are needed (000.png: no picture)",
    ),
    "all alike": (alike, "", "is one value everywhere: there is nothing to learn"),
    "an odd size": (odd, "", "model: "),
    "size as word": (good, "?size=big", "folder: size must be a whole number from 4 to 4,096; got 'big'"),
    "size of nothing": (good, "?size=0", "folder: size must be a whole number from 4 to 4,096; got 0"),
    "no such option": (good, "?sise=8", "folder: unknown option 'sise'; known: size, channels, flip, held_out"),
    "twice": (good, "?size=8&size=8", "folder: option size needs one value"),
    "two channels": (good, "?channels=2", "folder: channels must be 1 (grey) or 3 (colour); got '2'"),
    "flip": (good, "?flip=yes", "folder: flip must be true or false; got 'yes'"),
    "held out": (good, "?held_out=1", "folder: held_out must be > 0 and <= 0.9; got 1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_a_folder_is_one_line_and_nothing_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDISTILL_CACHE", str(tmp_path / "cache"))
    make, options, message = REFUSED[case]
    make(tmp_path / "pictures")
    before = contents(tmp_path)
    source = f"folder:{tmp_path / 'pictures'}{options}"
    answer = hdistill("run", "digits", "--smoke", "--data", source, "--out", tmp_path / "new")
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.line
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_the_folder_must_be_named() -> None:
    with pytest.raises(UserError, match=r"folder: which folder\? Name it: folder:PATH"):
        load_data("folder")


# ---- all the way


def test_the_digits_recipe_in_its_short_form_goes_from_a_folder_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "FEWEST", 10)
    for name, seed in (("disc", 1), ("more discs", 2)):
        save_pictures(tmp_path / "shapes" / name, drawn(20, seed=seed))
    short = (
        *("--smoke", "--model.width", "16", "--model.depth", "1", "--loop.checkpoint-every", "2"),
        *("--teacher.steps", "2", "--trajectory.steps", "2", "--distribution.steps", "2", "--teacher.batch", "8"),
        *("--trajectory.batch", "8", "--distribution.batch", "8", "--distribution.discriminator.layers", "blocks.0"),
        *("--evaluation.samples", "10", "--evaluation.teacher-steps", "1", "--evaluation.timing-repeats", "1"),
    )
    source = f"folder:{tmp_path / 'shapes'}?size=8&flip=true"
    answer = hdistill("run", "digits", *short, "--data", source, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    last = read_results(tmp_path / "run")[0][-1]
    assert last.name == "distribution"
    assert last.fd is not None  # in the features of a classifier of the two classes
    assert last.accuracy is not None
    assert "FD-classifier" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
