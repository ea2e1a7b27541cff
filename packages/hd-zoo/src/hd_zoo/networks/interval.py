"""Any network of one time as a network of two: an embedding of (t - r) is added to what its time embedding returns."""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hd_zoo.field import check_times
from hd_zoo.networks.embedding import TimeEmbedding
from hd_zoo.wrappers.wrapper import Wrapper


class AddedInterval(Wrapper):
    """A student: ``network`` with an embedding of (t - r) added to the output of the modules named ``at``.

    Made by :func:`hd_zoo.add_interval`, which copies the network first; here its modules are hooked as they are. The
    embedding's last layer is zero, so that the student equals the network at every r until it is trained [ours]. Layers
    and weights of the network keep their names behind ``network.``; the new ones are ``interval_embed.mlp``.

    Args:
        network: a field of t, called as ``network(x, t, **cond)``.
        at: names of modules in it, as ``network.named_modules()`` spells them. Each returns a tensor (B, width) and
            runs once per call. One embedding serves them all.
        width: of that tensor. None: ``out_features`` of the last ``nn.Linear`` in the module.
        time_scale: factor on (t - r) before its sinusoids; it multiplies du/dr.
        frequencies: number of sinusoids, even and >= 2.
        repeated: True: the modules may run several times per call, always for the same times.

    Raises:
        ValueError: for names that the network lacks (with the nearest), unequal or unknown widths, or when called for
            times or outputs of another shape.
        TypeError: when called, if a module returns something else than a tensor.
        RuntimeError: when called, if a module does not run, runs again without ``repeated``, or runs outside of the
            student's call.
    """

    inside = "network"
    network: Any

    def __init__(
        self,
        network: nn.Module,
        at: list,
        *,
        width: int | None = None,
        time_scale: float = 1.0,
        frequencies: int = 64,
        repeated: bool = False,
    ) -> None:
        super().__init__()
        if frequencies < 2 or frequencies % 2:
            raise ValueError(f"frequencies must be even and >= 2; got {frequencies}")
        if not 0 < time_scale < float("inf"):
            raise ValueError(f"time_scale must be > 0 and finite; got {time_scale}")
        modules = find_modules(network, at)
        width = common_width(modules) if width is None else width
        if width < 1:
            raise ValueError(f"width must be >= 1; got {width}")
        self.network = network
        self.at = list(modules)
        self.interval_embed = TimeEmbedding(width, frequencies, time_scale, zero_init=True)
        self._adders = [_Adder(name, width, repeated) for name in modules]
        for adder, module in zip(self._adders, modules.values(), strict=True):
            module.register_forward_hook(adder.add)

    @property
    def takes_r(self) -> bool:
        """True: it is a student."""
        return True

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        """Shapes as in :class:`hd_zoo.Field`; r None is r = t. The answer is :func:`unwrapped`."""
        check_times(x, t, r)
        if getattr(self, "_is_replica", False):  # its threads would share what is handed to the hooks
            raise RuntimeError("nn.DataParallel does not work with a student of add_interval; use DDP")
        embedding = self.interval_embed(torch.zeros_like(t) if r is None else t - r)
        for adder in self._adders:
            adder.embedding, adder.runs = embedding, 0
        try:
            out = self.network(x, t, **cond)
        finally:
            for adder in self._adders:
                adder.embedding = None
        for adder in self._adders:
            if not adder.runs:
                raise RuntimeError(f"module {adder.name!r} did not run in this call, so r has no effect through it")
        return unwrapped(out)


