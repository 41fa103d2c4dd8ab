"""What the tests run in a process of its own, where Triton's interpreter is on (see the fixture `interpreter`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_report.interpretation import observed
from torch import Tensor

from kdkernels.backends import triton as backend
from kdkernels.backends.rows import RowSpec
from kdkernels.backends.sparse_rows import SparseRows
from kdkernels.reference import records

UNTOUCHED = 7.0
"""Fills gradient buffers beforehand, so that an element that was not written shows."""


def availability(tensor: Tensor) -> tuple[tuple[bool, str], tuple[bool, str]]:
    return backend.status(), backend.supports(tensor.device.type)


def saved_statistics() -> tuple[int, int]:
    """Columns of the statistics, according to the backend and to the kernels."""
    from kdkernels.triton_kernels import divergence as kernels

    return backend.SAVED_STATISTICS, kernels.STATISTICS.value


def divergence(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None = None,
    grads: tuple[bool, bool] = (True, True),
    in_place: bool = False,
    padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(divergence, cross_entropy, grad_student, grad_teacher); the gradients' rows have `padding` more elements."""

    def buffer(logits: Tensor, wanted: bool) -> Tensor | None:
        if not wanted or in_place:
            return logits if wanted else None
        rows, vocab_size = logits.shape
        return torch.full((rows, vocab_size + padding), UNTOUCHED, dtype=logits.dtype)

    to_student, to_teacher = buffer(student, grads[0]), buffer(teacher, grads[1])
    views = [None if each is None else each[:, : student.shape[1]] for each in (to_student, to_teacher)]
    values = backend.divergence_fused(student, teacher, spec, grad_divergence, grad_cross_entropy, *views)
    return *values, to_student, to_teacher


def sparse_divergence(
    student: Tensor,
    teacher: SparseRows,
    spec: RowSpec,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(divergence, cross_entropy, gradient)."""
    gradient = None
    if grad_divergence is not None:
        gradient = student if in_place else torch.full_like(student, UNTOUCHED)
    values = backend.sparse_divergence_fused(student, teacher, spec, grad_divergence, grad_cross_entropy, gradient)
    return *values, gradient


def token_statistics(student: Tensor, teacher: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    return backend.token_statistics(student, teacher, spec)


def unpack_records(*arguments: Any, room: Any = backend) -> tuple[Tensor, Tensor, Tensor] | str:
    """What is decoded, or the text of the refusal."""
    try:
        return room.unpack_records(*arguments)
    except ValueError as error:
        return str(error)


def unpack_by_definition(*arguments: Any) -> tuple[Tensor, Tensor, Tensor] | str:
    return unpack_records(*arguments, room=records)


@contextmanager
def _counted(tensors: dict[str, Tensor]) -> Iterator[dict[str, int]]:
    """Counts the elements that kernels load from and store to each tensor: masked-out ones do not count."""
    counts: dict[str, int] = {}

    def count(action: str, addresses: Any, mask: Any, _: int) -> None:
        for name, tensor in tensors.items():
            first = tensor.data_ptr()
            inside = mask & (addresses >= first) & (addresses < first + tensor.numel() * tensor.element_size())
            if inside.any():
                key = f"{action} {name}"
                counts[key] = counts.get(key, 0) + int(inside.sum())

    with observed(count):
        yield counts


def traffic(kernel: str, rows: int, vocab_size: int, kind: int, grads: tuple[bool, bool]) -> dict[str, float]:
    """Elements moved per logit, by "load student" and the like, by one forward, backward or token_statistics."""
    student, teacher = torch.randn(2, rows, vocab_size).unbind()
    spec = RowSpec(kind, 0.3, 0.6)
    upstream = torch.ones(rows)
    _, _, statistics = backend.divergence_forward(student, teacher, spec)
    gradients = [torch.empty_like(student) if wanted else None for wanted in grads]
    named = {"student": student, "teacher": teacher, "grad_student": gradients[0], "grad_teacher": gradients[1]}
    with _counted({name: tensor for name, tensor in named.items() if tensor is not None}) as counts:
        if kernel == "forward":
            backend.divergence_forward(student, teacher, spec)
        elif kernel == "backward":
            backend.divergence_backward(student, teacher, statistics, spec, upstream, None, *gradients)
        else:
            backend.token_statistics(student, teacher, spec)
    return {name: count / (rows * vocab_size) for name, count in counts.items()}
