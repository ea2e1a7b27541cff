"""What every converter is: a network, how to read it, and the description of it that is passed on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hd_zoo.field import Field
from hd_zoo.wrappers.wrapper import Wrapper, call_network


class Converter(Wrapper):
    """A network and how to read it; ``arguments`` are what :func:`hd_zoo.save_pretrained` keeps of the latter.

    It is a full teacher: it has the ``sample_shape``, ``classes``, ``null_label`` and ``takes_r`` of the network, which
    is its ``network``: layer ``blocks.1`` of that is ``network.blocks.1`` here (:func:`hd_zoo.layer_name`).
    """

    inside = "network"
    network: Any

    def __init__(self, network: Field, **arguments: Any) -> None:
        super().__init__()
        self.network = network
        self.arguments = arguments

    def answer(self, x: Tensor, t: Tensor, r: Tensor | None, cond: dict[str, Any]) -> Tensor:
        """The network's, with r if it takes one."""
        return call_network(self.network, x, t, r, cond)
