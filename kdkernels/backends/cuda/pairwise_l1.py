"""The family pairwise_l1 on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kdkernels.backends.compiled import pairwise_l1 as compiled
from kdkernels.backends.cuda.launching import LIBRARY
from kdkernels.backends.in_place import shares_storage
from kdkernels.backends.rows import PairSpec

__all__ = ["pairwise_l1_backward", "pairwise_l1_forward", "pairwise_normalisers"]

TILE = 32
"""Rows of either side whose pairs a block of the forward has, at most."""

BLOCKS = 512
"""Of the forward at least, where the vocabulary can be split: some more than run on a GPU at once."""

SMALLEST_PART = 2048
"""Entries of the vocabulary."""

pairwise_normalisers = partial(compiled.pairwise_normalisers, LIBRARY)


def parts_of(vocab_size: int, spec: PairSpec) -> int:
    """Into how many parts the vocabulary is cut: by the shapes alone, so that sums repeat."""
    blocks = spec.problems * -(-spec.student_rows // TILE) * -(-spec.teacher_rows // TILE)
    return max(1, min(-(-BLOCKS // blocks), vocab_size // SMALLEST_PART))


def pairwise_l1_forward(
    student: Tensor, teacher: Tensor, spec: PairSpec, normalisers: Sequence[Tensor], with_signs: bool
) -> tuple[Tensor, Tensor]:
    """``(distance [B, n, m], signed_mass [B, n, m] or [0])``: the sums of parts of the vocabulary, added up."""
    parts = parts_of(student.shape[1], spec)
    distance, signed_mass = compiled.pairwise_l1_forward(
        LIBRARY, student, teacher, spec, normalisers, with_signs, parts
    )
    return distance.sum(0), signed_mass.sum(0) if with_signs else signed_mass


def pairwise_l1_backward(
    student: Tensor,
    teacher: Tensor,
    spec: PairSpec,
    normalisers: Sequence[Tensor],
    grad: Tensor,
    centres: Sequence[Tensor],
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
) -> None:
    """Writes the wanted gradients, see ``kdkernels.backends.rows``."""
    # Each asks for the logits of both sides. A single one that is written over its own can come last, but not both.
    both = shares_storage(grad_student, student) and shares_storage(grad_teacher, teacher)
    to_student = torch.empty_like(student) if both else grad_student
    compiled.pairwise_l1_backward(
        LIBRARY, student, teacher, spec, normalisers, grad, centres, to_student, grad_teacher, parts=1
    )
    if both and grad_student is not None and to_student is not None:
        grad_student.copy_(to_student)
