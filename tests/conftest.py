"""What all tests share."""

from __future__ import annotations

import os

# Before torch starts its thread pool: threads that wait for work should sleep, not spin against the tests beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Whatever `kdkernels tune` has stored on this machine, the tests launch kernels with the sizes everyone gets.
os.environ.setdefault("KDKERNELS_TUNING", "0")

import hypothesis

# The same examples in every run, and no deadline: a shared machine may stall any of them.
hypothesis.settings.register_profile("kdkernels", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("kdkernels")
