"""Intermediate features of any network, as tokens."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn


class FeatureTap:
    """Runs a network and returns what named modules inside it put out.

        tap = FeatureTap(teacher, ["blocks.1", "blocks.3"])
        features = tap(x_t, t, labels=labels)            # one (B, N, C) tensor per name

    The discriminator of HD looks at images through the FROZEN TEACHER's features, never at pixels. Gradients
    flow through the network into its inputs; freeze its parameters (``requires_grad_(False)``) so that they
    gather none. Hooks live for the length of one call: the network is left as it was found, also when it
    raises. What a module puts out is not copied: a later in-place operation of the network
    (``ReLU(inplace=True)``) shows in it.

    Args:
        network: any module; tap it before ``torch.compile``, which passes hooks by.
        names: names of modules in it, as ``network.named_modules()`` spells them; features come in this
            order. :func:`hd_awd.default_layers` finds some.

    Raises:
        ValueError: for no names, a repeated one, or one that the network lacks (with those that are near).
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        if isinstance(names, str) or not names:
            raise ValueError(f"names must be a non-empty sequence of module names; got {names!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"names must not repeat; got {list(names)}")
        modules = dict(network.named_modules())
        for name in names:
            if name not in modules:
                near = difflib.get_close_matches(name, [known for known in modules if known], n=8, cutoff=0.0)
                raise ValueError(f"the network has no module {name!r}; nearest: {', '.join(near) or 'none'}")
        self.network = network
        self.names = tuple(names)
        self._modules = [modules[name] for name in names]

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Features of ``network(*args, **kwargs)``: one (B, N, C) tensor per name, with the network's graph.

        Raises:
            RuntimeError: if a module did not run, or ran more than once, in this call.
            TypeError: if a module's output is no tensor.
            ValueError: if it is neither (B, N, C), (B, C, H, W), (B, C, T, H, W) nor (B, C).
        """
        return self.run(*args, **kwargs)[1]

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """Like calling the tap, but returns (the network's output, features): one pass for both uses."""
        caught: dict[str, list[Any]] = {name: [] for name in self.names}
        hooks = [
            module.register_forward_hook(lambda _module, _args, output, name=name: caught[name].append(output))
            for name, module in zip(self.names, self._modules, strict=True)
        ]
        try:
            output = self.network(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        for name, outputs in caught.items():
            if len(outputs) != 1:
                times = "did not run" if not outputs else f"ran {len(outputs)} times"
                raise RuntimeError(f"module {name!r} {times} in this call; a tapped module must run exactly once")
        return output, [as_tokens(outputs[0], name) for name, outputs in caught.items()]


def as_tokens(feature: Any, name: str = "the module") -> Tensor:
    """A module's output as tokens (B, N, C): a view of it where strides allow, with its graph.

    Tokens (B, N, C) stay as they are; a convolutional map (B, C, H, W) becomes (B, H W, C), row-major; one of video
    (B, C, T, H, W) becomes (B, T H W, C), frame after frame; a vector (B, C) becomes (B, 1, C). A tuple or list
    stands for its first entry (many blocks return (hidden, something)).

    Raises:
        TypeError: for anything that is not a tensor.
        ValueError: for other numbers of dimensions.
    """
    if isinstance(feature, (tuple, list)) and feature:
        feature = feature[0]
    if not isinstance(feature, Tensor):
        raise TypeError(f"{name} puts out {type(feature).__name__}, not a tensor")
    if feature.ndim == 5:
        return rearrange(feature, "b c t h w -> b (t h w) c")
    if feature.ndim == 4:
        return rearrange(feature, "b c h w -> b (h w) c")
    if feature.ndim == 3:
        return feature
    if feature.ndim == 2:
        return feature[:, None]
    raise ValueError(
        f"{name} puts out shape {tuple(feature.shape)}; (B, N, C), (B, C, H, W), (B, C, T, H, W) or (B, C) is needed"
    )
