"""What guidance and converters have in common: a network inside, whose description they repeat."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class Wrapper(nn.Module):
    """A field around a field. It says of itself what the one inside says (:class:`hd_zoo.Described`).

    A name that the one inside lacks is missing here too: AttributeError.
    """

    #: The attribute that holds the field inside.
    inside: ClassVar[str]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        shape: tuple[int, ...] = getattr(self, self.inside).sample_shape
        return shape

    @property
    def classes(self) -> int:
        """Number of classes; 0: no labels."""
        classes: int = getattr(self, self.inside).classes
        return classes

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class"; None: no labels."""
        label: int | None = getattr(self, self.inside).null_label
        return label

    @property
    def takes_r(self) -> bool:
        """Whether r is used."""
        takes_r: bool = getattr(self, self.inside).takes_r
        return takes_r


def network_inside(field: Any) -> Any:
    """The network behind guidance and converters, where ``architecture`` and ``arguments`` are noted."""
    while isinstance(field, Wrapper):
        field = getattr(field, field.inside)
    return field


def layer_name(field: Any, name: str) -> str:
    """The name that a layer of the network inside has in ``field.named_modules()``.

    ``layer_name(DiffusedNoise(dit), "blocks.1")`` is ``"network.blocks.1"``; of the network itself it is
    ``"blocks.1"``. So one list of layers serves a network and its converted form. A name that is one of the field's own
    already stays as it is.
    """
    path, inside = [], field
    while isinstance(inside, Wrapper):
        path.append(inside.inside)
        inside = getattr(inside, inside.inside)
    if path and name in dict(field.named_modules()):
        return name
    return ".".join([*path, name])


def call_network(network: Any, x: Tensor, t: Tensor, r: Tensor | None, cond: dict[str, Any]) -> Tensor:
    """``network(x, t, r, **cond)``, without r where the network says that it ignores r.

    Raises:
        ValueError: if r is given and the network does not say whether it takes one. Without r a student would be
            trained on a network that never sees it.
    """
    if r is None:
        return network(x, t, **cond)
    takes_r = getattr(network, "takes_r", None)
    if takes_r is None:
        name = type(network_inside(network)).__name__
        raise ValueError(
            f"r was given for a {name} that does not say whether it takes r: set takes_r = True on it "
            f"(it uses r) or takes_r = False (it ignores r)"
        )
    return network(x, t, r, **cond) if takes_r else network(x, t, **cond)