class _Adder:
    """The hook of one module. It is handed the embedding for the length of one call of the student."""

    def __init__(self, name: str, width: int, repeated: bool) -> None:
        self.name, self.width, self.repeated = name, width, repeated
        self.embedding: Tensor | None = None
        self.runs = 0

    def add(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        if self.embedding is None:
            raise RuntimeError(
                f"module {self.name!r} ran outside of its student's call: call the student, not the network in it; "
                "checkpoint activations of the whole student, not of parts that hold this module"
            )
        self.runs += 1
        if self.runs > 1 and not self.repeated:
            raise RuntimeError(
                f"module {self.name!r} ran {self.runs} times in one call: name one that runs once, "
                "or give repeated=True if every run is for the same times"
            )
        if not isinstance(output, Tensor):
            inner = [name for name, part in module.named_modules() if name and _last_linear(part) is not None]
            near = ", ".join(f"{self.name}.{name}" for name in inner[:4]) or "none"
            raise TypeError(
                f"module {self.name!r} returns a {type(output).__name__}, not a tensor: "
                f"name one in it that returns the embedding alone; candidates: {near}"
            )
        if output.shape != (len(self.embedding), self.width):
            raise ValueError(
                f"module {self.name!r} returns shape {tuple(output.shape)}, not {(len(self.embedding), self.width)}: "
                "name the module that returns one embedding per sample, or give its width"
            )
        return output + self.embedding.to(output.dtype)


@torch.no_grad()
def fold_added_interval(student: AddedInterval, gap: float) -> nn.Module:
    """A copy of the network inside, with the embedding of t - r = ``gap`` in the biases of its embeddings of time.

    A constant added to an embedding is a bias of its last linear layer. Equal to the student wherever t - r = ``gap``.

    Raises:
        ValueError: for a module without a linear layer that has a bias.
    """
    field: nn.Module = copy.deepcopy(student.network)
    weight = next(student.interval_embed.parameters())
    constant = student.interval_embed(torch.full((1,), gap, dtype=torch.float64, device=weight.device))[0]
    for name in student.at:
        module = field.get_submodule(name)
        module._forward_hooks.clear()  # copied with the student's hook, which wants the student
        last = _last_linear(module)
        if last is None or last.bias is None:
            raise ValueError(f"module {name!r} has no linear layer with a bias, into which the interval could go")
        last.bias.add_(constant.to(last.bias))
    return field.eval()


def unwrapped(output: Any) -> Tensor:
    """The tensor in a network's output: itself, its ``sample`` (as diffusers' outputs have it), or a tuple's first.

    Raises:
        TypeError: if there is none.
    """
    found = output
    if not isinstance(found, Tensor):
        found = getattr(output, "sample", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"a network must return a tensor, or an object with .sample; got {type(output).__name__}")
    return found


def find_modules(network: nn.Module, at: str | Sequence[str]) -> dict[str, nn.Module]:
    """The modules with these names, by name; a ``*`` stands for any text (``blocks.*.norm1.emb``).

    Raises:
        ValueError: for no names, a repeated one, or one that the network lacks, with the nearest.
    """
    patterns = [at] if isinstance(at, str) else list(at)
    if not patterns or not all(isinstance(name, str) and name for name in patterns):
        raise ValueError(f"at must be a module's name or a list of them; got {at!r}")
    modules = {name: module for name, module in network.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        names = fnmatch.filter(modules, pattern) if "*" in pattern else [name for name in modules if name == pattern]
        if not names:
            raise ValueError(f"at: the network has no module {pattern!r}; nearest: {_nearest(pattern, list(modules))}")
        if not found.keys().isdisjoint(names):
            raise ValueError(f"at names {next(name for name in names if name in found)!r} twice; got {patterns}")
        found |= {name: modules[name] for name in names}
    return found


def common_width(modules: dict[str, nn.Module]) -> int:
    """``out_features`` of the last ``nn.Linear`` in each module, which must be the same for all.

    Raises:
        ValueError: for a module without one, or for different widths.
    """
    widths: dict[str, int] = {}
    for name, module in modules.items():
        last = _last_linear(module)
        if last is None:
            raise ValueError(f"at: module {name!r} holds no nn.Linear that would tell its width; give width=")
        widths[name] = last.out_features
    if len(set(widths.values())) > 1:
        raise ValueError(f"at: one embedding is added to all modules, but their widths differ: {widths}")
    return next(iter(widths.values()))


def _last_linear(module: nn.Module) -> nn.Linear | None:
    return next((part for part in reversed(list(module.modules())) if isinstance(part, nn.Linear)), None)


def _nearest(name: str, known: list[str]) -> str:
    """The likeliest names: those that end alike or speak of time, then those spelled most alike."""
    last = name.rpartition(".")[2]
    likely = [one for one in known if one.rpartition(".")[2] == last] or [
        one for one in known if "time" in one.rpartition(".")[2].lower()
    ]
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.0)
    return ", ".join(list(dict.fromkeys([*likely[:4], *close]))[:6]) or "none"
