"""The family pairwise_l1 in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.in_place import shares_storage
from kdkernels.backends.rows import PairSpec, Tempering, compute_dtype
from kdkernels.backends.triton.launching import (
    load_kernels,
    on_device_of,
    precision,
    prepare_launch,
    split_of,
    warp_size,
)

__all__ = ["pairwise_l1_backward", "pairwise_l1_forward", "pairwise_normalisers"]

BLOCK = 16
"""Rows of either side whose pairs a program of the forward holds."""

FORWARD_THREADS = 256

OWN_BLOCK, OTHER_BLOCK, COLUMNS, BACKWARD_THREADS = 32, 8, 64, 256
"""Of the backward: rows that a program makes the gradient of, rows they meet at a time, entries of the vocabulary."""

SMALLEST_SPLIT = 2048
"""Entries of the vocabulary in a part."""


def pairwise_normalisers(logits: Tensor, tempering: Tempering, dtype: torch.dtype) -> Tensor:
    """``[N, 2]``, see ``kdkernels.backends.rows``."""
    rows, vocab_size = logits.shape
    normalisers = torch.empty(rows, 2, dtype=dtype, device=logits.device)
    launch = prepare_launch(logits)
    if rows:
        with on_device_of(logits, "pairwise_l1"):
            load_kernels().pairwise_l1.pairwise_normalisers_kernel[(rows,)](
                logits,
                launch.stride(logits),
                vocab_size,
                normalisers,
                tempering.temperature,
                tempering.softcap,
                HAS_CAP=tempering.softcap != 0,
                COMPUTE=precision(dtype == torch.float64)["compute"],
                UNROLL=launch.unroll,
                LANES=launch.lanes,
                WIDTH=launch.width,
                num_warps=launch.num_warps,
            )
    return normalisers


def pairwise_l1_forward(
    student: Tensor, teacher: Tensor, spec: PairSpec, normalisers: Sequence[Tensor], with_signs: bool
) -> tuple[Tensor, Tensor]:
    """``(distance [B, n, m], signed_mass [B, n, m] or [0])``: the sums of parts of the vocabulary, added up."""
    vocab_size = student.shape[1]
    dtype = compute_dtype(student, teacher)
    blocks = -(-spec.student_rows // BLOCK) * -(-spec.teacher_rows // BLOCK)
    lanes = warp_size(student)
    split = split_of(vocab_size, blocks * spec.problems, SMALLEST_SPLIT, lanes)
    parts = -(-vocab_size // split)
    distance = torch.empty(parts, *spec.shape, dtype=dtype, device=student.device)
    signed_mass = torch.empty_like(distance) if with_signs else None
    with on_device_of(student, "pairwise_l1"):
        load_kernels().pairwise_l1.pairwise_l1_forward_kernel[(spec.problems * blocks, parts)](
            student,
            teacher,
            student.stride(0),
            teacher.stride(0),
            spec.student_rows,
            spec.teacher_rows,
            vocab_size,
            split,
            *normalisers,
            spec.student.temperature,
            spec.teacher.temperature,
            spec.student.softcap,
            spec.teacher.softcap,
            distance,
            signed_mass,
            HAS_STUDENT_CAP=spec.student.softcap != 0,
            HAS_TEACHER_CAP=spec.teacher.softcap != 0,
            COMPUTE=precision(dtype == torch.float64)["compute"],
            STUDENT_BLOCK=BLOCK,
            TEACHER_BLOCK=BLOCK,
            LANES=lanes,
            num_warps=FORWARD_THREADS // lanes,
        )
    return distance.sum(0), distance.new_empty(0) if signed_mass is None else signed_mass.sum(0)


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
    strides = grad.stride()[1:]
    sides = (
        (student, spec.student_rows, normalisers[0], spec.student, strides[0], centres[0]),
        (teacher, spec.teacher_rows, normalisers[1], spec.teacher, strides[1], centres[1]),
    )
    # The teacher's gradient asks for the student's logits, which the student's gradient may be written over.
    late: Tensor | None = None
    if grad_student is not None and grad_teacher is not None and shares_storage(grad_student, student):
        late, grad_student = grad_student, torch.empty_like(grad_student)
    if grad_student is not None:
        gradient_of(grad_student, spec.problems, *sides, grad)
    if grad_teacher is not None:
        gradient_of(grad_teacher, spec.problems, *sides[::-1], grad)
    if late is not None and grad_student is not None:
        late.copy_(grad_student)


def gradient_of(gradient: Tensor, problems: int, own_side: Any, other_side: Any, grad: Tensor) -> None:
    own, own_rows, own_normalisers, own_tempering, grad_own_stride, centres = own_side
    other, other_rows, other_normalisers, other_tempering, grad_other_stride, _ = other_side
    vocab_size = own.shape[1]
    with on_device_of(own, "pairwise_l1"):
        load_kernels().pairwise_l1.pairwise_l1_backward_kernel[
            (problems * -(-own_rows // OWN_BLOCK), -(-vocab_size // COLUMNS))
        ](
            own,
            other,
            gradient,
            own.stride(0),
            other.stride(0),
            gradient.stride(0),
            own_rows,
            other_rows,
            vocab_size,
            own_normalisers,
            other_normalisers,
            own_tempering.temperature,
            other_tempering.temperature,
            own_tempering.softcap,
            other_tempering.softcap,
            grad,
            grad_own_stride,
            grad_other_stride,
            centres,
            HAS_OWN_CAP=own_tempering.softcap != 0,
            HAS_OTHER_CAP=other_tempering.softcap != 0,
            COMPUTE=precision(grad.dtype == torch.float64)["compute"],
            OWN_BLOCK=OWN_BLOCK,
            OTHER_BLOCK=OTHER_BLOCK,
            COLUMNS=COLUMNS,
            num_warps=BACKWARD_THREADS // warp_size(own),
        )
