"""The family angle in Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.triton.launching import load_kernels, on_device_of, split_of, warp_size

__all__ = ["angle"]

TILE, THREADS = 32, 128
"""Points on either side of a tile of pairs, and the threads that have it in hand; with twice as many some registers spill."""

SMALLEST_SPLIT = 32
"""Steps of a program's loop over the third points, where that is split."""


def angle(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], corners: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kdkernels.backends.angles``."""
    gram = student[0]
    points, count = gram.shape[0], corners.shape[0]
    blocks, corner_blocks = -(-points // TILE), -(-count // TILE)
    if count == 0:
        return gram.new_zeros(points), torch.zeros_like(gram), torch.zeros_like(gram)
    options: dict[str, Any] = {"TILE": TILE, "num_warps": THREADS // warp_size(gram)}
    # Sums over parts are added up in an order that the shapes alone decide.
    split = split_of(count, blocks * (blocks + 1) // 2, SMALLEST_SPLIT)
    parts = -(-count // split)
    gradients = gram.new_empty(parts, points, points)
    split_ends = split_of(points, blocks * blocks, SMALLEST_SPLIT)  # few matrices, however few corners
    end_parts = -(-points // split_ends)
    sums = gram.new_zeros(end_parts, points, points)
    losses, through_lengths = gram.new_empty(2, end_parts * corner_blocks, points)
    with on_device_of(gram, "angle"):
        kernels = load_kernels().angle
        kernels.angle_gradient_kernel[(blocks, blocks, parts)](
            *student, *teacher, points, corners, count, split, gradients, **options
        )
        kernels.angle_sums_kernel[(blocks, corner_blocks, end_parts)](
            *student, *teacher, points, corners, count, split_ends, sums, losses, through_lengths, **options
        )
    gradient = gradients.sum(0)
    gradient.diagonal().sub_(through_lengths.sum(0))
    return losses.sum(0), gradient, sums.sum(0)
