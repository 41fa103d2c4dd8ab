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
from kdkernels.backends import row_backend
from kdkernels.backends.rows import RowSpec, compute_dtype
from kdkernels.ops.eager import take_scaled, traced
from kdkernels.ops.schema import SPEC, spec_gradients
from kdkernels.reductions import Scales
from kdkernels.reference import rows as reference

__all__ = ["rows", "total"]

OptionalGradients = tuple[Tensor | None, Tensor | None]


def gradient_like(logits: Tensor, wanted: bool) -> Tensor:
    return logits.new_empty(logits.shape if wanted else 0)


def or_none(gradient: Tensor) -> Tensor | None:
    """An operator returns an empty tensor for a gradient that is not wanted."""
    return gradient if gradient.numel() else None


def forward(student: Tensor, teacher: Tensor, backend: str, *spec: Any) -> tuple[Tensor, Tensor, Tensor]:
    values: tuple[Tensor, Tensor, Tensor] = row_backend(backend).divergence_forward(student, teacher, RowSpec(*spec))
    return values


divergence_op = torch.library.custom_op(
    "kdkernels::divergence",
    forward,
    mutates_args=(),
    schema=f"(Tensor student, Tensor teacher, str backend, {SPEC}) -> (Tensor, Tensor, Tensor)",
)


