"""The CUDA C++ backend: hands addresses of torch tensors to the kernels in ``csrc/cuda``.

With ``KDKERNELS_CUDA_EMULATED`` set to the path of the module that the tests build, the same kernels run on the host under a
block emulator, on CPU tensors.
"""

from kdkernels.backends.cuda.divergence import (
    SAVED_STATISTICS,
    divergence_backward,
    divergence_forward,
    divergence_fused,
)
from kdkernels.backends.cuda.launching import status, supports
from kdkernels.backends.cuda.pairwise_l1 import pairwise_l1_backward, pairwise_l1_forward, pairwise_normalisers
from kdkernels.backends.cuda.sinkhorn import SINKHORN_POTENTIALS, sinkhorn_backward, sinkhorn_forward

__all__ = [
    "FAMILIES",
    "SAVED_STATISTICS",
    "SINKHORN_POTENTIALS",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "pairwise_l1_backward",
    "pairwise_l1_forward",
    "pairwise_normalisers",
    "sinkhorn_backward",
    "sinkhorn_forward",
    "status",
    "supports",
]

FAMILIES = ("divergence", "linear_divergence", "pairwise_l1", "relation", "sinkhorn", "token_set")
"""The kernel families that this backend serves."""
