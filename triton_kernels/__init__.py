"""Triton kernels, one module per kernel family, launched by `kdkernels.backends.triton`."""
