"""Gradients that are written over the logits they belong to."""

from __future__ import annotations

from torch import Tensor

__all__ = ["shares_storage"]


def shares_storage(gradient: Tensor | None, logits: Tensor) -> bool:
    """Whether a gradient, if it is wanted, lies where the logits are."""
    return gradient is not None and gradient.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
