"""``hdistill evaluate PATH --against ...``: others' pictures in the same table, and published statistics."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_helpers import drawn, hdistill, save_pictures

from hd_trainer import UserError
from hd_trainer.data import load_data, load_digits, read_all
from hd_trainer.evaluation import Meter, load_extractors
from hd_trainer.evaluation.distances import frechet_distance
from hd_trainer.evaluation.extractors import extract
from hd_trainer.evaluation.numpy_pickle import read_pickled_arrays, walk
from hd_trainer.evaluation.statistics import read_statistics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv("HDISTILL_CACHE", str(tmp_path / "cache"))


def features_file(folder: Path) -> Path:
    """An extractor of three features: mean red, green and blue."""
    path = folder / "colours.py"
    path.write_text("def features(images):\n    return images.mean(dim=(2, 3)).expand(-1, 3)\n")
    return path


def bytes_of(data: Any, number: int) -> np.ndarray:
    """Held-out pictures (N, H, W, C) uint8."""
    x = read_all(data.held_out, number).x
    pixels: np.ndarray = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def test_an_npz_is_measured_as_the_same_samples_of_a_run_are(tmp_path: Path) -> None:
    digits = load_digits()
    labels = read_all(digits.held_out, 200).cond["labels"]
    np.savez(tmp_path / "theirs.npz", bytes_of(digits, 200), labels.numpy())
    answer = hdistill("evaluate", tmp_path / "theirs.npz", "--against", "digits")
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "theirs.npz.evaluation.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["held-out data", "theirs.npz"]
    meter = Meter(digits, load_extractors((), digits, CPU))
    expected = meter.measure(read_all(digits.held_out, 200).x, {"labels": labels})
    ours = found["rows"][1]
    assert ours["samples"] == 200
    for name in ("fd", "kid", "precision", "recall", "density", "coverage", "accuracy", "nearest", "deviation"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-6), name
    assert "FD-digits" in answer.out
    assert found["extractors"][0]["name"] == "digits"


def test_a_folder_is_measured_as_the_npz_of_its_pictures(tmp_path: Path) -> None:
    save_pictures(tmp_path / "data", drawn(60))
    pictures = drawn(30, seed=7)
    save_pictures(tmp_path / "made", pictures)
    np.savez(tmp_path / "made.npz", arr_0=np.stack([np.asarray(one) for one in pictures]))
    rows = {}
    for name in ("made", "made.npz"):
        out = tmp_path / f"{name}.json"
        extractors = ("--extractors", features_file(tmp_path))
        answer = hdistill(
            "evaluate", tmp_path / name, "--against", f"folder:{tmp_path / 'data'}", *extractors, "--out", out
        )
        assert answer.code == 0, answer.err
        rows[name] = json.loads(out.read_text())["rows"][-1]
        assert rows[name].pop("name") == name
    assert rows["made"] == rows["made.npz"]
    assert rows["made"]["fd"] > 0
    assert rows["made"]["samples"] == 30
    assert rows["made"]["accuracy"] is None


def test_a_folder_of_other_sizes_is_scaled_when_asked(tmp_path: Path) -> None:
    save_pictures(tmp_path / "data", drawn(30))
    save_pictures(tmp_path / "large", drawn(20, size=(31, 24), seed=3))
    against = ("--against", f"folder:{tmp_path / 'data'}", "--extractors", features_file(tmp_path))
    assert hdistill("evaluate", f"{tmp_path / 'large'}?size=12", *against).code == 0
    answer = hdistill("evaluate", tmp_path / "large", *against)
    assert answer.code == 2
    assert "?size=" in answer.line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.mkdir(), "holds no pictures"),
        (lambda path: save_pictures(path, drawn(4, (8, 8))), "at least 10 are needed"),
        (lambda path: save_pictures(path, drawn(12, (9, 9))), "pictures of 9x9 in grey, the data set 'digits' of 8x8"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "made")
    answer = hdistill("evaluate", tmp_path / "made", "--against", "digits")
    assert answer.code == 2
    assert message in answer.line
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((20, 8, 8, 1), np.uint8)}, "needs an array images or arr_0"),
        ({"arr_0": np.zeros((20, 8, 8, 1))}, "must be uint8"),
        ({"arr_0": np.zeros((20, 8, 8, 3), np.uint8)}, "of 8x8 in colour, the data set 'digits' of 8x8 in grey"),
        (
            {"arr_0": np.zeros((20, 8, 8, 1), np.uint8), "arr_1": np.full(20, 10)},
            "labels must be 20 integers from 0 to 9",
        ),
    ],
)
def test_what_is_wrong_with_an_npz_is_one_line(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "made.npz", **arrays)
    answer = hdistill("evaluate", tmp_path / "made.npz", "--against", "digits")
    assert answer.code == 2
    assert message in answer.line


def test_a_run_is_evaluated_in_other_extractors(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    answer = hdistill("evaluate", tmp_path / "run", "--extractors", "digits", features_file(tmp_path))
    assert answer.code == 0, answer.err
    assert "FD-colours" in answer.out
    before = json.loads((finished / "evaluation.json").read_text())["rows"]
    after = json.loads((tmp_path / "run/evaluation.json").read_text())["rows"]
    assert [row["fd"] for row in after] == [row["fd"] for row in before]
    assert all(row["further"]["colours"]["fd"] > 0 for row in after)
    answer = hdistill("report", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert "FD-colours" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_a_run_takes_no_place_for_its_numbers(finished: Path, tmp_path: Path) -> None:
    answer = hdistill("evaluate", finished, "--out", tmp_path / "numbers.json")
    assert answer.code == 2
    assert "--out and --device are for pictures, with --against" in answer.line


# ---- statistics


def moments(width: int = 3) -> dict[str, np.ndarray]:
    """mu and sigma of some features."""
    x = np.random.default_rng(0).normal(size=(50, width)) @ np.diag(np.arange(1.0, width + 1))
    return {"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False)}


def write(path: Path, kind: str) -> Path:
    """Statistics in one of the forms in which they are handed around."""
    found = moments()
    if kind == "adm.npz":
        np.savez(
            path / kind, **found, mu_s=np.zeros(7), sigma_s=np.zeros((7, 7)), arr_0=np.zeros((2, 4, 4, 3), np.uint8)
        )
    elif kind == "tensors.pt":
        torch.save({name: torch.from_numpy(value) for name, value in found.items()}, path / kind)
    elif kind == "arrays.pt":
        torch.save(found, path / kind)
    else:
        protocol = int(kind[7])
        content = {"fid": found, "fd_dinov2": moments(5), "num_images": np.int64(50)}
        (path / kind).write_bytes(pickle.dumps(content, protocol=protocol))
    return path / kind


FORMS = ["adm.npz", "tensors.pt", "arrays.pt", "edm2_p_2.pkl", "edm2_p_4.pkl", "edm2_p_5.pkl"]


@pytest.mark.parametrize("kind", FORMS)
def test_statistics_are_read_in_every_form(kind: str, tmp_path: Path) -> None:
    found = read_statistics(write(tmp_path, kind), 3)
    assert np.allclose(found.mean, moments()["mu"], rtol=1e-12)
    assert np.allclose(found.covariance, moments()["sigma"], rtol=1e-12)


@pytest.mark.parametrize("kind", ["adm.npz", "edm2_p_4.pkl"])
def test_pictures_against_statistics_have_a_distance_and_nothing_else(kind: str, tmp_path: Path) -> None:
    save_pictures(tmp_path / "made", drawn(40))
    extractor = features_file(tmp_path)
    against = ("--against", f"stats:{write(tmp_path, kind)}")
    answer = hdistill("evaluate", tmp_path / "made", *against, "--extractors", extractor)
    assert answer.code == 0, answer.err
    (row,) = json.loads((tmp_path / "made.evaluation.json").read_text())["rows"]
    data = load_data(f"folder:{tmp_path / 'made'}")
    images = torch.cat([read_all(data.train).x, read_all(data.held_out).x])
    features = extract(load_extractors((str(extractor),), data, CPU)[0], images)[0]
    reference = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 3)) @ np.diag(np.arange(1.0, 4)))
    assert row["fd"] == pytest.approx(frechet_distance(features, reference), rel=1e-6)
    assert row["samples"] == 40
    assert all(row[name] is None for name in ("kid", "precision", "nearest", "deviation"))
    answer = hdistill("evaluate", tmp_path / "made", *against)
    assert answer.code == 2
    assert "statistics belong to one extractor" in answer.line


def test_statistics_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "edm2_p_4.pkl")
    with pytest.raises(UserError, match=r"of 2048 features; its means are of shape \(3,\), \(5,\)"):
        read_statistics(path, 2048)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.arange(9.0).reshape(3, 3))
    with pytest.raises(UserError, match="not symmetric"):
        read_statistics(tmp_path / "odd.npz", 3)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot be read as statistics"):
        read_statistics(path, 3)
    with pytest.raises(UserError, match="no file"):
        read_statistics(tmp_path / "none.npz", 3)


class Evil:
    """What a pickle may be made of."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_no_pickle_is_run(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"mu": Evil(mark)}, protocol=protocol))
    with pytest.raises(ValueError, match=r"asks for|uses"):
        read_pickled_arrays(tmp_path / "evil.pkl")
    assert not mark.exists()


