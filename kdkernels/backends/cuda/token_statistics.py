"""The family token_statistics in CUDA C++."""

from __future__ import annotations

from functools import partial

from kdkernels.backends.compiled import token_statistics as compiled
from kdkernels.backends.cuda.launching import LIBRARY

__all__ = ["token_statistics"]

token_statistics = partial(compiled.token_statistics, LIBRARY)
