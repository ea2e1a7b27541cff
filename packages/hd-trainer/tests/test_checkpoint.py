"""Checkpoints: complete or absent, the newest first, never a pickle, and checked before anything uses them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainer_helpers import same

from hd_trainer import UserError, files
from hd_trainer.engine.checkpoint import Progress, complete_checkpoints, load_newest, save_checkpoint, tidy
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings


@dataclass(frozen=True)
class State:
    """A network with its optimiser."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]

    def tensors(self) -> dict[str, Tensor]:
        """A copy of all that a checkpoint holds."""
        found = {**self.modules["net"].state_dict(), **self.optimizers["net"].tensors()}
        return {name: value.clone() for name, value in found.items()}


def make_state(seed: int = 0, steps: int = 2, width: int = 4, depth: int = 1) -> State:
    """A network with its optimiser after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    optimizer = Optimizer(model, OptimizerSettings(lr=0.1, warmup=0), steps=10)
    for step in range(steps):
        optimizer.update(model(torch.randn(3, width)).square().mean(), step)
    return State({"net": model}, {"net": optimizer})


def save(folder: Path, step: int, state: State, **progress: Any) -> None:
    """The state as a checkpoint after ``step`` steps."""
    save_checkpoint(folder, Progress(step=step, **progress), state.modules, state.optimizers)


def load(folder: Path, state: State) -> Progress:
    """The newest checkpoint into the state."""
    return load_newest(folder, state.modules, state.optimizers)


def names(folder: Path) -> list[str]:
    """What is in the folder of checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_checkpoint_goes_to_disk_and_back(tmp_path: Path) -> None:
    one, other = make_state(0), make_state(1, steps=0)
    assert load(tmp_path, other) == Progress()
    save(tmp_path, 7, one, sums={"loss": (0.1, 3)}, seconds=1.5)
    assert not same(one.tensors(), other.tensors())
    assert load(tmp_path, other) == Progress(step=7, sums={"loss": (0.1, 3)}, seconds=1.5)
    assert same(one.tensors(), other.tensors())


def test_the_newest_two_are_kept_and_the_newest_is_taken(tmp_path: Path) -> None:
    # Beyond six digits names no longer sort like numbers.
    for step in (5, 10, 999_999, 1_000_000):
        save(tmp_path, step, make_state(step))
    assert names(tmp_path) == ["1000000", "999999"]
    other = make_state(1)
    assert load(tmp_path, other) == Progress(step=1_000_000)
    assert same(other.tensors(), make_state(1_000_000).tensors())


def test_a_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    save(tmp_path, 5, make_state(0))
    save(tmp_path, 5, make_state(1))
    other = make_state(2)
    load(tmp_path, other)
    assert same(other.tensors(), make_state(1).tensors())
    assert names(tmp_path) == ["000005"]


@pytest.mark.parametrize("where", ["tensors", "facts", "rename"])
def test_a_failure_in_the_middle_leaves_the_old_one(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5, make_state(0))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "tensors":
            patch.setattr(files, "save_file", full)
        elif where == "facts":
            patch.setattr(files.json, "dumps", full)
        else:
            patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 10, make_state(1))
    assert names(tmp_path) == ["000005"]
    other = make_state(2)
    assert load(tmp_path, other) == Progress(step=5)
    assert same(other.tensors(), make_state(0).tensors())


def test_incomplete_folders_are_ignored_and_tidied_up(tmp_path: Path) -> None:
    save(tmp_path, 5, make_state(0))
    parent = tmp_path / "checkpoints"
    # A process that was killed leaves such folders behind.
    shutil.copytree(parent / "000005", parent / ".incomplete-abc")
    (parent / "000009").mkdir()
    (parent / "000010").mkdir()
    shutil.copy(parent / "000005/state.safetensors", parent / "000010")
    (parent / "notes").mkdir()
    (parent / "notes/state.json").write_text("{}")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["000005"]
    assert load(tmp_path, make_state(1)) == Progress(step=5)
    tidy(tmp_path)
    assert ".incomplete-abc" not in names(tmp_path)
    assert "notes" in names(tmp_path)


def test_a_checkpoint_more_than_the_limit_is_tidied_up(tmp_path: Path) -> None:
    # A process that was killed right after the rename of the third leaves it so.
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, Progress(step=step), make_state(0).modules, {}, keep=3)
    assert len(names(tmp_path)) == 3
    tidy(tmp_path)
    assert names(tmp_path) == ["000010", "000015"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_damaged_tensors_are_an_error_that_names_the_folder(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 5, make_state(0))
    save(tmp_path, 10, make_state(1))
    path = tmp_path / "checkpoints/000010/state.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 200)
    else:
        path.unlink()
    other = make_state(2)
    with pytest.raises(UserError, match=r"000010 is damaged .* remove that folder"):
        load(tmp_path, other)
    assert same(other.tensors(), make_state(2).tensors())
    # What the message says works.
    shutil.rmtree(path.parent)
    assert load(tmp_path, other) == Progress(step=5)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1]"])
