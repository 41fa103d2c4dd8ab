"""The family sparse_divergence on the CPU."""

from __future__ import annotations

from functools import partial

from kdkernels.backends.compiled import sparse_divergence as compiled
from kdkernels.backends.cpu.launching import LIBRARY

__all__ = ["sparse_divergence_fused"]

sparse_divergence_fused = partial(compiled.sparse_divergence_fused, LIBRARY)
