"""The family angle over any backend: what the angles in a student's triples of points are off from those in a teacher's.

The cosine at the corner j of the points i and k is ``(G_ik - G_ij - G_jk + G_jj) / (n_ij n_jk)`` with the Gram matrix G and
the distances n, so that nothing is larger than ``[B, B]``. Everything is in float64, about the mean of the points. The
products lose digits where points lie close together: of corners with such a neighbour the Gram matrix is made about the
corner itself, from differences, one product of matrices each.

A backend has ``angle(student, teacher, corners) -> (losses, gradient, sums)``, each side a pair of the Gram matrix and the
inverse distances (0 where points coincide), ``corners`` int64: with the smooth L1 distance h of the cosines and
``N_ik = <e_i - e_j, e_k - e_j>`` of the student, ``losses_i`` is the sum of h over j and k, ``gradient_ik`` that of
``dh/dN_ik`` over the corners j, and ``sums_ij`` over k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends import row_backend

__all__ = ["value_and_gradient"]

NEAR = {torch.float64: 1e-3, torch.float32: 1e-8}
"""Squared distances, relative to the largest from the mean, below which the error of the Gram matrix would show."""

TINY = 1e-24
"""Points with a squared distance up to this coincide."""

Side = tuple[Tensor, Tensor]


def side_of(points: Tensor, near: float) -> tuple[Side, Tensor]:
    """Gram matrix and inverse distances, and which points have a neighbour too near for them."""
    gram = points @ points.T
    own = gram.diagonal()
    squares = own.unsqueeze(-1) + own - 2 * gram
    too_near = squares <= near * own.max()
    for matrix, value in ((squares, 0), (too_near, False)):
        matrix.fill_diagonal_(value)
    inverse = torch.where(squares > TINY, squares.rsqrt(), 0)
    # What is not a number is no neighbour, but must be seen in the result.
    return (gram, torch.where(squares.isnan(), squares, inverse)), too_near.any(-1)


@torch.no_grad()
def value_and_gradient(student: Tensor, teacher: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    """The mean over all triples of points ``[B, d]``, 0-d, and its gradient to the student's, both float64."""
    count = student.shape[0]
    points = [side.double() - side.double().mean(0) for side in (student, teacher)]
    if count == 0:
        return points[0].new_zeros(()), points[0]
    sides, near = zip(*(side_of(each, NEAR[dtype]) for each in points), strict=True)
    crowded = near[0] | near[1]
    kernel = row_backend(backend).angle
    losses, gradient, sums = kernel(*sides, (~crowded).nonzero().squeeze(-1))
    value = losses.sum()
    # N_ik holds G_ik once, G_ij and G_jk once negative each, and G_jj.
    to_gram = gradient - 2 * sums
    to_gram.diagonal().add_(sums.sum(0))
    to_points = (to_gram + to_gram.T) @ points[0]
    for corner in crowded.nonzero():
        moved = [each - each[corner] for each in points]
        about = [about_corner(each, corner) for each in moved]
        losses, gradient, _ = kernel(*about, corner)
        value = value + losses.sum()
        part = (gradient + gradient.T) @ moved[0]
        to_points += part
        to_points[corner] -= part.sum(0)
    return value / count**3, to_points / count**3


def about_corner(moved: Tensor, corner: Tensor) -> Side:
    """The Gram matrix of points about the corner, and the distances from and to it, all that is asked for."""
    gram = moved @ moved.T
    squares = gram.diagonal()
    inverse = torch.where(squares > TINY, squares.rsqrt(), torch.where(squares.isnan(), squares, 0))
    lengths = torch.zeros_like(gram)
    lengths[corner] = inverse
    lengths[:, corner] = inverse.unsqueeze(-1)
    return gram, lengths
