"""Triton kernels, one module per kernel family; installed as `kdkernels.triton_kernels`. Launched by `kdkernels.backends.triton`."""
