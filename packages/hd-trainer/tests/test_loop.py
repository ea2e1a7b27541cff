"""The loop: a run stopped anywhere and resumed is the run that was never stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainer_helpers import contents, perturbed_teacher, prepare_task, tiny_settings

from hd_trainer import UserError
from hd_trainer.engine.draws import step_generator, step_indices
from hd_trainer.engine.loop import LoopSettings, Task, train
from hd_trainer.engine.optimizer import Optimizer, OptimizerSettings
from hd_trainer.files import read_records
from hd_trainer.pipeline import context_of
from hd_trainer.signals import Interrupted, Stopped
from hd_trainer.stages import STAGES

EVERY = LoopSettings(log_every=3, checkpoint_every=4)


class Crash(Exception):
    """What no handler expects."""


def stopping(task: Task, at: int, how: str) -> Task:
    """The task with something happening inside its step ``at``, after the weights have changed."""

    def step(index: int) -> dict[str, Tensor]:
        record = task.step(index)
        if index == at:
            if how == "crash":
                raise Crash
            os.kill(os.getpid(), getattr(signal, how))
        return record

    return replace(task, step=step)


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on interruptions: weights, optimiser state, records but for the time, pictures."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            found[name] = [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(path)]
        elif path.suffix in (".safetensors", ".png") and path.parent == folder:
            found[name] = path.read_bytes()
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    found["newest"] = newest.name
    for name, tensor in load_file(newest / "state.safetensors").items():
        found[f"state {name}"] = tensor.numpy().tobytes()
    found["sums"] = json.loads((newest / "state.json").read_text())["sums"]
    return found


def prepare(stage: str) -> Task:
    """A stage's real task with tiny networks."""
    tiny = tiny_settings()
    context = context_of(tiny)
    return prepare_task(stage, tiny, context, perturbed_teacher(tiny, context))


@functools.cache
def reference(stage: str) -> dict[str, Any]:
    """Outcome of the stage's uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        train(prepare(stage), Path(folder), EVERY)
        return outcome(Path(folder))


@pytest.mark.parametrize("how", ["crash", "signal"])
@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stopped_at_any_step_and_resumed_is_the_same(stage: str, at: int, how: str, tmp_path: Path) -> None:
    expected = reference(stage)
    # Whatever else draws random numbers in the process must not matter.
    torch.manual_seed(100 + at)
    if how == "crash":
        with pytest.raises(Crash):
            train(stopping(prepare(stage), at, "crash"), tmp_path, EVERY)
    else:
        one = ("SIGINT", "SIGTERM")[at % 2]
        before = signal.getsignal(getattr(signal, one))
        with pytest.raises(Stopped, match="the same command"):
            train(stopping(prepare(stage), at, one), tmp_path, EVERY)
        assert signal.getsignal(getattr(signal, one)) is before
        assert (tmp_path / f"checkpoints/{at + 1:06d}/state.json").exists()
        assert (tmp_path / "done.json").exists() == (at == 6)
    torch.manual_seed(200 + at)
    train(prepare(stage), tmp_path, EVERY)
    found = outcome(tmp_path)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    steps = [record["step"] for record in found["metrics.jsonl"]]
    assert steps == [3, 6, 7]


def toy(steps: int = 11) -> Task:
    """A linear map that follows its own noise; an entry of its record is absent at some steps."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = Optimizer(model, OptimizerSettings(lr=0.05, warmup=2), steps)

    def step(index: int) -> dict[str, Tensor]:
        x = torch.randn(4, 2, generator=step_generator(0, "toy", index))
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.update(loss, index)
        record = {"loss": loss.detach()}
        return record | ({"now_and_then": loss.detach() * 2} if index % 4 == 1 else {})

    return Task(
        name="toy",
        steps=steps,
        modules={"model": model},
        optimizers={"model": optimizer},
        step=step,
        sample=lambda: model.weight.detach()[None, None],
        save=lambda folder: save_file(model.state_dict(), folder / "model.safetensors"),
    )


@settings(deadline=None, max_examples=40)
@given(
    log_every=st.integers(1, 13),
    checkpoint_every=st.integers(1, 13),
    interruptions=st.lists(st.tuples(st.integers(0, 10), st.sampled_from(["crash", "SIGINT", "SIGTERM"])), max_size=4),
)
@example(log_every=5, checkpoint_every=4, interruptions=[(6, "crash")])  # a record one step past the checkpoint
@example(log_every=4, checkpoint_every=4, interruptions=[(4, "crash"), (4, "SIGTERM")])
def test_any_number_of_interruptions_leaves_no_trace(
    log_every: int, checkpoint_every: int, interruptions: list[tuple[int, str]]
) -> None:
    every = LoopSettings(log_every=log_every, checkpoint_every=checkpoint_every)
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        train(toy(), Path(whole), every)
        for at, how in interruptions:
            with contextlib.suppress(Crash, Stopped):
                train(stopping(toy(), at, how), Path(parts), every)
        train(toy(), Path(parts), every)
        assert outcome(Path(parts)) == outcome(Path(whole))
        records = read_records(Path(whole) / "metrics.jsonl")
        wanted = sorted({*range(log_every, 12, log_every), 11})
        assert [record["step"] for record in records] == wanted


