"""The Triton backend: launches the kernels of ``kdkernels.triton_kernels`` on CUDA and ROCm tensors.

With ``TRITON_INTERPRET=1`` set before triton is imported, they run in Triton's interpreter instead, on CPU tensors.
"""

from kdkernels.backends.triton.angle import angle
from kdkernels.backends.triton.bernoulli import bernoulli
from kdkernels.backends.triton.divergence import (
    SAVED_STATISTICS,
    divergence_backward,
    divergence_forward,
    divergence_fused,
)
from kdkernels.backends.triton.head_mass import head_mass
from kdkernels.backends.triton.launching import status, supports
from kdkernels.backends.triton.linear_divergence import linear_divergence, linear_divergence_applies
from kdkernels.backends.triton.pairwise_l1 import pairwise_l1_backward, pairwise_l1_forward, pairwise_normalisers
from kdkernels.backends.triton.ranking import plackett_luce, token_ranks
from kdkernels.backends.triton.records import unpack_records
from kdkernels.backends.triton.row_deviation import row_deviation, row_deviation_backward
from kdkernels.backends.triton.sinkhorn import SINKHORN_POTENTIALS, sinkhorn_backward, sinkhorn_forward
from kdkernels.backends.triton.sorted_l1 import sorted_l1
from kdkernels.backends.triton.sparse_divergence import sparse_divergence_fused
from kdkernels.backends.triton.token_set import token_set
from kdkernels.backends.triton.token_statistics import token_statistics
from kdkernels.backends.triton.topk import sample, topk

__all__ = [
    "SAVED_STATISTICS",
    "SINKHORN_POTENTIALS",
    "angle",
    "bernoulli",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "head_mass",
    "linear_divergence",
    "linear_divergence_applies",
    "pairwise_l1_backward",
    "pairwise_l1_forward",
    "pairwise_normalisers",
    "plackett_luce",
    "row_deviation",
    "row_deviation_backward",
    "sample",
    "sinkhorn_backward",
    "sinkhorn_forward",
    "sorted_l1",
    "sparse_divergence_fused",
    "status",
    "supports",
    "token_ranks",
    "token_set",
    "token_statistics",
    "topk",
    "unpack_records",
]
