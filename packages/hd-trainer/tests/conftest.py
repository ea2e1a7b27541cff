"""Resources of the trainer's tests: one finished run, the data, a teacher. Everything else is in trainer_helpers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn
from trainer_helpers import SHORT, hdistill, perturbed_teacher, tiny_settings

from hd_trainer import Settings
from hd_trainer.context import Context
from hd_trainer.pipeline import context_of


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own: what they keep is nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_path() -> Iterator[None]:
    """What a user's file puts on the path of imports is gone after the test."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; shared by all, so copy it before changing anything."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    answer = hdistill(*SHORT, "--out", folder)
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture(scope="session")
def settings() -> Settings:
    """Settings for networks that take milliseconds."""
    return tiny_settings()


@pytest.fixture(scope="session")
def context(settings: Settings) -> Context:
    """Digits on the CPU in float32."""
    return context_of(settings)


@pytest.fixture
def network(settings: Settings, context: Context) -> nn.Module:
    """A frozen teacher whose every layer matters."""
    return perturbed_teacher(settings, context)
