"""The pooling in Triton: ``plan`` chooses, ``launch`` allocates and calls, the rest are kernels."""
