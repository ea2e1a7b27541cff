"""Every test starts from the same global seed."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """torch scripts a few formulas of its own when forward AD is first used, and warns itself about that."""
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script.* is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
