"""A network and its plain weights, out of what training wraps around them: torch.compile, DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hd_zoo.weights.words import one_line
from hd_zoo.wrappers.convert import CONVERTERS, Converter

#: Name of the wrapped module inside its wrapper: torch.compile's, and that of (Distributed)DataParallel.
_WRAPPERS = ("_orig_mod", "module")


def unwrap(model: nn.Module) -> tuple[list[dict[str, Any]], nn.Module]:
    """The converters around a network, outermost first, and the network; wrappers anywhere between them are left out.

    Raises:
        ValueError: for a converter that is not of this package.
    """
    names = {kind: name for name, kind in CONVERTERS.items()}
    found = []
    while True:
        inner = _inside(model)
        if inner is not None:
            model = inner
        elif isinstance(model, Converter):
            if type(model) not in names:
                raise ValueError(f"a converter of this package is needed; got {type(model).__name__}")
            found.append({"name": names[type(model)], "arguments": model.arguments})
            model = model.network
        else:
            return found, model


def _inside(model: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None if it is none. A wrapper has one child of a known name and no weights of its own."""
    if len(model._modules) != 1 or model._parameters or model._buffers:
        return None
    ((name, inner),) = model._modules.items()
    return inner if name in _WRAPPERS else None


def plain_weights(network: nn.Module) -> dict[str, Tensor] | None:
    """The whole tensors by the network's own names, checked to be finite, whatever wraps its parts.

    A network of FSDP2 is gathered tensor by tensor: every process must call, the first gets the weights (on the CPU)
    and the others None.

    Raises:
        ValueError: if a tensor holds infinities or NaN, with the first one's name.
    """
    sharded, first = False, True
    found = {}
    for name, tensor in network.state_dict().items():
        tensor = tensor.detach()
        if hasattr(tensor, "full_tensor"):  # a DTensor; not imported, because that takes long
            sharded, first = True, torch.distributed.get_rank() == 0
            tensor = tensor.full_tensor()  # every process takes part
            if not first:
                continue
            tensor = tensor.cpu()
        found[".".join(part for part in name.split(".") if part not in _WRAPPERS)] = tensor.contiguous()
    if sharded and not first:
        return None
    check_finite(found)
    return found


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError that names the first tensor with infinities or NaN. One wait for the device."""
    # The extremes are NaN if anything is: one pass without a copy, where isfinite takes 35 times as long on a CPU.
    flags = [
        torch.stack(torch.aminmax(tensor)).isfinite().all() if tensor.numel() else torch.tensor(True)
        for tensor in tensors.values()
    ]
    if not flags or torch.stack([flag.to(flags[0].device) for flag in flags]).all():
        return
    for (name, tensor), flag in zip(tensors.items(), flags, strict=True):
        if not flag:
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"the weights are not finite: {one_line(name, 80)} has {bad:,} of {tensor.numel():,} NaN or inf"
            )
