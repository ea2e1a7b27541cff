"""Weights on disk: bitwise round trips, all-or-nothing writes, and files that are damaged or hostile."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hd_zoo import checkpoint, create_model, from_pretrained, read_config, save_pretrained, to_student

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def network(randomised: Callable[..., nn.Module]) -> nn.Module:
    return randomised(create_model("dit_nano_2", width=16, depth=1, classes=3, time_scale=2.0))


@pytest.fixture
def folder(network: nn.Module, tmp_path: Path) -> Path:
    return save_pretrained(network, tmp_path / "deep" / "model", metadata={"step": 7})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["dit_nano_2", "mlp_2d"])
def test_round_trip_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path, randomised: Callable[..., nn.Module], batch: Any
) -> None:
    saved = randomised(to_student(create_model(name, classes=3))).to(dtype).train()
    found = from_pretrained(save_pretrained(saved, str(tmp_path)))
    assert not found.training
    assert saved.state_dict().keys() == found.state_dict().keys()
    for key, tensor in saved.state_dict().items():
        assert found.state_dict()[key].dtype == dtype
        assert torch.equal(tensor, found.state_dict()[key]), key
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in found.parameters())
    x, t, r, labels = batch(saved)
    assert torch.equal(found(x.to(dtype), t, r, labels=labels), saved.eval()(x.to(dtype), t, r, labels=labels))
    assert (found.architecture, found.arguments) == (saved.architecture, saved.arguments)


def test_dtype_casts_on_loading(network: nn.Module, folder: Path) -> None:
    found = from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    for key, tensor in network.state_dict().items():
        assert torch.equal(found[key], tensor.bfloat16())


def test_what_is_in_the_folder(folder: Path) -> None:
    assert sorted(contents(folder)) == [CONFIG, WEIGHTS]
    config = json.loads((folder / CONFIG).read_text())
    assert config["architecture"] == "transformer"
    assert config["arguments"]["width"] == 16
    assert config["arguments"]["time_scale"] == 2.0
    assert config == read_config(folder)
    assert config["metadata"] == {"step": 7}
    assert os.stat(folder / WEIGHTS).st_mode & 0o777 == 0o644


def test_loading_draws_no_random_numbers_and_the_copy_is_its_own(network: nn.Module, folder: Path) -> None:
    state = torch.get_rng_state()
    found = from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(1)
    assert torch.equal(from_pretrained(folder).patch_embed.weight, network.patch_embed.weight)


def test_a_loaded_network_can_be_saved_over_itself_and_trained(folder: Path, batch: Any) -> None:
    before = contents(folder)
    found = from_pretrained(folder)
    save_pretrained(found, folder, metadata={"step": 7})
    assert contents(folder) == before
    x, t, _, labels = batch(found)
    found(x, t, labels=labels).square().sum().backward()
    assert all(parameter.grad is not None for parameter in found.parameters())


@pytest.mark.parametrize("victim", ["weights", "config"])
def test_a_failure_in_the_middle_leaves_the_old_files(
    victim: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)

    def fail_after_half(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    if victim == "weights":
        monkeypatch.setattr(checkpoint, "save_file", fail_after_half)
    else:
        # The weights are written by then, under their temporary name.
        monkeypatch.setattr(Path, "write_text", lambda self, text, **_: fail_after_half(text, self))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(create_model("mlp_2d"), folder)
    assert contents(folder) == before


def test_the_first_write_is_all_or_nothing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(create_model("mlp_2d"), tmp_path)
    assert contents(tmp_path) == {}


def test_a_folder_that_cannot_be_written(tmp_path: Path, network: nn.Module) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        save_pretrained(network, tmp_path / "file" / "model")
    assert contents(tmp_path) == {"file": b"in the way"}


def test_what_cannot_be_saved(tmp_path: Path, network: nn.Module) -> None:
    with pytest.raises(ValueError, match="create_model, to_student or from_pretrained is needed; got Linear"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(TypeError, match="serializable"):
        save_pretrained(network, tmp_path / "a", metadata={"loss": torch.ones(1)})
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("missing", [WEIGHTS, CONFIG])
def test_missing_files(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {missing} in .*: a model folder holds"):
        from_pretrained(folder)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read, is damaged or not safetensors"):
        from_pretrained(folder)


def test_a_pickle_is_not_opened(folder: Path) -> None:
    torch.save({"weight": torch.ones(2)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="not safetensors"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("patch_embed.weight"), "missing patch_embed.weight"),
        (lambda w: w.update(extra=torch.ones(1)), "unexpected extra"),
        (
            lambda w: w.update({"patch_embed.bias": torch.ones(3)}),
            r"patch_embed.bias has shape \(3,\), not \(16,\)",
        ),
        (
            lambda w: w.update({"patch_embed.bias": torch.ones(16, dtype=torch.int8)}),
            "patch_embed.bias has dtype torch.int8, not a floating-point one",
        ),
        (lambda w: [w.pop(key) for key in list(w) if "blocks" in key], r"missing blocks.*; and \d+ more"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"does not fit its config\.json: .*{message}"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "os.system"}, r"unknown architecture 'os\.system'"),
        ({"architecture": ["transformer"]}, "lacks an architecture"),
        ({"architecture": None}, "lacks an architecture"),
        ({"arguments": [1, 2]}, "or its arguments"),
        ({"arguments": {}}, "cannot build 'transformer'"),
        ({"arguments": {"__class__": "x"}}, "unknown argument '__class__'"),
        ({"arguments": {"width": "16; import os"}}, "'width' of 'transformer' must be int"),
        ({"arguments": {"depth": [1]}}, "'depth' of 'transformer' must be int"),
        ({"format": "hd-zoo/2"}, 'does not say "format": "hd-zoo/1"'),
        ({"format": None}, "not a model of this package"),
    ],
)
def test_hostile_configurations(folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("size", [2**40, 2**62, -4])
def test_absurd_sizes_are_refused_before_any_memory_is_taken(folder: Path, size: int) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["arguments"]["width"] = size
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot build|does not fit|must be"):
        from_pretrained(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b'"hd-zoo/1"', b"null"])
def test_configurations_that_are_not_ours(folder: Path, text: bytes) -> None:
    (folder / CONFIG).write_bytes(text)
    for read in (from_pretrained, read_config):
        with pytest.raises(ValueError, match=r"config\.json (is not JSON|does not say)"):
            read(folder)
