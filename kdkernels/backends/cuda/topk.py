"""The family topk in CUDA C++."""

from __future__ import annotations

from functools import partial

from kdkernels.backends.compiled import topk as compiled
from kdkernels.backends.cuda.launching import LIBRARY

__all__ = ["sample", "topk"]

topk = partial(compiled.topk, LIBRARY)
sample = partial(compiled.sample, LIBRARY)
