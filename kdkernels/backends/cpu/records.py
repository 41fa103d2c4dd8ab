"""The family records on the CPU."""

from __future__ import annotations

from functools import partial

from kdkernels.backends.compiled import records as compiled
from kdkernels.backends.cpu.launching import LIBRARY

__all__ = ["pack_records", "unpack_records"]

pack_records = partial(compiled.pack_records, LIBRARY)
unpack_records = partial(compiled.unpack_records, LIBRARY)
