"""The class-conditional diffusion transformer (DiT, arXiv 2212.09748; SiT, 2401.08740), with two times.

Shape letters: B batch, N tokens, C width, H heads, D = C / H head width, P patch side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hd_zoo.field import check_times, labels_or_null


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) times -> (B, width) cosines and sines at ``width / 2`` frequencies from 1 down to 1 / max_period.

    In t's dtype but never below float32: half precision cannot tell neighbouring times apart.
    """
    half = width // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    exponents = torch.arange(half, device=t.device, dtype=t.dtype) / half
    angles = t[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_embedding(width: int, height: int, columns: int) -> Tensor:
    """Fixed sine-cosine positions of a ``height x columns`` grid, row-major: (height * columns, width).

    Float32. The first half of the channels encodes the column, the second the row, as in DiT.
    """
    omega = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(columns), indexing="ij")
    halves = []
    for positions in (cols, rows):
        angles = positions.reshape(-1, 1).double() * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def check_embedding(frequencies: int, time_scale: float) -> None:
    """Raise ValueError for settings that no :class:`TimeEmbedding` can have."""
    if frequencies < 2 or frequencies % 2:
        raise ValueError(f"frequencies must be even and >= 2; got {frequencies}")
    if not 0 < time_scale < math.inf:
        raise ValueError(f"time_scale must be > 0 and finite; got {time_scale}")


class TimeEmbedding(nn.Module):
    """Times -> (B, width): sinusoids through a two-layer MLP. ``zero_init``: its output is zero at first."""

    def __init__(self, width: int, frequencies: int, scale: float, *, zero_init: bool = False) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.scale = scale
        first, last = nn.Linear(frequencies, width), nn.Linear(width, width)
        nn.init.normal_(first.weight, std=0.02)
        nn.init.normal_(last.weight, std=0.02)
        if zero_init:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, t: Tensor) -> Tensor:
        weight = next(self.mlp.parameters())
        return self.mlp(sinusoidal_embedding(self.scale * t, self.frequencies).to(weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, C) with PyTorch's fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(h), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n d -> b n (heads d)"))


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part: (B, N, C) with a (B, C) shift and scale per sample."""
    return torch.addcmul(shift[:, None], h, 1 + scale[:, None])


#: What stands between the two layers of a block's MLP. DiT and SiT take the tanh form of GELU.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu_tanh": lambda: nn.GELU(approximate="tanh"), "silu": nn.SiLU}


class Block(nn.Module):
    """Attention and MLP, each behind a norm modulated by the condition and gated by it (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: str) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        h = torch.addcmul(h, gate1[:, None], self.attn(modulate(self.norm1(h), shift1, scale1)))
        return torch.addcmul(h, gate2[:, None], self.mlp(modulate(self.norm2(h), shift2, scale2)))


class Head(nn.Module):
    """Tokens -> patches, behind a last modulated norm; zero at first, so that a new network predicts zero."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        return self.linear(modulate(self.norm(h), *self.modulation(condition).chunk(2, dim=-1)))


class DiffusionTransformer(nn.Module):
    """A field on images: ``model(x, t, r=None, labels=None) -> velocity`` of x's shape.

    Args:
        image_size: height and width of the (latent) image in pixels; a multiple of ``patch``.
        channels: channels of the image.
        patch: side of a square patch; the network sees ``(image_size / patch)^2`` tokens.
        width, depth, heads, mlp_ratio: the transformer's size; ``width`` is a multiple of ``4`` and of
            ``heads``.
        classes: number of classes; label ``classes`` is the null class. 0 makes the network unconditional.
        interval: None for a network of t alone (a teacher; it ignores r). "added" adds an embedding of
            (t - r) whose last layer starts at zero, so that the network is the teacher exactly until it is
            trained [ours].
        activation: "gelu_tanh" (DiT, SiT) or "silu", which costs a third of it on a CPU.
        time_scale: factor on t and (t - r) before the sinusoids. It multiplies du/dt; SiT uses 1, DiT 1000.
        frequencies: number of sinusoids in the time embeddings.

    Raises:
        ValueError: for impossible sizes, or inputs whose shapes or labels do not fit.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        classes: int = 0,
        interval: str | None = None,
        activation: str = "gelu_tanh",
        time_scale: float = 1.0,
        frequencies: int = 256,
    ) -> None:
        super().__init__()
        if image_size < 1 or patch < 1 or image_size % patch:
            raise ValueError(f"image_size must be a positive multiple of patch; got {image_size} and {patch}")
        if heads < 1 or width < 4 or width % heads or width % 4:
            raise ValueError(f"width must be a multiple of 4 and of heads; got width {width}, heads {heads}")
        if min(channels, depth) < 1 or classes < 0:
            raise ValueError(f"channels and depth must be >= 1, classes >= 0; got {channels}, {depth} and {classes}")
        if not 1 <= width * mlp_ratio < math.inf:
            raise ValueError(f"width * mlp_ratio must be >= 1 and finite; got {width} * {mlp_ratio}")
        if interval not in (None, "added"):
            raise ValueError(f'interval must be None or "added"; got {interval!r}')
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        check_embedding(frequencies, time_scale)
        self.image_size, self.channels, self.patch, self.classes = image_size, channels, patch, classes
        self.interval = interval
        self.grid = image_size // patch
        self.patch_embed = nn.Linear(channels * patch * patch, width)
        self.time_embed = TimeEmbedding(width, frequencies, time_scale)
        self.interval_embed = (
            TimeEmbedding(width, frequencies, time_scale, zero_init=True) if interval == "added" else None
        )
        self.label_embed = nn.Embedding(classes + 1, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, activation) for _ in range(depth))
        self.head = Head(width, channels * patch * patch)
        self.register_buffer("positions", grid_embedding(width, self.grid, self.grid))
        self._initialise()

    def _initialise(self) -> None:
        """adaLN-zero: blocks start as the identity, the head at zero; Xavier for the other linear maps."""
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear) and "modulation" not in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ("modulation" in name or name == "head.linear"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one image, (channels, image_size, image_size)."""
        return (self.channels, self.image_size, self.image_size)

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", or None for an unconditional network."""
        return self.classes if self.classes else None

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
        """x (B, channels, image_size, image_size); t, r (B,) in [0, 1]; labels (B,) int64 or None: null class."""
        if x.ndim != 4 or x.shape[1:] != self.sample_shape:
            shape = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"x must have shape (B, {shape}); got {tuple(x.shape)}")
        check_times(x, t, r)
        condition = self.time_embed(t)
        if self.interval_embed is not None:
            condition = condition + self.interval_embed(torch.zeros_like(t) if r is None else t - r)
        if self.label_embed is not None:
            condition = condition + self.label_embed(labels_or_null(labels, x, self.classes))
        elif labels is not None:
            raise ValueError("labels were given to an unconditional network (classes = 0)")
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        h = self.patch_embed(tokens) + self.positions
        for block in self.blocks:
            h = block(h, condition)
        return rearrange(
            self.head(h, condition),
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=self.grid,
            p=self.patch,
            q=self.patch,
        )
