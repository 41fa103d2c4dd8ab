"""Operators of the family ``divergence``: both sides are logits ``[N, V]``.

``kdkernels::divergence`` gives the value of every row, ``kdkernels::divergence_backward`` its gradients, and
``kdkernels::divergence_total`` the weighted sum over the rows together with its gradients, which a scalar loss wants: then
the logits are read while they are in the cache. In eager mode the autograd functions are called without the dispatcher,
which would cost more than a small loss does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Problem
from kdkernels.backends import HAVE_TOTAL, row_backend
from kdkernels.backends.rows import RowSpec, Scales, compute_dtype
from kdkernels.ops.eager import save, saved, take_scaled, traced
from kdkernels.ops.schema import SPEC, SPEC_LENGTH, TAGS, as_numbers, has_labels, pack_spec, spec_gradients, unpack_spec
from kdkernels.ops.second_order import differentiable_gradients
from kdkernels.reference import rows as reference

__all__ = ["has_total", "rows", "total"]


def gradient_like(logits: Tensor, wanted: bool) -> Tensor:
    """Where a gradient goes; an operator returns an empty tensor for one that is not wanted."""
    return logits.new_empty(logits.shape if wanted else 0)


def forward(student: Tensor, teacher: Tensor, backend: str, *packed: Any) -> tuple[Tensor, Tensor, Tensor]:
    spec = unpack_spec(packed)
    values: tuple[Tensor, Tensor, Tensor] = row_backend(backend).divergence_forward(student, teacher, spec)
    return values


divergence_op = torch.library.custom_op(
    "kdkernels::divergence",
    forward,
    mutates_args=(),
    schema=f"(Tensor student, Tensor teacher, str backend, {SPEC}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


@divergence_op.register_fake
def _(student: Tensor, teacher: Tensor, backend: str, *packed: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = student.shape[0]
    divergence = student.new_empty(count, dtype=compute_dtype(student, teacher))
    cross_entropy = divergence.new_empty(count if has_labels(packed) else 0)
    return divergence, cross_entropy, divergence.new_empty(count, row_backend(backend).SAVED_STATISTICS)


def backward(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    to_student: bool,
    to_teacher: bool,
    backend: str,
    *packed: Any,
) -> tuple[Tensor, Tensor]:
    gradients = gradient_like(student, to_student), gradient_like(teacher, to_teacher)
    row_backend(backend).divergence_backward(
        student,
        teacher,
        statistics,
        unpack_spec(packed),
        grad_divergence.contiguous(),
        None if grad_cross_entropy is None else grad_cross_entropy.contiguous(),
        gradients[0] if to_student else None,
        gradients[1] if to_teacher else None,
    )
    return gradients


divergence_backward_op = torch.library.custom_op(
    "kdkernels::divergence_backward",
    backward,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor statistics, Tensor grad_divergence, Tensor? grad_cross_entropy, "
    f"bool to_student, bool to_teacher, str backend, {SPEC}) -> (Tensor, Tensor)",
    tags=TAGS,
)


@divergence_backward_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    to_student: bool,
    to_teacher: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return gradient_like(student, to_student), gradient_like(teacher, to_teacher)


def setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, ctx.backend, ctx.kind, *fields = inputs
    save(ctx, student, teacher, output[2], *fields)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def backward_rows(
    ctx: Any, grad_divergence: Tensor | None, grad_cross_entropy: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    student, teacher, statistics, *fields = saved(ctx)
    packed = ctx.kind, *fields
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    if grad_divergence is None:
        grad_divergence = student.new_zeros(student.shape[0], dtype=compute_dtype(student, teacher))
    if torch.is_grad_enabled():
        gradients = second_order(student, teacher, unpack_spec(packed), wanted, grad_divergence, grad_cross_entropy)
    else:
        found = divergence_backward_op(
            student, teacher, statistics, grad_divergence, grad_cross_entropy, *wanted, ctx.backend, *packed
        )
        gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    return *gradients, None, *spec_gradients(ctx)


def second_order(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    wanted: tuple[bool, bool],
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
) -> list[Tensor | None]:
    """The gradients to the logits, differentiable once more."""
    hard = spec.labels is not None and grad_cross_entropy is not None

    def values(student: Tensor, teacher: Tensor) -> list[Tensor]:
        divergence = reference.divergence(student, teacher, spec)
        return [divergence, reference.cross_entropy(student, spec, divergence.dtype)] if hard else [divergence]

    upstream = [grad_divergence, grad_cross_entropy] if hard and grad_cross_entropy is not None else [grad_divergence]
    return differentiable_gradients(values, (student, teacher), wanted, upstream)


divergence_op.register_autograd(backward_rows, setup_context=setup_rows)


class Rows(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(setup_rows)
    backward = staticmethod(backward_rows)


def rows(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """``(divergence [N], cross_entropy [N] or [0])``, differentiable."""
    assert problem.teacher is not None
    student, teacher = problem.student.tensor, problem.teacher.tensor
    if traced(student, teacher):
        values = divergence_op(student, teacher, backend, *pack_spec(problem.spec))
    elif torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        values = Rows.apply(student, teacher, backend, *pack_spec(problem.spec))  # type: ignore[no-untyped-call]
    else:
        values = row_backend(backend).divergence_forward(student, teacher, problem.spec)
    return values[0], values[1]


def forward_total(
    student: Tensor,
    teacher: Tensor,
    factors: Tensor,
    divergence_scale: Tensor | None,
    cross_entropy_scale: Tensor | None,
    to_student: bool,
    to_teacher: bool,
    backend: str,
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    divergence_factor, cross_entropy_factor = factors.tolist()
    grad_student, grad_teacher = gradient_like(student, to_student), gradient_like(teacher, to_teacher)
    value = row_backend(backend).divergence_total(
        student,
        teacher,
        unpack_spec(packed),
        Scales(divergence_factor, divergence_scale, cross_entropy_factor, cross_entropy_scale),
        grad_student if to_student else None,
        grad_teacher if to_teacher else None,
    )
    return value, grad_student, grad_teacher


divergence_total_op = torch.library.custom_op(
    "kdkernels::divergence_total",
    forward_total,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor factors, Tensor? divergence_scale, Tensor? cross_entropy_scale, "
    f"bool to_student, bool to_teacher, str backend, {SPEC}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


@divergence_total_op.register_fake
def _(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    to_student, to_teacher = rest[3:5]
    value = student.new_empty((), dtype=compute_dtype(student, teacher))
    return value, gradient_like(student, to_student), gradient_like(teacher, to_teacher)


def setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def backward_total(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grad_student, grad_teacher = ctx.saved_tensors
    needs = ctx.needs_input_grad
    gradients = (
        grad_student * grad_total if needs[0] and grad_total is not None else None,
        grad_teacher * grad_total if needs[1] and grad_total is not None else None,
    )
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - 2 - SPEC_LENGTH), *spec_gradients(ctx)


divergence_total_op.register_autograd(backward_total, setup_context=setup_total)


class FusedTotal(torch.autograd.Function):
    """``divergence_total`` in eager mode, where the gradient is handed on without a copy and may be donated memory."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, scales: Scales, donate: bool, backend: str, spec: RowSpec
    ) -> Tensor:
        to_student, to_teacher = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_student = None
        if to_student:
            donate = donate and (student.shape[0] == 1 or student.stride(0) >= student.shape[1])
            grad_student = student.detach() if donate else student.new_empty(student.shape)
        grad_teacher = teacher.new_empty(teacher.shape) if to_teacher else None
        value: Tensor = row_backend(backend).divergence_total(
            student, teacher, spec, scales, grad_student, grad_teacher
        )
        ctx.gradients = grad_student, grad_teacher
        ctx.options = scales, spec
        ctx.donated = donate and to_student
        if ctx.donated:
            torch.autograd.graph.increment_version(student)
        else:
            save(ctx, student, teacher)
        return value

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            gradients = FusedTotal.second_order(ctx, grad_total)
        else:
            gradients = take_scaled(ctx, grad_total)
        return *gradients, None, None, None, None

    @staticmethod
    def second_order(ctx: Any, grad_total: Tensor) -> list[Tensor | None]:
        if ctx.donated:
            raise RuntimeError(
                "distillation_loss: second derivatives need the student's logits, which were donated; use donate=False"
            )
        student, teacher = saved(ctx)
        scales, spec = ctx.options
        like = student.new_empty(0, dtype=compute_dtype(student, teacher))
        upstream = [scale * grad_total for scale in scales.per_row(student.shape[0], like)]
        return second_order(student, teacher, spec, ctx.needs_input_grad[:2], *upstream)