def test_damaged_facts_are_an_error(content: bytes, tmp_path: Path) -> None:
    save(tmp_path, 5, make_state(0))
    (tmp_path / "checkpoints/000005/state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json .*JSON.*remove that folder"):
        load(tmp_path, make_state(1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", None),
        ("step", 6),
        ("step", True),
        ("step", 5.0),
        ("step", "5"),
        ("seconds", -1),
        ("seconds", "long"),
        ("seconds", 10**400),
        ("sums", None),
        ("sums", []),
        ("sums", {"loss": 1.0}),
        ("sums", {"loss": [1.0]}),
        ("sums", {"loss": [1.0, 0]}),  # would be divided by
        ("sums", {"loss": [1.0, 1.5]}),
        ("sums", {"loss": [float("nan"), 1]}),
        ("sums", {"loss": [10**400, 1]}),
    ],
)
def test_facts_of_another_form_are_an_error(name: str, value: object, tmp_path: Path) -> None:
    save(tmp_path, 5, make_state(0))
    path = tmp_path / "checkpoints/000005/state.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, name: value}))
    with pytest.raises(UserError, match=r"000005 is damaged \(state\.json does not hold step, seconds and sums"):
        load(tmp_path, make_state(1))
    del facts[name]
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"000005 is damaged \(state\.json does not hold"):
        load(tmp_path, make_state(1))


@pytest.mark.parametrize("change", [{"width": 5}, {"depth": 2}, {"depth": 3}])
def test_foreign_networks_are_refused_and_left_alone(change: dict[str, int], tmp_path: Path) -> None:
    saved = make_state(0, depth=2) if change == {"depth": 3} else make_state(0, **change)
    other = make_state(1, depth=3) if change == {"depth": 3} else make_state(1)
    before = other.tensors()
    save(tmp_path, 5, saved)
    with pytest.raises(UserError, match="other networks"):
        load(tmp_path, other)
    assert same(other.tensors(), before)


def lost(tensors: dict[str, Tensor]) -> None:
    del tensors["optimizer.net.1.exp_avg"]


def whole_numbers(tensors: dict[str, Tensor]) -> None:
    tensors["optimizer.net.0.exp_avg"] = tensors["optimizer.net.0.exp_avg"].long()


def foreign(tensors: dict[str, Tensor]) -> None:
    tensors["optimizer.net.9.exp_avg"] = torch.zeros(4)


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors["module.net.0.weight"][1, 2] = float("nan")


def never_stepped(tensors: dict[str, Tensor]) -> None:
    tensors["optimizer.net.0.step"].zero_()  # AdamW divides by 1 - beta^step


def negative_square(tensors: dict[str, Tensor]) -> None:
    tensors["optimizer.net.0.exp_avg_sq"][0, 0] = -1.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lost, r"optimizer\.net\.1\.exp_avg differs"),
        (whole_numbers, r"optimizer\.net\.0\.exp_avg differs"),
        (foreign, r"optimizer\.net\.9\.exp_avg differs"),
        (not_a_number, r"module\.net\.0\.weight holds impossible numbers"),
        (never_stepped, r"optimizer\.net\.0\.step holds impossible numbers"),
        (negative_square, r"optimizer\.net\.0\.exp_avg_sq holds impossible numbers"),
    ],
)
def test_tensors_of_another_form_are_an_error(
    damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    save(tmp_path, 5, make_state(0))
    path = tmp_path / "checkpoints/000005/state.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    other = make_state(1)
    with pytest.raises(UserError, match=rf"000005 .*{message}"):
        load(tmp_path, other)
    assert same(other.tensors(), make_state(1).tensors())


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_not_saved(where: str, tmp_path: Path) -> None:
    save(tmp_path, 5, make_state(0))
    state = make_state(1)
    tensors = state.modules["net"].state_dict() if where == "weight" else state.optimizers["net"].tensors()
    next(iter(value for value in tensors.values() if value.ndim == 2)).data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"^net\.0\.(weight|exp_avg) is no longer finite after step 10; lower"):
        save(tmp_path, 10, state)
    assert names(tmp_path) == ["000005"]


def test_a_parameter_without_a_gradient_is_no_obstacle_to_resuming(tmp_path: Path) -> None:
    state, other = make_state(0, steps=0, depth=2), make_state(1, steps=0, depth=2)
    first = state.modules["net"][0]  # type: ignore[index]
    state.optimizers["net"].update(first(torch.ones(1, 4)).sum(), 0)
    save(tmp_path, 1, state)
    assert load(tmp_path, other) == Progress(step=1)
    assert same(state.tensors(), other.tensors())


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    save_checkpoint(tmp_path, Progress(step=1), {"one": model, "two": model}, {})
    fresh = {"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)}
    load_newest(tmp_path, {**fresh}, {})
    assert torch.equal(fresh["two"].weight, model.weight)


def test_a_replaced_checkpoint_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5, make_state(0))
    seen: list[bool] = []
    rename = os.replace

    def watched(source: Path, target: Path) -> None:
        rename(source, target)
        folder = tmp_path / "checkpoints/000005"
        seen.append(not folder.exists() or len(list(folder.iterdir())) == 2)

    monkeypatch.setattr(files.os, "replace", watched)
    save(tmp_path, 5, make_state(1))
    assert len(seen) == 4  # two files, the old folder out, the new one in
    assert all(seen)


def test_there_is_no_pickle_in_a_run(finished: Path) -> None:
    paths = [path for path in finished.rglob("*") if path.is_file()]
    assert len(paths) > 20
    assert {path.suffix for path in paths} == {".json", ".jsonl", ".safetensors", ".png", ".html"}
    for path in paths:
        start = path.read_bytes()[:8]
        # Torch's own files are zip archives, plain pickles start with their protocol.
        assert not start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), path
