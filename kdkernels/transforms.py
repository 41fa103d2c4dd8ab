"""Function transformations: what runs a function on stand-ins for tensors, whose memory and values are out of reach."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["transformed", "values_are_known"]

# Questions to torch that have no public form.
_innermost_transform: Any = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def transformed() -> bool:
    """Whether a ``torch.func`` transformation or forward-mode differentiation is at work. Not to be asked in a graph."""
    return _innermost_transform() is not None or getattr(forward_ad, "_current_level", -1) >= 0


def values_are_known() -> bool:
    """Whether the values of a tensor may decide what is done: neither while a graph is captured nor in a transformation."""
    return not torch.compiler.is_compiling() and not transformed()
