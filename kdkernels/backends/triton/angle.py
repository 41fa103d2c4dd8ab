"""The family angle on GPUs: by torch, for a block of corners at a time. There is no kernel of its own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["angle"]

BLOCK_BYTES = 64 << 20
"""Of one tensor of triples."""


def angle(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], corners: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gram = student[0]
    points = gram.shape[0]
    losses, gradient, sums = gram.new_zeros(points), torch.zeros_like(gram), torch.zeros_like(gram)
    for block in torch.split(corners, max(1, BLOCK_BYTES // max(1, points * points * gram.element_size()))):
        cosines, other = (cosines_at(*side, block) for side in (student, teacher))
        difference = cosines - other
        slope = difference.clamp(-1, 1)
        losses += (slope * (difference - 0.5 * slope)).sum((0, 2))
        lengths = student[1][block]
        to_products = slope * (lengths.unsqueeze(-1) * lengths.unsqueeze(-2))
        through_lengths = (slope * cosines).sum(-1) * lengths.square()
        gradient += to_products.sum(0)
        gradient.diagonal().sub_(through_lengths.sum(0))
        sums[:, block] = (to_products.sum(-1) - through_lengths).T
    return losses, gradient, sums


def cosines_at(gram: Tensor, inverse_distances: Tensor, corners: Tensor) -> Tensor:
    """``[J, B, B]``."""
    rows, lengths = gram[corners], inverse_distances[corners]
    own = gram.diagonal()[corners].view(-1, 1, 1)
    products = gram - rows.unsqueeze(-2) + (own - rows.unsqueeze(-1))
    return products * (lengths.unsqueeze(-1) * lengths.unsqueeze(-2))
