"""Gradients that can be differentiated again. They go through the reference, whatever backend made the values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["differentiable_gradients"]


def differentiable_gradients(
    values_of: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    upstream: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of ``sum(upstream * values_of(*tensors))`` to the tensors that are wanted, with a graph of their own.

    The values are computed from aliases: two of the tensors may be the same, or one computed from the other, and the way
    from one input to another is for autograd to go, not for this gradient.
    """
    with torch.enable_grad():
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        inputs = [alias for alias, want in zip(aliases, wanted, strict=True) if want and alias is not None]
        found = iter(torch.autograd.grad(values_of(*aliases), inputs, upstream, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]