def total(problem: Problem, scales: Scales, backend: str) -> Tensor:
    """The sum over the rows of scale times value, differentiable in the logits."""
    assert problem.teacher is not None
    student, teacher = problem.student.tensor, problem.teacher.tensor
    grad = torch.is_grad_enabled()
    to_student, to_teacher = grad and student.requires_grad, grad and teacher.requires_grad
    value: Tensor
    if traced(student, teacher):
        factors = as_numbers((scales.divergence_factor, scales.cross_entropy_factor))
        value = divergence_total_op(
            student,
            teacher,
            factors,
            scales.divergence,
            scales.cross_entropy,
            to_student,
            to_teacher,
            backend,
            *pack_spec(problem.spec),
        )[0]
    elif to_student or to_teacher:
        value = FusedTotal.apply(student, teacher, scales, problem.student.donate, backend, problem.spec)  # type: ignore[no-untyped-call]
    else:
        value = row_backend(backend).divergence_total(student, teacher, problem.spec, scales, None, None)
    return value


def has_total(backend: str, scales: Scales) -> bool:
    """Whether ``total`` applies: the backend has it, and no gradient to the scales is wanted."""
    return backend in HAVE_TOTAL and not any(
        tensor is not None and tensor.requires_grad for tensor in (scales.divergence, scales.cross_entropy)
    )
