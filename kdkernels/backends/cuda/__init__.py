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
from kdkernels.backends.cuda.records import pack_records, unpack_records
from kdkernels.backends.cuda.sparse_divergence import sparse_divergence_fused
from kdkernels.backends.cuda.token_statistics import token_statistics
from kdkernels.backends.cuda.topk import sample, topk

__all__ = [
    "FAMILIES",
    "SAVED_STATISTICS",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "pack_records",
    "sample",
    "sparse_divergence_fused",
    "status",
    "supports",
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
)
"""The kernel families that this backend serves."""
