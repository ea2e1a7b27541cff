"""The class-conditional diffusion transformer with two times: DiT (arXiv 2212.09748), SiT (2401.08740), and by settings
LightningDiT (2501.01423).

Shape letters: B batch, N tokens, C width, H heads, D = C / H head width, P patch side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from hd_zoo.networks.attention import attend
from hd_zoo.networks.embedding import ConditionedField, check_condition, grid_embedding, rotary_table, rotate

#: What stands between the two layers of a block's MLP. DiT and SiT take the tanh form of GELU, LightningDiT SwiGLU.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"gelu_tanh": lambda: nn.GELU(approximate="tanh"), "silu": nn.SiLU}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda width: nn.LayerNorm(width, elementwise_affine=False, eps=1e-6),
    "rms": lambda width: nn.RMSNorm(width, eps=1e-6),
}
#: Of queries and keys, affine: there is no modulation behind them. With their eps: timm's attention, and so REPA and
#: LightningDiT with LayerNorm, has PyTorch's 1e-5; LightningDiT's and DMF's RMSNorm 1e-6.
QK_NORMS: dict[str, tuple[type[nn.LayerNorm] | type[nn.RMSNorm], float]] = {
    "layer": (nn.LayerNorm, 1e-5),
    "rms": (nn.RMSNorm, 1e-6),
}


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, C); ``rotary`` (2, N, D) turns queries and keys."""

    def __init__(self, width: int, num_heads: int, qk_norm: str | None, qk_norm_eps: float | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = make_qk_norm(width // num_heads, qk_norm, qk_norm_eps)
        self.k_norm = make_qk_norm(width // num_heads, qk_norm, qk_norm_eps)

    def forward(self, h: Tensor, rotary: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(h), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.proj(rearrange(attend(q, k, v), "b heads n d -> b n (heads d)"))


def make_qk_norm(head_width: int, qk_norm: str | None, eps: float | None) -> nn.Module:
    """The norm of queries or of keys, per head; None: none."""
    if qk_norm is None:
        return nn.Identity()
    norm, usual = QK_NORMS[qk_norm]
    return norm(head_width, eps=usual if eps is None else eps)


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): W_2 (silu(W_g h) * W_1 h), gate and value in one matrix, the gate first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, value = self.gate_and_value(h).chunk(2, dim=-1)
        return self.out(nn.functional.silu(gate) * value)


def make_mlp(width: int, ratio: float, activation: str) -> nn.Module:
    """A block's MLP; a gated one has 2/3 of the hidden width, so that it costs the same."""
    hidden = int(width * ratio)
    if activation == "swiglu":
        return GatedMLP(width, int(2 / 3 * hidden))
    return nn.Sequential(nn.Linear(width, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, width))


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part: (B, N, C) with a (B, C) shift and scale per sample."""
    return torch.addcmul(shift[:, None], h, 1 + scale[:, None])


class Block(nn.Module):
    """Attention and MLP, each behind a norm modulated by the condition and gated by it (adaLN-zero)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        activation: str,
        norm: str,
        qk_norm: str | None,
        qk_norm_eps: float | None,
    ) -> None:
        super().__init__()
        self.norm1 = NORMS[norm](width)
        self.attn = Attention(width, num_heads, qk_norm, qk_norm_eps)
        self.norm2 = NORMS[norm](width)
        self.mlp = make_mlp(width, mlp_ratio, activation)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, condition: Tensor, rotary: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        h = torch.addcmul(h, gate1[:, None], self.attn(modulate(self.norm1(h), shift1, scale1), rotary))
        return torch.addcmul(h, gate2[:, None], self.mlp(modulate(self.norm2(h), shift2, scale2)))


class Head(nn.Module):
    """Tokens -> patches, behind a last modulated norm; zero at first, so that a new network predicts zero."""

    def __init__(self, width: int, out: int, norm: str) -> None:
        super().__init__()
        self.norm = NORMS[norm](width)
        self.linear = nn.Linear(width, out)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        return self.linear(modulate(self.norm(h), *self.modulation(condition).chunk(2, dim=-1)))


class DiffusionTransformer(ConditionedField):
    """A field on images: ``model(x, t, r=None, labels=None) -> velocity`` of x's shape.

    Args:
        image_size: height and width of the (latent) image in pixels; a multiple of ``patch``.
        channels: channels of the image.
        patch: side of a square patch; the network sees ``(image_size / patch)^2`` tokens.
        width, depth, num_heads, mlp_ratio: the transformer's size; ``width`` is a multiple of ``4`` and of
            ``num_heads``.
        classes: number of classes; label ``classes`` is the null class. 0 makes the network unconditional.
        r_embedding: None for a network of t alone (a teacher; it ignores r). "added" adds an embedding of
            (t - r) whose last layer starts at zero, so that the network is the teacher exactly until it is
            trained [ours]. "decoupled" shows t to the first ``early_blocks`` blocks and r to the others and the head;
            no new weights, and the teacher exactly at r = t [arXiv 2510.24474].
        early_blocks: for "decoupled"; None is five of seven, 20 of an XL network's 28. With 0 no block is shown t.
        activation: "gelu_tanh" (DiT, SiT), "swiglu" (LightningDiT), or "silu", which costs a third of GELU on a CPU.
        norm: "layer", or "rms" (LightningDiT), which has a weight.
        rotary: turn queries and keys by their position, beside the fixed positions; head width a multiple of 4.
        qk_norm: normalise queries and keys per head: "layer" (REPA, LightningDiT), "rms" (LightningDiT, DMF) or None.
        qk_norm_eps: of that norm; None is the published networks', 1e-5 for "layer" and 1e-6 for "rms".
        learned_variance: the head predicts twice the channels; the second half (a variance, in DiT) is dropped.
        reversed_time: for weights whose t = 0 is noise and whose velocity points to data (SiT, LightningDiT): the
            network is shown 1 - t, 1 - r, and its output's sign is changed, so that from outside t = 0 is data.
        time_scale: factor on t and (t - r) before the sinusoids. It multiplies du/dt; SiT uses 1, DiT 1000.
        frequencies: number of sinusoids in the time embeddings.
        inclusive_frequencies: of t's embedding, as diffusers' DiT spaces them; see :func:`sinusoidal_embedding`.

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
        num_heads: int,
        mlp_ratio: float = 4.0,
        classes: int = 0,
        r_embedding: str | None = None,
        early_blocks: int | None = None,
        activation: str = "gelu_tanh",
        norm: str = "layer",
        rotary: bool = False,
        qk_norm: str | None = None,
        qk_norm_eps: float | None = None,
        learned_variance: bool = False,
        reversed_time: bool = False,
        time_scale: float = 1.0,
        frequencies: int = 256,
        inclusive_frequencies: bool = False,
    ) -> None:
        if image_size < 1 or patch < 1 or image_size % patch:
            raise ValueError(f"image_size must be a positive multiple of patch; got {image_size} and {patch}")
        if num_heads < 1 or width < 4 or width % num_heads or width % 4:
            raise ValueError(
                f"width must be a multiple of 4 and of num_heads; got width {width}, num_heads {num_heads}"
            )
        if min(channels, depth) < 1:
            raise ValueError(f"channels and depth must be >= 1; got {channels} and {depth}")
        if not 1 <= width * mlp_ratio < math.inf:
            raise ValueError(f"width * mlp_ratio must be >= 1 and finite; got {width} * {mlp_ratio}")
        for name, value, known in (
            ("activation", activation, (*ACTIVATIONS, "swiglu")),
            ("norm", norm, tuple(NORMS)),
            ("qk_norm", qk_norm, (None, *QK_NORMS)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")
        if qk_norm_eps is not None and (qk_norm is None or not 0 < qk_norm_eps < 1):
            raise ValueError(f"qk_norm_eps must lie in (0, 1) and needs qk_norm; got {qk_norm_eps} and {qk_norm!r}")
        if inclusive_frequencies and frequencies < 4:
            raise ValueError(f"inclusive_frequencies needs frequencies >= 4; got {frequencies}")
        if rotary and (width // num_heads) % 4:
            raise ValueError(f"rotary needs a head width that is a multiple of 4; got {width // num_heads}")
        if early_blocks is not None and not 0 <= early_blocks <= depth:
            raise ValueError(f"early_blocks must lie in [0, depth]; got {early_blocks} of {depth}")
        check_condition(classes, r_embedding, frequencies, time_scale)
        super().__init__()
        self.patch, self.grid, self.head_width = patch, image_size // patch, width // num_heads
        self.sample_shape = (channels, image_size, image_size)
        self.early_blocks = max(1, round(depth * 5 / 7)) if early_blocks is None else early_blocks
        self.learned_variance, self.reversed_time = learned_variance, reversed_time
        self.patch_embed = nn.Linear(channels * patch * patch, width)
        self._make_embeddings(width, classes, r_embedding, time_scale, frequencies, inclusive_frequencies)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, activation, norm, qk_norm, qk_norm_eps) for _ in range(depth)
        )
        self.head = Head(width, (2 if learned_variance else 1) * channels * patch * patch, norm)
        self.register_buffer("positions", grid_embedding(width, self.grid, self.grid))
        self.register_buffer("rotary", self.make_rotary() if rotary else None)
        self._initialise()

    def make_rotary(self) -> Tensor:
        """The table by which queries and keys are turned, (2, N, D)."""
        return rotary_table(self.head_width, self.grid, self.grid)

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

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, *, labels: Tensor | None = None) -> Tensor:
        """x (B, channels, image_size, image_size); t, r (B,) in [0, 1]; labels (B,) int64 or None: null class."""
        out = self._outputs(x, t, r, labels)
        if self.learned_variance:
            out = out[:, : self.sample_shape[0]]
        return -out if self.reversed_time else out

    def with_variance(self, x: Tensor, t: Tensor, *, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the network returns, and the second half of its channels: a variance in DiT, about [-1, 1].

        For :func:`hd_zoo.sample_ancestral`; both have x's shape.

        Raises:
            ValueError: for a network without ``learned_variance``.
        """
        if not self.learned_variance:
            raise ValueError("this network has no variance: learned_variance is False")
        out, variance = self._outputs(x, t, None, labels).chunk(2, dim=1)
        return -out if self.reversed_time else out, variance

    def _outputs(self, x: Tensor, t: Tensor, r: Tensor | None, labels: Tensor | None) -> Tensor:
        """All channels of the head, before the output's sign is changed."""
        if self.reversed_time:
            t, r = 1 - t, None if r is None else 1 - r
        early, late = self.conditions(x, t, r, labels)
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        h = self.patch_embed(tokens) + self.positions
        for index, block in enumerate(self.blocks):
            h = block(h, early if index < self.early_blocks else late, self.rotary)
        return rearrange(
            self.head(h, late), "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid, p=self.patch, q=self.patch
        )
