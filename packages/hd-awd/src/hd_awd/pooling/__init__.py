"""Attention pooling of normalised tokens: ``reference`` says what it is, ``folded`` computes it, ``op`` is public."""

from hd_awd.pooling.op import attention_pool

__all__ = ["attention_pool"]
