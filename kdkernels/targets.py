"""Soft targets of yes-or-no questions, as stored: a few ids with their values, and one value for all others."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.checks import check_floating, check_integral, check_real

__all__ = ["SparseTargets"]


class SparseTargets:
    """Targets in [0, 1] for every entry of the vocabulary, of which only some differ from a constant.

    Unlike ``TopKLogits`` they are no distribution: each entry is a question of its own, and they need not sum to 1.

    Args:
        ids: ``[..., k]``, int64 or int32, different within a token; -1 where there is no entry.
        values: ``[..., k]``, the targets of these ids, in [0, 1].
        fill: the target of all others: a number, or ``[...]`` with one per token.
    """

    __slots__ = ("fill", "ids", "values")

    def __init__(self, ids: Tensor, values: Tensor, fill: float | Tensor = 0.0) -> None:
        check_integral("SparseTargets: ids", ids)
        check_floating("SparseTargets: values", values)
        if ids.dim() < 1 or ids.shape != values.shape:
            raise ValueError(
                f"SparseTargets: ids and values must have one shape [..., k], got {tuple(ids.shape)} and {tuple(values.shape)}"
            )
        if isinstance(fill, Tensor):
            check_floating("SparseTargets: fill", fill)
            if fill.shape != ids.shape[:-1]:
                raise ValueError(
                    f"SparseTargets: fill must have the shape {tuple(ids.shape[:-1])} of the tokens, got {tuple(fill.shape)}"
                )
        elif not 0 <= check_real("SparseTargets: fill", fill) <= 1:
            raise ValueError(f"SparseTargets: fill must be in [0, 1], got {fill!r}")
        devices = {tensor.device for tensor in (ids, values, fill) if isinstance(tensor, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"SparseTargets: all tensors must be on one device, got {sorted(map(str, devices))}")
        self.ids = ids
        self.values = values
        self.fill = fill

    @property
    def batch_shape(self) -> torch.Size:
        """The shape ``[...]`` of the tokens."""
        return self.ids.shape[:-1]
