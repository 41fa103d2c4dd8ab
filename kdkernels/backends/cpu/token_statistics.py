"""The family token_statistics on the CPU."""

from __future__ import annotations

from functools import partial

from kdkernels.backends.compiled import token_statistics as compiled
from kdkernels.backends.cpu.launching import LIBRARY

__all__ = ["token_statistics"]

token_statistics = partial(compiled.token_statistics, LIBRARY)
