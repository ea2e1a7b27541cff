"""The digits recipe's first 50 steps of each stage, held against a committed record.

Bits depend on the processor and on PyTorch: they are compared where both are the record's, elsewhere the numbers within
a tolerance that grows with the steps, since training amplifies rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hd_meanflow import MeanFlowLoss
from hd_trainer import load_recipe
from hd_trainer.engine.loop import Task
from hd_trainer.networks import fresh_network
from hd_trainer.pipeline import context_of
from hd_trainer.stages import STAGES, distribution, teacher, trajectory

RECORD = Path(__file__).parent / "data" / "digits_first_steps.json"
STEPS = 50


def digest(module: nn.Module) -> str:
    """SHA-256 of all values, in the order of the state's entries."""
    sha256 = hashlib.sha256()
    for value in module.state_dict().values():
        sha256.update(value.detach().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def first_steps(task: Task) -> dict[str, Any]:
    """What the task records in its first steps, and its weights after them."""
    records = [{name: float(value) for name, value in task.step(index).items()} for index in range(STEPS)]
    return {"records": records, "weights": {name: digest(module) for name, module in task.modules.items()}}


def processor() -> str:
    """Vendor, family and model as Linux tells them: libraries choose their kernels by these."""
    facts: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return " ".join(facts.get(name, "") for name in ("vendor_id", "cpu family", "model"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are split over threads: their number decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_first_steps_of_every_stage_are_the_recorded_ones(one_thread: None) -> None:
    record = json.loads(RECORD.read_text())
    made_with, expected = record["made_with"], record["stages"]
    settings = dataclasses.replace(load_recipe("digits"), device="cpu")
    # The record was made before the recipe chose another weighting.
    settings = dataclasses.replace(
        settings, trajectory=dataclasses.replace(settings.trajectory, meanflow=MeanFlowLoss(p=1.0))
    )
    context = context_of(settings)

    found = {}
    task = teacher.prepare(settings.teacher, context, fresh_network(settings.model, context))
    found["teacher"] = first_steps(task)
    frozen = copy.deepcopy(task.modules["average"])
    task = trajectory.prepare(settings.trajectory, context, frozen)
    found["trajectory"] = first_steps(task)
    task = distribution.prepare(settings.distribution, context, frozen, copy.deepcopy(task.modules["average"]))
    found["distribution"] = first_steps(task)

    for stage in STAGES:
        for index, (ours, theirs) in enumerate(zip(found[stage]["records"], expected[stage]["records"], strict=True)):
            assert ours == pytest.approx(theirs, rel=1e-5 * 1.2**index, abs=1e-5), f"{stage}, step {index}"
    here = {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }
    if here == made_with:
        assert found == expected
