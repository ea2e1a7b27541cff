"""The pooling in Triton: ``plan`` chooses, ``traffic`` counts bytes, ``launch`` calls, the rest are kernels."""
