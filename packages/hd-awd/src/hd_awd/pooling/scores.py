"""What all paths do alike, in PyTorch's operations: vectors without their mean, scores with bias and mask."""

from __future__ import annotations

from torch import Tensor


def centred(vectors: Tensor) -> Tensor:
    """Less the mean over the last dimension, which products with normalised tokens do not see but for rounding."""
    return vectors - vectors.mean(dim=-1, keepdim=True)


def logits(scores: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """scores (B, M, N) + bias, -inf where the mask (B, N) is False; without either the scores themselves."""
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores if mask is None else scores.masked_fill(~mask[:, None], float("-inf"))