def test_a_damaged_pickle_is_a_value_error() -> None:
    whole = pickle.dumps({"fid": moments(), "note": "a", "list": [1, 2.5, (3, None, True)]})
    assert walk(whole)["list"] == [1, 2.5, [3, None, True]]
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[random.integers(len(damaged))] = random.integers(256)
        try:
            walk(bytes(damaged[: random.integers(len(damaged))]))
        except ValueError:
            refused += 1
    assert refused > 250
    for objects in (np.array(["text"], dtype=object), np.array([{}])):
        with pytest.raises(ValueError, match="dtype"):
            walk(pickle.dumps({"mu": objects}))


# ---- samples as an archive


def test_samples_go_into_an_npz_part_by_part(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hd_trainer.sample.NPZ_BATCH", 7)
    answer = hdistill("sample", finished, "--count", 25, "--out", tmp_path / "samples.npz")
    assert answer.code == 0, answer.err
    assert answer.out == f"Wrote {tmp_path / 'samples.npz'}: 25 images\n"
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        pixels, labels = archive["arr_0"], archive["arr_1"]
    assert (pixels.shape, pixels.dtype) == ((25, 8, 8, 1), np.uint8)
    assert labels.tolist() == [i % 10 for i in range(25)]
    # They are the pictures of the grid.
    assert hdistill("sample", finished, "--count", 25, "--out", tmp_path / "grid.png").code == 0
    from PIL import Image

    with Image.open(tmp_path / "grid.png") as picture:
        grid = np.asarray(picture.convert("L"))
    for i in range(25):
        cell = grid[i // 10 * 36 + 4 :: 4, i % 10 * 36 + 4 :: 4][:8, :8]
        assert np.abs(cell.astype(int) - pixels[i, :, :, 0]).max() <= 1
    # And they can be measured.
    assert hdistill("evaluate", tmp_path / "samples.npz", "--against", "digits").code == 0


def test_an_npz_that_fails_leaves_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> Any:
        raise OSError("the disk is full")

    monkeypatch.setattr("hd_trainer.sample.to_levels", broken)
    answer = hdistill("sample", finished, "--count", 5, "--out", tmp_path / "samples.npz")
    assert answer.code == 2
    assert "the disk is full" in answer.line
    assert list(tmp_path.iterdir()) == []
