"""Weights on disk: bitwise round trips, all-or-nothing writes, and files that are damaged or hostile."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zoo_helpers import draw_batch, randomised

from hd_zoo import create_model, from_pretrained, read_config, save_pretrained, to_student

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def network() -> nn.Module:
    return randomised(create_model("dit_nano_2", width=16, depth=1, classes=3, time_scale=2.0))


@pytest.fixture
def folder(network: nn.Module, tmp_path: Path) -> Path:
    return save_pretrained(network, tmp_path / "deep" / "model", metadata={"step": 7})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["dit_nano_2", "mlp_2d"])
def test_round_trip_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved = randomised(to_student(create_model(name, classes=3))).to(dtype).train()
    found = from_pretrained(save_pretrained(saved, str(tmp_path)))
    assert not found.training
    assert saved.state_dict().keys() == found.state_dict().keys()
    for key, tensor in saved.state_dict().items():
        assert found.state_dict()[key].dtype == dtype
        assert torch.equal(tensor, found.state_dict()[key]), key
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in found.parameters())
    x, t, r, labels = draw_batch(saved)
    assert torch.equal(found(x.to(dtype), t, r, labels=labels), saved.eval()(x.to(dtype), t, r, labels=labels))
    assert (found.architecture, found.arguments) == (saved.architecture, saved.arguments)


def test_names_of_arguments_before_are_still_read(tmp_path: Path) -> None:
    """``interval`` and ``heads``, today ``r_embedding`` and ``num_heads``."""
    saved = to_student(create_model("dit_nano_2", width=16, depth=1, num_heads=2))
    folder = save_pretrained(saved, tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    config["format"] = "hd-zoo/1"
    for then, now in (("interval", "r_embedding"), ("heads", "num_heads")):
        config["arguments"][then] = config["arguments"].pop(now)
    (folder / CONFIG).write_text(json.dumps(config))
    found = from_pretrained(folder)
    assert found.arguments == saved.arguments
    for key, tensor in saved.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor)
    config["arguments"]["num_heads"] = 2
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown argument 'heads'"):  # both names: which is meant?
        from_pretrained(folder)


@pytest.mark.parametrize(("norm", "eps"), [("layer", 1e-6), ("rms", None)])
def test_queries_of_networks_before_keep_their_norm(norm: str, eps: float | None, tmp_path: Path) -> None:
    """``qk_norm: true`` was the blocks' kind, with an eps of 1e-6 for LayerNorm too."""
    saved = randomised(create_model("dit_nano_2", width=16, depth=1, norm=norm, qk_norm=norm, qk_norm_eps=eps)).eval()
    folder = save_pretrained(saved, tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    config["format"] = "hd-zoo/1"
    config["arguments"]["qk_norm"] = True
    del config["arguments"]["qk_norm_eps"]
    (folder / CONFIG).write_text(json.dumps(config))
    found = from_pretrained(folder)
    assert found.blocks[0].attn.q_norm.eps == found.blocks[0].attn.k_norm.eps == 1e-6
    x, t, _, _ = draw_batch(saved)
    assert torch.equal(found(x, t), saved(x, t))
    config["arguments"]["qk_norm"] = False
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected blocks\.0\.attn\.k_norm"):
        from_pretrained(folder)


def test_no_early_blocks_stood_for_the_usual_number_before(tmp_path: Path) -> None:
    saved = create_model("dit_nano_2", width=16, depth=7, r_embedding="decoupled", early_blocks=0)
    folder = save_pretrained(saved, tmp_path)
    assert from_pretrained(folder).early_blocks == 0
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "format": "hd-zoo/1"}))
    assert from_pretrained(folder).early_blocks == 5


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


def test_a_loaded_network_can_be_saved_over_itself_and_trained(folder: Path) -> None:
    before = contents(folder)
    found = from_pretrained(folder)
    save_pretrained(found, folder, metadata={"step": 7})
    assert contents(folder) == before
    x, t, _, labels = draw_batch(found)
    found(x, t, labels=labels).square().sum().backward()
    assert all(parameter.grad is not None for parameter in found.parameters())


