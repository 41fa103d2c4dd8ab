"""The family pairwise_l1 on the CPU."""

from __future__ import annotations

from functools import partial

from kdkernels.backends.compiled import pairwise_l1 as compiled
from kdkernels.backends.cpu.launching import LIBRARY

__all__ = ["pairwise_l1_backward", "pairwise_l1_forward", "pairwise_normalisers"]

pairwise_normalisers = partial(compiled.pairwise_normalisers, LIBRARY)
pairwise_l1_forward = partial(compiled.pairwise_l1_forward, LIBRARY)
pairwise_l1_backward = partial(compiled.pairwise_l1_backward, LIBRARY)
