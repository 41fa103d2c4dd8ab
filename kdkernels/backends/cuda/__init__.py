"""The CUDA C++ backend: hands addresses of torch tensors to the kernels in ``csrc/cuda``.

With ``KDKERNELS_CUDA_EMULATED`` set to the path of the module that the tests build, the same kernels run on the host under a
block emulator, on CPU tensors.
"""

from kdkernels.backends.blocked_token_set import token_set
from kdkernels.backends.cuda.divergence import (
    SAVED_STATISTICS,
    divergence_backward,
    divergence_forward,
    divergence_fused,
)
from kdkernels.backends.cuda.launching import status, supports
from kdkernels.backends.cuda.pairwise_l1 import pairwise_l1_backward, pairwise_l1_forward, pairwise_normalisers
from kdkernels.backends.cuda.records import pack_records, unpack_records
from kdkernels.backends.cuda.sinkhorn import SINKHORN_POTENTIALS, sinkhorn_backward, sinkhorn_forward
from kdkernels.backends.cuda.sparse_divergence import sparse_divergence_fused
from kdkernels.backends.cuda.token_statistics import token_statistics
from kdkernels.backends.cuda.topk import sample, topk

__all__ = [
    "FAMILIES",
    "SAVED_STATISTICS",
    "SINKHORN_POTENTIALS",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "pack_records",
    "pairwise_l1_backward",
    "pairwise_l1_forward",
    "pairwise_normalisers",
    "sample",
    "sinkhorn_backward",
    "sinkhorn_forward",
    "sparse_divergence_fused",
    "status",
    "supports",
    "token_set",
    "token_statistics",
    "topk",
    "unpack_records",
]

FAMILIES = (
    "divergence",
    "linear_divergence",
    "compositions",
    "relation",
    "token_statistics",
    "topk",
    "records",
    "sparse_divergence",
    "token_set",
    "pairwise_l1",
    "sinkhorn",
)
"""The kernel families that this backend serves."""
