"""The family pairwise_l1 in C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.compiled.library import DTYPES, FLOAT64, Library, address
from kdkernels.backends.rows import PairSpec, Tempering, compute_dtype

__all__ = ["pairwise_l1_backward", "pairwise_l1_forward", "pairwise_normalisers"]


def pairwise_normalisers(library: Library, logits: Tensor, tempering: Tempering, dtype: torch.dtype) -> Tensor:
    normalisers = logits.new_empty(logits.shape[0], 2, dtype=dtype)
    library.module().pairwise_normalisers(
        library.place(logits),
        dtype == torch.float64,
        *logits.shape,
        logits.data_ptr(),
        logits.stride(0),
        DTYPES[logits.dtype],
        tempering.temperature,
        tempering.softcap,
        normalisers.data_ptr(),
    )
    return normalisers


def _side(
    logits: Tensor,
    rows: int,
    tempering: Tempering,
    normalisers: Tensor,
    gradient: Tensor | None,
    centres: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of the kernel that say everything of one side."""
    return (
        rows,
        logits.data_ptr(),
        logits.stride(0),
        DTYPES[logits.dtype],
        tempering.temperature,
        tempering.softcap,
        normalisers.data_ptr(),
        *((0, 0) if gradient is None else (gradient.data_ptr(), gradient.stride(0))),
        address(centres),
    )


def _launch(
    library: Library,
    student: Tensor,
    teacher: Tensor,
    spec: PairSpec,
    normalisers: Sequence[Tensor],
    centres: Sequence[Tensor | None] = (None, None),
    gradients: Sequence[Tensor | None] = (None, None),
    *,
    distance: Tensor | None = None,
    signed_mass: Tensor | None = None,
    grad: Tensor | None = None,
    extra: tuple[int, ...] = (),
) -> None:
    library.module().pairwise_l1(
        library.place(student),
        FLOAT64 in {DTYPES[student.dtype], DTYPES[teacher.dtype]},
        spec.problems,
        student.shape[1],
        *_side(student, spec.student_rows, spec.student, normalisers[0], gradients[0], centres[0]),
        *_side(teacher, spec.teacher_rows, spec.teacher, normalisers[1], gradients[1], centres[1]),
        address(distance),
        address(signed_mass),
        address(grad),
        *extra,
    )


def pairwise_l1_forward(
    library: Library,
    student: Tensor,
    teacher: Tensor,
    spec: PairSpec,
    normalisers: Sequence[Tensor],
    with_signs: bool,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """With ``parts``, which a GPU is told, the sums of so many parts of the vocabulary: ``[parts, B, n, m]``."""
    shape = spec.shape if parts is None else (parts, *spec.shape)
    distance = student.new_empty(shape, dtype=compute_dtype(student, teacher))
    signed_mass = distance.new_empty(shape if with_signs else 0)
    _launch(
        library,
        student,
        teacher,
        spec,
        normalisers,
        distance=distance,
        signed_mass=signed_mass if with_signs else None,
        extra=() if parts is None else (parts,),
    )
    return distance, signed_mass


def pairwise_l1_backward(
    library: Library,
    student: Tensor,
    teacher: Tensor,
    spec: PairSpec,
    normalisers: Sequence[Tensor],
    grad: Tensor,
    centres: Sequence[Tensor],
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
    parts: int | None = None,
) -> None:
    extra = () if parts is None else (parts,)
    _launch(library, student, teacher, spec, normalisers, centres, (grad_student, grad_teacher), grad=grad, extra=extra)
