"""Softmax relations between the rows of two tensors: what the operators of the family ``relation`` are told of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec, compute_dtype

__all__ = ["Masks", "Relations"]


class Masks(NamedTuple):
    """Which pairs of rows take part in the softmaxes, of both sides alike; None: all."""

    columns: Tensor | None = None
    """bool ``[P, m]``."""
    pairs: Tensor | None = None
    """bool ``[P, n, m]`` or ``[n, m]``, the same for every problem."""
    causal: bool = False
    """Row i meets the columns up to i alone."""

    def hide(self, scores: Tensor, problems: slice, rows: slice) -> None:
        """Sets the scores ``[problems, rows, m]`` of pairs that do not take part to -inf."""
        if self.columns is not None:
            scores.masked_fill_(~self.columns[problems].unsqueeze(-2), -torch.inf)
        if self.pairs is not None:
            pairs = self.pairs[rows] if self.pairs.dim() == 2 else self.pairs[problems, rows]
            scores.masked_fill_(~pairs, -torch.inf)
        if self.causal:
            places = torch.arange(rows.start, rows.stop, device=scores.device).unsqueeze(-1)
            scores.masked_fill_(torch.arange(scores.shape[-1], device=scores.device) > places, -torch.inf)


class Relations(NamedTuple):
    """P problems: the rows ``softmax(scale left right^T)`` of a student and, unless only labels count, of a teacher."""

    student_left: Tensor
    """``[P, n, d]``."""
    student_right: Tensor
    """``[P, m, d]``."""
    teacher_left: Tensor | None
    teacher_right: Tensor | None
    student_scale: float
    teacher_scale: float
    masks: Masks
    spec: RowSpec
    """Of the P n rows."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(self[:4])

    @property
    def shape(self) -> tuple[int, int, int]:
        """P, n and m."""
        return (*self.student_left.shape[:2], self.student_right.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""
        return compute_dtype(self.student_left, self.teacher_left)
