"""What all tests share."""

from __future__ import annotations

import hypothesis

# The same examples in every run, and no deadline: a shared machine may stall any of them.
hypothesis.settings.register_profile("kdkernels", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("kdkernels")
