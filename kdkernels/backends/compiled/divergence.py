"""The arguments of the families divergence and token_statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdkernels.backends.compiled.library import DTYPES, FLOAT64, Library, address, composition
from kdkernels.backends.gradient_entries import EntryLists
from kdkernels.backends.rows import RowSpec, Scales

__all__ = ["launch_divergence", "lists_arguments", "rounding_arguments", "sides_arguments"]

NO_SCALES = Scales(0.0, None, 0.0, None)


def sides_arguments(library: Library, student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Any, ...]:
    """The leading arguments that all kernels share."""
    rows, vocab = student.shape
    student_temperature, student_rows, teacher_temperature, teacher_rows, *softcaps, labels, active = spec[3:11]
    student_type = DTYPES[student.dtype]
    teacher_type = student_type if teacher is None else DTYPES[teacher.dtype]
    return (
        library.place(student),
        student_type == FLOAT64 or teacher_type == FLOAT64,
        rows,
        vocab,
        student.data_ptr(),
        student.stride(0),
        student_type,
        0 if teacher is None else teacher.data_ptr(),
        0 if teacher is None else teacher.stride(0),
        teacher_type,
        student_temperature,
        address(student_rows),
        teacher_temperature,
        address(teacher_rows),
        *softcaps,
        address(labels),
        address(active),
    )


def lists_arguments(lists: EntryLists | None) -> tuple[int, int]:
    return (0, 0) if lists is None else (lists.counts.data_ptr(), lists.summaries.data_ptr())


def rounding_arguments(spec: RowSpec) -> tuple[float, bool, int, int]:
    """(tolerance, whether stochastic, seed, number of the first row)."""
    seed = spec.gradient_seed
    return spec.gradient_tolerance, seed is not None, 0 if seed is None else int(seed), spec.first_row


def launch_divergence(
    library: Library,
    kernel: str,
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    scales: Scales = NO_SCALES,
    *,
    divergence: Tensor | None = None,
    cross_entropy: Tensor | None = None,
    grad_student: Tensor | None = None,
    grad_teacher: Tensor | None = None,
    total: Tensor | None = None,
    statistics: Tensor | None = None,
    fresh_gradients: bool = False,
    lists: tuple[EntryLists | None, EntryLists | None] = (None, None),
) -> None:
    """Calls a kernel of the family; results and gradients that are None are not wanted."""
    getattr(library.module(), kernel)(
        *sides_arguments(library, student, teacher, spec),
        *spec[:3],
        address(divergence),
        address(cross_entropy),
        scales.divergence_factor,
        address(scales.divergence),
        scales.cross_entropy_factor,
        address(scales.cross_entropy),
        *((0, 0) if grad_student is None else (grad_student.data_ptr(), grad_student.stride(0))),
        *((0, 0) if grad_teacher is None else (grad_teacher.data_ptr(), grad_teacher.stride(0))),
        address(total),
        address(statistics),
        fresh_gradients,
        *lists_arguments(lists[0]),
        *lists_arguments(lists[1]),
        *rounding_arguments(spec),
        address(spec.parameters),
        address(spec.targets),
        spec.target_weight,
        address(spec.target_weights),
        spec.rest_weight,
        address(spec.rest_weights),
        composition(spec.student_composition),
        composition(spec.teacher_composition),
    )