def test_records_are_means_of_what_was_there(tmp_path: Path) -> None:
    task = toy(5)
    values = [{"a": float(i), **({"b": 10.0 * i} if i == 1 else {})} for i in range(5)]
    task = replace(task, step=lambda i: {k: torch.tensor(v) for k, v in values[i].items()})
    train(task, tmp_path, LoopSettings(log_every=2, checkpoint_every=100))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in records] == [
        {"step": 2, "a": 0.5, "b": 10.0},
        {"step": 4, "a": 2.5},
        {"step": 5, "a": 4.0},
    ]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0


def test_time_goes_on_after_a_stop(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(stopping(toy(), 5, "SIGINT"), tmp_path, EVERY)
    path = tmp_path / "checkpoints/000006/state.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "seconds": 1_000.0}))
    train(toy(), tmp_path, EVERY)
    assert 1_000 < read_records(tmp_path / "metrics.jsonl")[-1]["seconds"] < 1_100
    assert 1_000 < json.loads((tmp_path / "done.json").read_text())["seconds"] < 1_100


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(stopping(toy(), 9, "crash"), tmp_path, LoopSettings(log_every=2, checkpoint_every=4))
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 10, "lo')
    train(toy(), tmp_path, LoopSettings(log_every=2, checkpoint_every=4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10, 11]


def test_a_finished_stage_returns_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(toy(), tmp_path, EVERY)
    before = contents(tmp_path)
    task = replace(toy(), step=lambda _: pytest.fail("a step was taken"))
    train(task, tmp_path, EVERY)
    assert contents(tmp_path) == before
    assert f"toy: done already ({tmp_path})" in capsys.readouterr().out


def test_a_stage_killed_before_its_weights_were_saved_saves_them(tmp_path: Path) -> None:
    def killed(_: Path) -> None:
        raise Crash

    with pytest.raises(Crash):
        train(replace(toy(), save=killed), tmp_path, EVERY)
    assert not (tmp_path / "done.json").exists()
    train(replace(toy(), step=lambda _: pytest.fail("a step was taken")), tmp_path, EVERY)
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "done.json").exists()


def test_a_stop_asked_for_in_the_last_step_is_not_forgotten(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="toy is done"):
        train(stopping(toy(), 10, "SIGINT"), tmp_path, EVERY)
    assert (tmp_path / "done.json").exists()


def test_a_second_signal_does_not_wait_for_the_step(tmp_path: Path) -> None:
    task = toy()

    def step(index: int) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the step went on")

    with pytest.raises(Interrupted):
        train(replace(task, step=step), tmp_path, EVERY)
    train(toy(), tmp_path, EVERY)
    assert (tmp_path / "done.json").exists()


@pytest.mark.parametrize(
    ("weight", "pixel", "message"),
    [
        (math.nan, 0.0, r"^model\.weight is no longer finite after step 11; lower"),
        (1e37, math.inf, r"^toy: samples no longer finite after step 11; lower"),  # finite, but it overflows in use
    ],
)
def test_what_is_not_finite_after_the_last_update_is_not_saved(
    weight: float, pixel: float, message: str, tmp_path: Path
) -> None:
    task = toy()
    images = torch.zeros(1, 1, 2, 2)

    def step(index: int) -> dict[str, Tensor]:
        record = task.step(index)  # its loss is finite: it was taken before the update
        if index == task.steps - 1:
            task.modules["model"].weight.data[0, 0] = weight
            images.fill_(pixel)
        return record

    with pytest.raises(UserError, match=message):
        train(replace(task, step=step, sample=lambda: images), tmp_path, EVERY)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000004", "000008"]
    assert not {"done.json", "model.safetensors", "samples.png"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("lost", range(3))
def test_pictures_lost_by_a_kill_are_drawn_on_resuming(lost: int, tmp_path: Path) -> None:
    task, calls = toy(), iter(range(3))

    def sample() -> Tensor:
        if next(calls) == lost:
            raise Crash
        return task.sample()

    with pytest.raises(Crash):
        train(replace(task, sample=sample), tmp_path, EVERY)
    train(toy(), tmp_path, EVERY)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")) == [
        "samples.png",
        "samples/000004.png",
        "samples/000008.png",
        "samples/000011.png",
    ]


@pytest.mark.parametrize("lost", ["samples.png", "samples/000011.png"])
def test_pictures_that_a_kill_kept_from_being_written_are_drawn_where_no_step_is_left(
    lost: str, tmp_path: Path
) -> None:
    train(toy(), tmp_path, EVERY)
    pictures = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    (tmp_path / "done.json").unlink()  # killed after the last checkpoint's rename, before the picture was written
    (tmp_path / lost).unlink()
    train(toy(), tmp_path, EVERY)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == pictures


def test_what_a_kill_left_is_tidied_up_on_resuming_where_no_step_is_left(tmp_path: Path) -> None:
    train(toy(), tmp_path, EVERY)
    (tmp_path / "done.json").unlink()  # killed after the last checkpoint's rename, before the old one was removed
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "000008", checkpoints / "000004")
    for folder in (tmp_path, checkpoints, tmp_path / "samples"):
        (folder / ".incomplete-1234.png").touch()
    train(toy(), tmp_path, EVERY)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["000008", "000011"]
    assert not list(tmp_path.rglob(".incomplete-*"))


