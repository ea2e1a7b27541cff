"""What the tests share: tiny settings and networks, one finished run, and the command called in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hd_zoo
from hd_trainer import Settings, load_recipe
from hd_trainer.cli import main
from hd_trainer.context import fresh_network, make_context
from hd_trainer.data import load_digits
from hd_trainer.evaluation import EvaluationSettings
from hd_trainer.loop import LoopSettings, Task
from hd_trainer.optim import OptimizerSettings
from hd_trainer.settings import ModelSettings
from hd_trainer.stages import distribution, teacher, trajectory
from hd_trainer.stages.common import Context
from hd_trainer.stages.critic import AdversarySettings
from hd_trainer.stages.distribution import DistributionSettings
from hd_trainer.stages.teacher import TeacherSettings
from hd_trainer.stages.trajectory import TrajectorySettings

#: The recipe's short form, shorter still: what every test of a finished run stands on.
SHORT = [
    *("run", "digits", "--smoke", "--precision", "fp32"),
    *("--model.width", "32", "--loop.log-every", "2", "--loop.checkpoint-every", "5"),
    *("--teacher.steps", "12", "--teacher.batch", "16"),
    *("--trajectory.steps", "9", "--trajectory.batch", "16"),
    *("--distribution.steps", "7", "--distribution.batch", "16"),
    *("--evaluation.samples", "60", "--evaluation.teacher-steps", "1", "3", "8"),
]


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr; more or none fails."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"one line on stderr is wanted; got {self.err!r}"
        assert lines[0].startswith("hdistill: ")
        return lines[0]


def _hdistill(*arguments: object) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def hdistill() -> Callable[..., Answer]:
    """``hdistill(*arguments)`` in this process."""
    return _hdistill


@pytest.fixture(scope="session")
def short() -> list[str]:
    """The arguments that made ``finished``, but for ``--out``."""
    return list(SHORT)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; shared by all, so copy it before changing anything."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    answer = _hdistill(*SHORT, "--out", folder)
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes: to see that nothing was changed."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="session")
def tiny() -> Settings:
    """Settings for networks that take milliseconds; every loss and option at work."""
    constant = OptimizerSettings(lr=3e-3, warmup=2, schedule="constant")
    return dataclasses.replace(
        load_recipe("digits", smoke=True),
        seed=3,
        device="cpu",
        precision="fp32",
        model=ModelSettings(width=16, depth=2),
        loop=LoopSettings(log_every=3, checkpoint_every=4),
        teacher=TeacherSettings(steps=7, batch=8, optimizer=OptimizerSettings(lr=3e-3, warmup=2)),
        trajectory=TrajectorySettings(
            steps=7,
            batch=8,
            optimizer=OptimizerSettings(lr=3e-3, warmup=2, weight_decay=0.01),
            interval_share=0.5,
            endpoint_share=0.5,
        ),
        distribution=DistributionSettings(
            steps=7,
            batch=8,
            student_every=3,
            optimizer=OptimizerSettings(lr=3e-3, warmup=1),
            fake_optimizer=constant,
            adversary=AdversarySettings(layers=("blocks.0", "blocks.1"), optimizer=constant),
        ),
        evaluation=EvaluationSettings(samples=20, teacher_steps=(1, 3), timing_repeats=1),
    )


@pytest.fixture(scope="session")
def context(tiny: Settings) -> Context:
    """Digits on the CPU in float32."""
    return make_context(tiny)


@pytest.fixture
def network(tiny: Settings, context: Context) -> nn.Module:
    """A frozen teacher whose every layer matters: a new one has zeros in it and predicts zero."""
    made = fresh_network(tiny, context)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made.requires_grad_(False).eval()


@pytest.fixture
def prepare(tiny: Settings, context: Context, network: nn.Module) -> Callable[..., Task]:
    """``prepare(stage, **changes)``: the stage's real task on tiny networks, its settings changed."""

    def make(stage: str, start: nn.Module | None = None, **changes: Any) -> Task:
        settings = dataclasses.replace(getattr(tiny, stage), **changes)
        if stage == "teacher":
            return teacher.prepare(settings, context, fresh_network(tiny, context))
        if stage == "trajectory":
            return trajectory.prepare(settings, context, network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            start = start or hd_zoo.to_student(network)
        return distribution.prepare(settings, context, network, start)

    return make


@pytest.fixture(scope="session")
def digits_data() -> Any:
    """The data set of the main job."""
    return load_digits()


@pytest.fixture(scope="session")
def snapshot() -> Callable[[nn.Module], dict[str, Tensor]]:
    """A copy of a module's state."""
    return lambda module: {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Whether two states agree to the last bit."""
    return lambda a, b: a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