@pytest.mark.parametrize("victim", ["weights", "config"])
def test_a_failure_in_the_middle_leaves_the_old_files(
    victim: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)

    def fail_after_half(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    if victim == "weights":
        monkeypatch.setattr("hd_zoo.weights.shards.save_file", fail_after_half)
    else:
        # The weights are written by then, under their temporary name.
        monkeypatch.setattr(Path, "write_text", lambda self, text, **_: fail_after_half(text, self))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(create_model("mlp_2d"), folder)
    assert contents(folder) == before


def test_the_first_write_is_all_or_nothing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path, **_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hd_zoo.weights.shards.save_file", fail)
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
            "patch_embed.bias holds other than floating-point numbers",
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
        ({"format": "hd-zoo/4"}, 'does not say "format": "hd-zoo/3"'),
        ({"arguments": {"depth": 10**12}}, "1000000000000 blocks, but 22 tensors"),
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


INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(network: nn.Module, tmp_path: Path) -> Path:
    return save_pretrained(network, tmp_path / "sharded", shard_bytes=4000)


def test_shards_and_their_index(network: nn.Module, sharded: Path) -> None:
    names = sorted(contents(sharded))
    shards = [name for name in names if name.startswith("model-")]
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert names == sorted([CONFIG, INDEX, *shards])
    index = json.loads((sharded / INDEX).read_text())
    state = network.state_dict()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    found: dict[str, Any] = {}
    for shard in shards:
        part = load_file(sharded / shard)
        assert all(index["weight_map"][name] == shard for name in part)
        # At most the size asked for, unless one tensor alone is larger: none is cut.
        assert sum(tensor.nbytes for tensor in part.values()) <= 4000 or len(part) == 1
        assert not found.keys() & part.keys()
        found.update(part)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("shard_bytes", [1, 1000, 4000, 20_000, 10**9])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_shards_load_bit_for_bit(
    shard_bytes: int, dtype: torch.dtype | None, network: nn.Module, tmp_path: Path
) -> None:
    found = from_pretrained(save_pretrained(network, tmp_path, shard_bytes=shard_bytes), dtype=dtype)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**9)
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor if dtype is None else tensor.to(dtype)), name
    if dtype is None:
        x, t, _, labels = draw_batch(network)
        assert torch.equal(found(x, t, labels=labels), network.eval()(x, t, labels=labels))


def test_no_file_of_an_earlier_save_is_left(network: nn.Module, tmp_path: Path) -> None:
    alone = save_pretrained(network, tmp_path / "alone")
    expected = {
        size: set(contents(save_pretrained(network, tmp_path / str(size), shard_bytes=size))) for size in (1500, 6000)
    }
    assert len(expected[1500]) > len(expected[6000]) > 4
    for size in (1500, 6000, 1500):
        save_pretrained(network, alone, shard_bytes=size)
        assert set(contents(alone)) == expected[size]
        assert torch.equal(from_pretrained(alone).patch_embed.weight, network.patch_embed.weight)
    save_pretrained(network, alone)
    assert set(contents(alone)) == {CONFIG, WEIGHTS}
    assert from_pretrained(alone).arguments == network.arguments


def test_files_of_others_are_left_alone(network: nn.Module, folder: Path) -> None:
    others = ("optimiser.safetensors", "model.txt", "model-card.safetensors")
    for name in others:
        (folder / name).write_text("mine")
    save_pretrained(network, folder, shard_bytes=2000)
    save_pretrained(network, folder)
    assert {name: text for name, text in contents(folder).items() if name in others} == dict.fromkeys(others, b"mine")


