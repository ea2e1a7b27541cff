"""Which layers of a network to look at, where nobody has chosen any: evenly spaced blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from hd_awd.config import check_size

#: Names of a UNet's way down, its middle and its way up: diffusers', ADM's (arXiv 2105.05233), and common short ones.
UNETS = (
    ("down_blocks", "mid_block", "up_blocks"),
    ("input_blocks", "middle_block", "output_blocks"),
    ("downs", "mid", "ups"),
)


def default_layers(network: nn.Module, number: int = 4) -> list[str]:
    """Names of ``number`` evenly spaced blocks of a network, for :class:`hd_awd.FeatureTap` [ours].

        tap = FeatureTap(teacher, default_layers(teacher))

    The blocks are the first that is found of

    1. a UNet's levels: ``down_blocks``, ``mid_block`` and ``up_blocks`` of one module (or ADM's names, or ``downs``,
       ``mid`` and ``ups``), in this order;
    2. the longest ``nn.ModuleList`` of two or more modules of one class; of equally long ones that with the most
       parameters. Outermost lists alone, as a block may hold lists of its own;
    3. of an ``nn.ModuleList`` of one and of ``nn.Sequential`` with like modules, that with the most parameters.

    Of D blocks the last of each of ``number`` equal parts is taken: 6, 13, 20 and 27 of 28, always with the last one.
    Blocks of SD3 return the text's tokens first; there the image's feed-forward part, ``ff``, stands for the block.

    Args:
        network: any module, perhaps with wrappers around it.
        number: how many; a network with fewer blocks gives all of them.

    Returns:
        Names as ``network.named_modules()`` spells them, first to last.

    Raises:
        ValueError: for a number that is no int >= 1, or a network without repeated blocks.
    """
    check_size("number", number)
    blocks = unet_levels(network) or repeated_blocks(network)
    if not blocks:
        raise ValueError(
            f"found no repeated blocks in this {type(network).__name__}: no UNet's levels, no nn.ModuleList or "
            "nn.Sequential of like modules; name its layers"
        )
    chosen = min(number, len(blocks))
    picked = [blocks[-(-(i + 1) * len(blocks) // chosen) - 1] for i in range(chosen)]
    return [f"{name}.ff" if hasattr(network.get_submodule(name), "ff_context") else name for name in picked]


def unet_levels(network: nn.Module) -> list[str]:
    """Names of a UNet's levels from the first to the last; none where there is no UNet."""
    for prefix, module in network.named_modules():
        for down, middle, up in UNETS:
            first, last = getattr(module, down, None), getattr(module, up, None)
            if not isinstance(first, nn.ModuleList) or not isinstance(last, nn.ModuleList):
                continue
            names = [f"{down}.{i}" for i in range(len(first))]
            names += [middle] if isinstance(getattr(module, middle, None), nn.Module) else []
            names += [f"{up}.{i}" for i in range(len(last))]
            return [f"{prefix}.{name}" if prefix else name for name in names]
    return []


def repeated_blocks(network: nn.Module) -> list[str]:
    """Names of the modules in a list of like modules, by the rule of :func:`default_layers`; none without a list."""
    found = list(_lists_of_blocks(network, ""))
    long = [names for container, names in found if isinstance(container, nn.ModuleList) and len(names) > 1]
    if long:
        return max(long, key=lambda names: (len(names), _size(network, names)))
    rest = [names for container, names in found if isinstance(container, nn.ModuleList) or len(names) > 1]
    return max(rest, key=lambda names: _size(network, names), default=[])


def _lists_of_blocks(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, list[str]]]:
    """(container, names of its like modules), outermost alone: what lies in a list of blocks is not looked at."""
    names: list[str] = []
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        names = [prefix + name for name in _alike(module)]
        if names:
            yield module, names
    if len(names) < (1 if isinstance(module, nn.ModuleList) else 2):
        for name, child in module.named_children():
            yield from _lists_of_blocks(child, f"{prefix}{name}.")


def _alike(container: nn.Module) -> list[str]:
    """Names of the children of the most frequent class that has weights and is no table of embeddings."""
    kinds = {
        name: type(child)
        for name, child in container.named_children()
        if not isinstance(child, nn.Embedding) and next(child.parameters(), None) is not None
    }
    if not kinds:
        return []
    ((most, _),) = Counter(kinds.values()).most_common(1)
    return [name for name, kind in kinds.items() if kind is most]


def _size(network: nn.Module, names: list[str]) -> int:
    return sum(parameter.numel() for name in names for parameter in network.get_submodule(name).parameters())
