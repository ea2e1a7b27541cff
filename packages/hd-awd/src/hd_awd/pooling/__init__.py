"""Attention pooling of normalised tokens.

``op`` is public, ``inputs`` says what every path takes and gives. ``reference`` defines the pooling, ``folded`` writes
it so that autograd can follow, ``blocks`` computes it in PyTorch with a backward pass of its own, ``kernels`` in
Triton; ``autograd`` ties the last two to PyTorch.
"""

from hd_awd.pooling.availability import why_not_triton
from hd_awd.pooling.op import attention_pool

__all__ = ["attention_pool", "why_not_triton"]
