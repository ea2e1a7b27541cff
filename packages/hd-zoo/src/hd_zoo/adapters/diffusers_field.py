"""diffusers' networks as fields: one adapter for all, which names conditions, scales time and unwraps outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hd_zoo.adapters.rebuild import OfDiffusers
from hd_zoo.field import check_times
from hd_zoo.networks.interval import unwrapped


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one of diffusers' classes is called.

    Attributes:
        conditions: our name of a condition -> its argument; ``added_cond_kwargs.text_embeds`` is an entry of a dict.
        needed: those that every call must pass.
        classes: the entry of its configuration that says how many classes it has.
        time_embedding: the modules to which :func:`hd_zoo.add_interval` adds the interval.
    """

    conditions: dict[str, str]
    needed: tuple[str, ...] = ()
    classes: str | None = None
    time_embedding: str = "model.time_embedding"


KINDS: dict[str, Kind] = {
    "UNet2DModel": Kind(conditions={"labels": "class_labels"}, classes="num_class_embeds"),
    "UNet2DConditionModel": Kind(
        conditions={
            "prompt": "encoder_hidden_states",
            "prompt_mask": "encoder_attention_mask",
            "labels": "class_labels",
            "text_embeds": "added_cond_kwargs.text_embeds",
            "time_ids": "added_cond_kwargs.time_ids",
            "timestep_cond": "timestep_cond",
        },
        needed=("prompt",),
        classes="num_class_embeds",
    ),
    "PixArtTransformer2DModel": Kind(
        conditions={
            "prompt": "encoder_hidden_states",
            "prompt_mask": "encoder_attention_mask",
            "resolution": "added_cond_kwargs.resolution",
            "aspect_ratio": "added_cond_kwargs.aspect_ratio",
        },
        needed=("prompt",),
        time_embedding="model.adaln_single.emb.timestep_embedder",
    ),
    "SD3Transformer2DModel": Kind(
        conditions={"prompt": "encoder_hidden_states", "pooled_prompt": "pooled_projections"},
        needed=("prompt", "pooled_prompt"),
        time_embedding="model.time_text_embed.timestep_embedder",
    ),
}


class DiffusersField(OfDiffusers):
    """``network(x, t, **cond)`` of a model of diffusers: its own prediction at timestep ``time_scale * t``.

    What :class:`hd_zoo.DiffusedNoise` expects, and for a model trained by flow matching the velocity itself.

    | class | conditions (needed ones first) |
    |---|---|
    | `UNet2DModel` | `labels` where it has classes |
    | `UNet2DConditionModel` | `prompt`; `prompt_mask`, `labels`, `text_embeds`, `time_ids`, `timestep_cond` |
    | `PixArtTransformer2DModel` | `prompt`; `prompt_mask`, `resolution`, `aspect_ratio` |
    | `SD3Transformer2DModel` | `prompt`, `pooled_prompt` |

    All are tensors with the batch first: embeddings of the text, no text. Channels behind those of x, a variance that
    the model learned, are dropped. Inputs of its group norms are made contiguous, as their forward derivative needs.

    Args:
        model: one of these.
        time_scale: the number of timesteps that it was trained with.

    Raises:
        ValueError: for another class, a time embedding by random Fourier features of the noise level, and in a call
            for conditions that are missing or unknown, times of another shape, or an output of another shape.
    """

    def __init__(self, model: nn.Module, time_scale: float = 1000.0) -> None:
        super().__init__()
        name = type(model).__name__
        if name not in KINDS:
            raise ValueError(f"model must be one of {', '.join(KINDS)}; got {name}")
        config: Any = getattr(model, "config", None)
        if getattr(config, "time_embedding_type", "positional") != "positional":
            raise ValueError(
                f"only models with time_embedding_type 'positional' convert; got {config.time_embedding_type!r}"
            )
        self.model, self.time_scale, self.kind = model, time_scale, KINDS[name]
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_contiguous_input)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one sample at the size of training; others run too.

        Raises:
            AttributeError: if the model's configuration has no sample_size.
        """
        size = self.model.config.sample_size
        if size is None:
            raise AttributeError("the model's configuration has no sample_size")
        height, width = (size, size) if isinstance(size, int) else size
        return self.model.config.in_channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes, 0 for a model without labels."""
        return int((self.kind.classes and getattr(self.model.config, self.kind.classes, None)) or 0)

    @property
    def null_label(self) -> None:
        """None: these models have no label for "no class"."""
        return None

    @property
    def time_embedding_at(self) -> str:
        """Where :func:`hd_zoo.to_student` adds the interval."""
        return self.kind.time_embedding

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Any) -> Tensor:
        """x (B, C, H, W), t (B,) in [0, 1]; r is ignored."""
        check_times(x, t, r)
        arguments = self._arguments(cond)
        out = unwrapped(self.model(x, timestep=self.time_scale * t, return_dict=False, **arguments))
        if out.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
            out = out[:, : x.shape[1]]
        if out.shape != x.shape:
            raise ValueError(f"the model returns shape {tuple(out.shape)} for x of shape {tuple(x.shape)}")
        return out

    def _arguments(self, cond: dict[str, Any]) -> dict[str, Any]:
        """The conditions by the model's own names; None is left out."""
        cond = {name: value for name, value in cond.items() if value is not None}
        name, known = type(self.model).__name__, self.kind.conditions
        unknown = sorted(cond.keys() - known.keys())
        if unknown:
            raise ValueError(f"a {name} takes the conditions {', '.join(known)}; got {', '.join(unknown)}")
        needed = self.kind.needed + (("labels",) if self.classes else ())
        missing = [one for one in needed if one not in cond]
        if missing:
            raise ValueError(f"a {name} needs the condition {', '.join(missing)} in every call")
        arguments: dict[str, Any] = {}
        for ours, value in cond.items():
            theirs, _, entry = known[ours].partition(".")
            if entry:
                arguments.setdefault(theirs, {})[entry] = value
            else:
                arguments[theirs] = value
        return arguments


def _contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])
