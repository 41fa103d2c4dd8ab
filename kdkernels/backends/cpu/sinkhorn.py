"""The family sinkhorn on the CPU."""

from __future__ import annotations

from functools import partial

from kdkernels.backends.compiled import sinkhorn as compiled
from kdkernels.backends.cpu.launching import LIBRARY

__all__ = ["SINKHORN_POTENTIALS", "sinkhorn_backward", "sinkhorn_forward"]

SINKHORN_POTENTIALS = compiled.SINKHORN_POTENTIALS
sinkhorn_forward = partial(compiled.sinkhorn_forward, LIBRARY)
sinkhorn_backward = partial(compiled.sinkhorn_backward, LIBRARY)
