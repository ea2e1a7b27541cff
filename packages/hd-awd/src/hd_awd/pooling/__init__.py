"""Attention pooling of normalised tokens.

``reference`` defines it, ``folded`` writes it so that autograd can follow, ``blocks`` computes it in PyTorch with a
backward pass of its own, ``kernels`` in Triton; ``autograd`` ties the last two to PyTorch, ``op`` is public.
"""

from hd_awd.pooling.availability import why_not_triton
from hd_awd.pooling.op import attention_pool

__all__ = ["attention_pool", "why_not_triton"]
