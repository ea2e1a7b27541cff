"""Attention pooling of normalised tokens: ``reference`` defines it, ``folded`` computes, ``op`` is public."""

from hd_awd.pooling.op import attention_pool

__all__ = ["attention_pool"]