def test_a_stop_between_checkpoints_leaves_no_picture_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(stopping(toy(), 5, "SIGTERM"), tmp_path, EVERY)
    assert (tmp_path / "checkpoints/000006/state.json").exists()
    train(toy(), tmp_path, EVERY)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["000004.png", "000008.png", "000011.png"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(value: float, tmp_path: Path) -> None:
    task = toy()

    def step(index: int) -> dict[str, Tensor]:
        return {**task.step(index), **({"other": torch.tensor(value)} if index == 5 else {})}

    every = LoopSettings(log_every=100, checkpoint_every=1)
    with pytest.raises(UserError, match=r"^toy: other no longer finite at step 6; lower") as caught:
        train(replace(task, step=step), tmp_path, every)
    assert "\n" not in str(caught.value)
    # No checkpoint holds what diverged.
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 5


def test_samples_are_kept_beside_the_checkpoints(tmp_path: Path) -> None:
    train(toy(), tmp_path, EVERY)
    found = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert found == ["000004.png", "000008.png", "000011.png"]
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "samples/000011.png").read_bytes()


def test_the_random_numbers_of_a_step_are_the_same_in_every_process() -> None:
    script = "from hd_trainer.engine.draws import step_generator as g; print(g(5, 'trajectory', 12).initial_seed())"
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": other},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == step_generator(5, "trajectory", 12).initial_seed()


def test_the_random_numbers_differ_between_steps_stages_and_seeds() -> None:
    every = [
        torch.rand(4, generator=step_generator(seed, stage, step))
        for seed in (0, 1, 12)
        for stage in STAGES
        for step in (0, 1, 2, 12, 21)
    ]
    assert len({tuple(draws.tolist()) for draws in every}) == len(every)
    again = torch.rand(4, generator=step_generator(12, "distribution", 21))
    assert torch.equal(again, every[-1])


def shuffle(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, from PyTorch alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


@given(
    batch=st.integers(1, 30),
    count=st.integers(1, 25),
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=20),
)
def test_indices_are_a_fresh_shuffle_every_epoch_in_whatever_order_the_steps_are_asked_for(
    batch: int, count: int, seed: int, steps: list[int]
) -> None:
    epochs = -(-(max(steps) + 1) * batch // count)
    whole = torch.cat([shuffle(count, seed, epoch) for epoch in range(epochs)])
    for step in steps:  # jumps back and forth: what is kept of one epoch must not answer for another
        assert torch.equal(step_indices(step, batch, count, seed), whole[step * batch : (step + 1) * batch])


def test_resuming_within_an_epoch_shows_the_same_batches() -> None:
    script = "from hd_trainer.engine.draws import step_indices as f; print(f(7, 8, 20, 3).tolist())"
    fresh = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    within = [step_indices(step, 8, 20, 3).tolist() for step in range(8)]
    assert json.loads(fresh.stdout) == within[7]


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled: list[int] = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda count, **rest: (shuffled.append(count), randperm(count, **rest))[1])
    for step in range(25):  # four samples a step: 2.5 epochs
        step_indices(step, 4, 40, seed=987_654)
    assert shuffled == [40, 40, 40]


def test_what_is_kept_of_an_epoch_cannot_be_changed_from_outside() -> None:
    first = step_indices(0, 10, 10, seed=5)
    kept = first.clone()
    first.zero_()
    assert torch.equal(step_indices(0, 10, 10, seed=5), kept)


def test_training_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=train, args=(toy(), tmp_path, EVERY))
    thread.start()
    thread.join()
    assert (tmp_path / "done.json").exists()
    assert signal.getsignal(signal.SIGINT) is before
