"""Checkpoints: complete or absent, the newest first, never a pickle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hd_trainer import UserError, checkpoint, files
from hd_trainer.checkpoint import complete_checkpoints, load_newest, save_checkpoint
from hd_trainer.optim import Optimizer, OptimizerSettings

State = tuple[dict[str, nn.Module], dict[str, Optimizer]]


@pytest.fixture
def state() -> Callable[..., State]:
    """``state(seed, steps)``: a network with its optimiser after some steps."""

    def make(seed: int = 0, steps: int = 2, width: int = 4, depth: int = 1) -> State:
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        optimizer = Optimizer(model.parameters(), OptimizerSettings(lr=0.1, warmup=0))
        for step in range(steps):
            optimizer.update(model(torch.randn(3, width)).square().mean(), step, 10)
        return {"net": model}, {"net": optimizer}

    return make


def tensors(state: State) -> dict[str, Tensor]:
    modules, optimizers = state
    return {**modules["net"].state_dict(), **optimizers["net"].tensors()}


def same(a: State, b: State) -> bool:
    one, other = tensors(a), tensors(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_goes_to_disk_and_back(tmp_path: Path, state: Callable[..., State]) -> None:
    one, other = state(0), state(1, steps=0)
    assert load_newest(tmp_path, *other) is None
    save_checkpoint(tmp_path, 7, *one, {"sums": {"loss": [0.1, 3]}, "seconds": 1.5})
    assert not same(one, other)
    assert load_newest(tmp_path, *other) == {"step": 7, "sums": {"loss": [0.1, 3]}, "seconds": 1.5}
    assert same(one, other)


def test_the_newest_two_are_kept_and_the_newest_is_taken(tmp_path: Path, state: Callable[..., State]) -> None:
    # Beyond six digits names no longer sort like numbers.
    for step in (5, 10, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, *state(step), {})
    assert names(tmp_path) == ["1000000", "999999"]
    other = state(1)
    facts = load_newest(tmp_path, *other)
    assert facts == {"step": 1_000_000}
    assert same(other, state(1_000_000))


def test_a_step_saved_again_replaces_itself(tmp_path: Path, state: Callable[..., State]) -> None:
    save_checkpoint(tmp_path, 5, *state(0), {})
    save_checkpoint(tmp_path, 5, *state(1), {})
    other = state(2)
    load_newest(tmp_path, *other)
    assert same(other, state(1))
    assert names(tmp_path) == ["000005"]


@pytest.mark.parametrize("where", ["tensors", "facts", "rename"])
def test_a_failure_in_the_middle_leaves_the_old_one(
    where: str, tmp_path: Path, state: Callable[..., State], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 5, *state(0), {})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "tensors":
            patch.setattr(checkpoint, "save_file", full)
        elif where == "facts":
            patch.setattr(files.json, "dumps", full)
        else:
            patch.setattr(checkpoint.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, 10, *state(1), {})
    assert names(tmp_path) == ["000005"]
    other = state(2)
    assert load_newest(tmp_path, *other) == {"step": 5}
    assert same(other, state(0))


def test_incomplete_folders_are_ignored(tmp_path: Path, state: Callable[..., State]) -> None:
    save_checkpoint(tmp_path, 5, *state(0), {})
    parent = tmp_path / "checkpoints"
    # A process that was killed leaves such folders behind.
    shutil.copytree(parent / "000005", parent / ".incomplete-abc")
    (parent / "000009").mkdir()
    (parent / "000010").mkdir()
    shutil.copy(parent / "000005/state.safetensors", parent / "000010")
    (parent / "notes").mkdir()
    (parent / "notes/state.json").write_text("{}")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["000005"]
    assert load_newest(tmp_path, *state(1)) == {"step": 5}


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_damaged_tensors_are_an_error_that_names_the_folder(
    damage: str, tmp_path: Path, state: Callable[..., State]
) -> None:
    save_checkpoint(tmp_path, 5, *state(0), {})
    save_checkpoint(tmp_path, 10, *state(1), {})
    path = tmp_path / "checkpoints/000010/state.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 200)
    else:
        path.unlink()
    other = state(2)
    with pytest.raises(UserError, match=r"000010 is damaged .* remove that folder"):
        load_newest(tmp_path, *other)
    assert same(other, state(2))
    # What the message says works.
    shutil.rmtree(path.parent)
    assert load_newest(tmp_path, *other) == {"step": 5}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1]"])
def test_damaged_facts_are_an_error(content: bytes, tmp_path: Path, state: Callable[..., State]) -> None:
    save_checkpoint(tmp_path, 5, *state(0), {})
    (tmp_path / "checkpoints/000005/state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json .*JSON.*remove it"):
        load_newest(tmp_path, *state(1))


@pytest.mark.parametrize("change", [{"width": 5}, {"depth": 2}, {"depth": 3}])
def test_foreign_networks_are_refused_and_left_alone(
    change: dict[str, int], tmp_path: Path, state: Callable[..., State]
) -> None:
    saved = state(0, depth=2) if change == {"depth": 3} else state(0, **change)
    other = state(1, depth=3) if change == {"depth": 3} else state(1)
    before = {name: value.clone() for name, value in tensors(other).items()}
    save_checkpoint(tmp_path, 5, *saved, {})
    with pytest.raises(UserError, match="other networks"):
        load_newest(tmp_path, *other)
    assert all(torch.equal(value, before[name]) for name, value in tensors(other).items())


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    save_checkpoint(tmp_path, 1, {"one": model, "two": model}, {}, {})
    fresh = {"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)}
    load_newest(tmp_path, fresh, {})
    assert torch.equal(fresh["two"].weight, model.weight)


def test_there_is_no_pickle_in_a_run(finished: Path) -> None:
    paths = [path for path in finished.rglob("*") if path.is_file()]
    assert len(paths) > 20
    assert {path.suffix for path in paths} == {".json", ".jsonl", ".safetensors", ".png", ".html"}
    for path in paths:
        start = path.read_bytes()[:8]
        # Torch's own files are zip archives, plain pickles start with their protocol.
        assert not start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), path
