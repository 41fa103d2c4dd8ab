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
from kdkernels.backends.cuda.topk import sample, topk

__all__ = [
    "FAMILIES",
    "SAVED_STATISTICS",
    "divergence_backward",
    "divergence_forward",
    "divergence_fused",
    "pack_records",
    "sample",
    "status",
    "supports",
    "topk",
    "unpack_records",
]

FAMILIES = ("divergence", "linear_divergence", "records", "relation", "token_set", "topk")
FAMILIES = ("divergence", "linear_divergence", "compositions", "relation", "token_set")
"""The kernel families that this backend serves."""
