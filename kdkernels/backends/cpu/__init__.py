"""The native CPU backend: hands addresses of torch tensors to the C++ kernels (families in ``csrc/cpu``)."""

from kdkernels.backends.blocked_token_set import token_set
from kdkernels.backends.cpu.angle import angle
from kdkernels.backends.cpu.bernoulli import bernoulli
from kdkernels.backends.cpu.divergence import (
    SAVED_STATISTICS,
    divergence_backward,
    divergence_forward,
    divergence_fused,
    divergence_total,
)
from kdkernels.backends.cpu.gradient_entries import collect_entries, expand_entries, sparse_products
from kdkernels.backends.cpu.head_mass import head_mass
from kdkernels.backends.cpu.launching import status, supports
from kdkernels.backends.cpu.pairwise_l1 import pairwise_l1_backward, pairwise_l1_forward, pairwise_normalisers
from kdkernels.backends.cpu.ranking import plackett_luce, token_ranks
from kdkernels.backends.cpu.records import pack_records, unpack_records
from kdkernels.backends.cpu.relation import relation, relation_applies
from kdkernels.backends.cpu.row_deviation import row_deviation, row_deviation_backward
from kdkernels.backends.cpu.sinkhorn import SINKHORN_POTENTIALS, sinkhorn_backward, sinkhorn_forward
from kdkernels.backends.cpu.sorted_l1 import sorted_l1
from kdkernels.backends.cpu.sparse_divergence import sparse_divergence_fused
from kdkernels.backends.cpu.token_statistics import token_statistics
from kdkernels.backends.cpu.topk import sample, topk

__all__ = [
    "SAVED_STATISTICS",
    "SINKHORN_POTENTIALS",
    "angle",
    "bernoulli",
    "collect_entries",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "divergence_total",
    "expand_entries",
    "head_mass",
    "pack_records",
    "pairwise_l1_backward",
    "pairwise_l1_forward",
    "pairwise_normalisers",
    "plackett_luce",
    "relation",
    "relation_applies",
    "row_deviation",
    "row_deviation_backward",
    "sample",
    "sinkhorn_backward",
    "sinkhorn_forward",
    "sorted_l1",
    "sparse_divergence_fused",
    "sparse_products",
    "status",
    "supports",
    "token_ranks",
    "token_set",
    "token_statistics",
    "topk",
    "unpack_records",
]