@divergence_op.register_fake
def _(student: Tensor, teacher: Tensor, backend: str, *spec: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = student.shape[0]
    divergence = student.new_empty(count, dtype=compute_dtype(student, teacher))
    cross_entropy = divergence.new_empty(0 if RowSpec(*spec).labels is None else count)
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
    *spec: Any,
) -> tuple[Tensor, Tensor]:
    gradients = gradient_like(student, to_student), gradient_like(teacher, to_teacher)
    row_backend(backend).divergence_backward(
        student,
        teacher,
        statistics,
        RowSpec(*spec),
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


def differentiable_gradients(
    student: Tensor,
    teacher: Tensor,
    spec: RowSpec,
    grad_divergence: Tensor,
    grad_cross_entropy: Tensor | None,
    wanted: tuple[bool, bool],
) -> OptionalGradients:
    """The gradients with a graph of their own, for second derivatives: through the reference."""
    with torch.enable_grad():
        values, upstream = [reference.divergence(student, teacher, spec)], [grad_divergence]
        if spec.labels is not None and grad_cross_entropy is not None:
            values.append(reference.cross_entropy(student, spec, values[0].dtype))
            upstream.append(grad_cross_entropy)
        inputs = [tensor for tensor, want in zip((student, teacher), wanted, strict=True) if want]
        found = iter(torch.autograd.grad(values, inputs, upstream, create_graph=True, allow_unused=True))
    student_gradient, teacher_gradient = (next(found) if want else None for want in wanted)
    return student_gradient, teacher_gradient


def setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, backend, *spec = inputs
    spec = RowSpec(*spec)
    ctx.save_for_backward(
        student, teacher, output[2], spec.student_temperatures, spec.teacher_temperatures, spec.labels, spec.active
    )
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.backend = backend
    ctx.spec = spec._replace(student_temperatures=None, teacher_temperatures=None, labels=None, active=None)


def backward_rows(
    ctx: Any, grad_divergence: Tensor | None, grad_cross_entropy: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    student, teacher, statistics, student_temperatures, teacher_temperatures, labels, active = ctx.saved_tensors
    spec = ctx.spec._replace(
        student_temperatures=student_temperatures,
        teacher_temperatures=teacher_temperatures,
        labels=labels,
        active=active,
    )
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    if grad_divergence is None:
        grad_divergence = student.new_zeros(student.shape[0], dtype=compute_dtype(student, teacher))
    if torch.is_grad_enabled():
        gradients = differentiable_gradients(student, teacher, spec, grad_divergence, grad_cross_entropy, wanted)
    else:
        found = divergence_backward_op(
            student, teacher, statistics, grad_divergence, grad_cross_entropy, *wanted, ctx.backend, *spec
        )
        gradients = found[0] if wanted[0] else None, found[1] if wanted[1] else None
    return *gradients, None, *spec_gradients()


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
        values = divergence_op(student, teacher, backend, *problem.spec)
    elif torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        values = Rows.apply(student, teacher, backend, *problem.spec)
    else:
        values = forward(student, teacher, backend, *problem.spec)
    return values[0], values[1]


def fused(
    student: Tensor,
    teacher: Tensor,
    divergence_scale: Tensor,
    cross_entropy_scale: Tensor | None,
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
    backend: str,
    spec: RowSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of scale times value, divergence, cross_entropy), with the gradients written where they are wanted."""
    kernels = row_backend(backend)
    if grad_student is None and grad_teacher is None:
        divergence, cross_entropy, _ = kernels.divergence_forward(student, teacher, spec)
    else:
        divergence, cross_entropy = kernels.divergence_fused(
            student, teacher, spec, divergence_scale, cross_entropy_scale, grad_student, grad_teacher
        )
    value = torch.dot(divergence_scale, divergence)
    if cross_entropy_scale is not None:
        value = value + torch.dot(cross_entropy_scale, cross_entropy)
    return value, divergence, cross_entropy


def forward_total(
    student: Tensor,
    teacher: Tensor,
    divergence_scale: Tensor,
    cross_entropy_scale: Tensor | None,
    to_student: bool,
    to_teacher: bool,
    backend: str,
    *spec: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_student, grad_teacher = gradient_like(student, to_student), gradient_like(teacher, to_teacher)
    values = fused(
        student,
        teacher,
        divergence_scale.contiguous(),
        None if cross_entropy_scale is None else cross_entropy_scale.contiguous(),
        grad_student if to_student else None,
        grad_teacher if to_teacher else None,
        backend,
        RowSpec(*spec),
    )
    return *values, grad_student, grad_teacher


divergence_total_op = torch.library.custom_op(
    "kdkernels::divergence_total",
    forward_total,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor divergence_scale, Tensor? cross_entropy_scale, bool to_student, "
    f"bool to_teacher, str backend, {SPEC}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@divergence_total_op.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    divergence_scale: Tensor,
    cross_entropy_scale: Tensor | None,
    to_student: bool,
    to_teacher: bool,
    backend: str,
    *spec: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = student.shape[0]
    divergence = student.new_empty(count, dtype=compute_dtype(student, teacher))
    cross_entropy = divergence.new_empty(0 if RowSpec(*spec).labels is None else count)
    return (
        divergence.new_empty(()),
        divergence,
        cross_entropy,
        gradient_like(student, to_student),
        gradient_like(teacher, to_teacher),
    )


def setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    has_labels = inputs[3] is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2] if has_labels else None, output[3], output[4])


def backward_total(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    divergence, cross_entropy, grad_student, grad_teacher = ctx.saved_tensors
    if grad_total is None:
        return (None,) * (7 + len(spec_gradients()))
    needs = ctx.needs_input_grad
    return (
        grad_student * grad_total if needs[0] else None,
        grad_teacher * grad_total if needs[1] else None,
        divergence * grad_total if needs[2] else None,
        cross_entropy * grad_total if needs[3] else None,
        *(None,) * 3,
        *spec_gradients(),
    )


divergence_total_op.register_autograd(backward_total, setup_context=setup_total)


class FusedTotal(torch.autograd.Function):
    """``divergence_total`` in eager mode, where the gradient is handed on without a copy and may be donated memory."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        divergence_scale: Tensor,
        cross_entropy_scale: Tensor | None,
        donate: bool,
        backend: str,
        spec: RowSpec,
    ) -> Tensor:
        to_student, to_teacher = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_student = None
        if to_student:
            grad_student = student.detach() if donate else student.new_empty(student.shape)
        grad_teacher = teacher.new_empty(teacher.shape) if to_teacher else None
        value, divergence, cross_entropy = fused(
            student, teacher, divergence_scale, cross_entropy_scale, grad_student, grad_teacher, backend, spec
        )
        ctx.gradients = grad_student, grad_teacher
        ctx.values = divergence, cross_entropy
        ctx.options = spec
        ctx.donated = donate and to_student
        if ctx.donated:
            torch.autograd.graph.increment_version(student)
        else:
            ctx.save_for_backward(student, teacher, divergence_scale, cross_entropy_scale)
        return value

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return *second_order(ctx, grad_total), None, None, None
        student, teacher = take_scaled(ctx, grad_total)
        divergence, cross_entropy = ctx.values
        return (
            student,
            teacher,
            divergence * grad_total if needs[2] else None,
            cross_entropy * grad_total if needs[3] else None,
            None,
            None,
            None,
        )


def second_order(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the first four inputs, differentiable once more."""
    if ctx.donated:
        raise RuntimeError(
            "distillation_loss: second derivatives need the student's logits, which were donated; use donate=False"
        )
    student, teacher, divergence_scale, cross_entropy_scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    with torch.enable_grad():
        values = divergence_scale * reference.divergence(student, teacher, ctx.options)
        if cross_entropy_scale is not None:
            values = values + cross_entropy_scale * reference.cross_entropy(student, ctx.options, values.dtype)
        inputs = (student, teacher, divergence_scale, cross_entropy_scale)
        wanted = [tensor for tensor, need in zip(inputs, needs, strict=False) if need]
        found = iter(torch.autograd.grad(values.sum(), wanted, grad_total, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needs[:4])


def total(problem: Problem, scales: Scales, backend: str) -> Tensor:
    """The sum over the rows of scale times value, differentiable."""
    assert problem.teacher is not None
    student, teacher = problem.student.tensor, problem.teacher.tensor
    grad = torch.is_grad_enabled()
    if traced(student, teacher):
        to_student, to_teacher = grad and student.requires_grad, grad and teacher.requires_grad
        value: Tensor = divergence_total_op(
            student, teacher, *scales, to_student, to_teacher, backend, *problem.spec
        )[0]
        return value
    if grad and (student.requires_grad or teacher.requires_grad or scales.divergence.requires_grad):
        value = FusedTotal.apply(student, teacher, *scales, problem.student.donate, backend, problem.spec)
        return value
    return fused(student, teacher, *scales, None, None, backend, problem.spec)[0]
