"""What it takes to build a network again, noted on the network itself."""

from __future__ import annotations

from typing import Any

from torch import nn


def note(model: nn.Module, architecture: str, arguments: dict[str, Any]) -> None:
    """Note on a network what it takes to :func:`hd_zoo.registry.build` it again."""
    model.architecture, model.arguments = architecture, dict(arguments)  # type: ignore[assignment]


def blueprint(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """(architecture, arguments) that :func:`hd_zoo.registry.build` noted on a network: all it takes to build it again.

    Raises:
        ValueError: for a network that was not built by this package.
    """
    architecture, arguments = getattr(model, "architecture", None), getattr(model, "arguments", None)
    if not isinstance(architecture, str) or not isinstance(arguments, dict):
        source = "create_model, to_student or from_pretrained"
        raise ValueError(f"a network from {source} is needed; got {type(model).__name__}")
    return architecture, arguments