@pytest.mark.parametrize("before", ["single", "sharded"])
@pytest.mark.parametrize("victim", [0, 2, "index"])
def test_a_failing_shard_leaves_the_old_files(
    victim: int | str, before: str, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = create_model("mlp_2d", width=16)
    save_pretrained(old, tmp_path, shard_bytes=10**9 if before == "single" else 1000)
    kept, calls = contents(tmp_path), []

    def fail(path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    def save(tensors: Any, path: Path, **more: Any) -> None:
        calls.append(path)
        if len(calls) - 1 == victim:
            fail(path)
        save_file(tensors, path, **more)

    monkeypatch.setattr("hd_zoo.weights.shards.save_file", save)
    if victim == "index":
        monkeypatch.setattr(Path, "write_text", lambda self, text, **_: fail(self))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(network, tmp_path, shard_bytes=4000)
    assert len(calls) == (victim + 1 if isinstance(victim, int) else len(calls)) > 0
    monkeypatch.undo()
    assert contents(tmp_path) == kept
    assert torch.equal(from_pretrained(tmp_path).input.weight, old.input.weight)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "model.bin",
        "config.json",
        3,
        None,
        ["a.safetensors"],
    ],
)
def test_an_index_that_points_elsewhere(name: Any, sharded: Path) -> None:
    """Even where such a file exists, it is not opened."""
    shard = next(sharded.glob("model-00001-*"))
    for place in (sharded.parent, sharded / "sub"):
        place.mkdir(exist_ok=True)
        (place / "x.safetensors").write_bytes(shard.read_bytes())
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {key: name if file == shard.name else file for key, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is no safetensors file of its folder|is not an index of weights"):
        from_pretrained(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    victim = next(sharded.glob("model-00002-*"))
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {victim.name} in .*: a model folder holds"):
        from_pretrained(sharded)


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_truncated_shard(keep: int, sharded: Path) -> None:
    victim = next(sharded.glob("model-00002-*"))
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{victim.name} cannot be read, is damaged or not safetensors"):
        from_pretrained(sharded)


def test_a_tensor_missing_from_its_shard(sharded: Path) -> None:
    victim = next(sharded.glob("model-00001-*"))
    tensors = load_file(victim)
    lost = next(iter(tensors))
    save_file({"stranger": tensors.pop(lost), **tensors}, victim)
    with pytest.raises(ValueError, match=rf"does not fit its config\.json: .*missing {lost}; unexpected stranger"):
        from_pretrained(sharded)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"null",
        b"3",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": "a"}',
    ],
)
def test_an_index_that_is_none(text: bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{INDEX} is not an index of weights"):
        from_pretrained(sharded)


def test_a_cast_holds_one_tensor_twice_at_most(
    network: nn.Module, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next tensor is read from the file after the cast of the one before it."""
    from hd_zoo.weights import shards

    events: list[str] = []

    class Opened:
        def __init__(self, opened: Any) -> None:
            self.opened = opened

        def __enter__(self) -> Any:
            self.inner = self.opened.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self.opened.__exit__(*error)

        def keys(self) -> Any:
            return self.inner.keys()

        def get_tensor(self, name: str) -> Any:
            events.append(f"read {name}")
            return self.inner.get_tensor(name)

    original = shards.safe_open
    monkeypatch.setattr(shards, "safe_open", lambda *given, **more: Opened(original(*given, **more)))
    for name, tensor in shards.read_tensors(shards.shard_files(sharded), "cpu", torch.bfloat16):
        assert tensor.dtype == torch.bfloat16
        events.append(f"have {name}")
    reads, haves = events[::2], events[1::2]
    assert [one.split()[1] for one in reads] == [one.split()[1] for one in haves]
    assert all(one.startswith("read") for one in reads)
    assert {one.split()[1] for one in reads} == set(network.state_dict())


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for huggingface_hub that has one repository; what it was asked for."""
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **settings: Any) -> str:
        asked.append({"repo_id": repo_id, **settings})
        return str(folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_an_id_is_fetched_from_the_hub(network: nn.Module, hub: list[dict[str, Any]]) -> None:
    found = from_pretrained("some-owner/a_net.v1", revision="main")
    assert torch.equal(found.patch_embed.weight, network.patch_embed.weight)
    (asked,) = hub
    assert (asked["repo_id"], asked["revision"]) == ("some-owner/a_net.v1", "main")
    # No pickle, no code is fetched.
    assert set(asked["allow_patterns"]) == {CONFIG, INDEX, "*.safetensors"}


def test_a_folder_of_that_name_wins(
    network: nn.Module, hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pretrained(network, "owner/name")
    from_pretrained("owner/name")
    assert not hub


@pytest.mark.parametrize(
    "source", ["name", "a/b/c", "./name", "../name", "./owner/name", "/owner/name", "owner/", "owner/na me", "~/a/b"]
)
def test_what_is_no_id_is_a_path(source: str, hub: list[dict[str, Any]]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        from_pretrained(source)
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        from_pretrained(Path("owner/name"))
    assert not hub


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"there is no folder owner/name; .*pip install huggingface_hub"):
        from_pretrained("owner/name")
