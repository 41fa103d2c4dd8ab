"""Operators of the family ``sparse_divergence``: the student is logits or a language-model head, the teacher sparse.

``kdkernels::sparse_divergence`` gives the value of every row and ``kdkernels::sparse_divergence_backward`` its gradients;
``kdkernels::sparse_divergence_total`` the weighted sum over the rows together with its gradients, made while the logits
are there. The arithmetic is in ``kdkernels.backends.chunked_sparse``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Problem
from kdkernels.backends import chunked_sparse
from kdkernels.backends.chunked_head import Needs, SideGradients
from kdkernels.backends.rows import RowSpec, Scales, Side, compute_dtype
from kdkernels.backends.sparse_rows import Records, SparseRows
from kdkernels.ops.eager import save, saved, take_scaled, traced
from kdkernels.ops.schema import SPEC, SPEC_LENGTH, TAGS, has_labels, pack_spec, spec_gradients, unpack_spec
from kdkernels.ops.second_order import differentiable_gradients
from kdkernels.reductions import weighted_sum
from kdkernels.reference import rows as reference
from kdkernels.reference import sparse_divergence as sparse_reference

__all__ = ["rows", "total"]

SIDE = "Tensor student, Tensor? weight, Tensor? bias, float scale"
TEACHER = "int policy, Tensor? ids, Tensor? values, Tensor? constants, Tensor? records, Tensor? counts, int bits"
OPTIONS = f"int? memory_budget, str backend, {SPEC}"
STUDENTS = 3
"""The tensors of the student, which lead the arguments of ``SIDE``."""
SIDE_LENGTH = STUDENTS + 1
TEACHER_LENGTH = 7

Arguments = tuple[Any, ...]


def pack_teacher(teacher: SparseRows) -> Arguments:
    packed = (None, None, 0) if teacher.records is None else teacher.records[:3]
    return (*teacher[:4], *packed)


def unpack_teacher(packed: Arguments) -> SparseRows:
    policy, ids, values, constants, data, counts, bits = packed
    return SparseRows(policy, ids, values, constants, None if data is None else Records(data, counts, bits))


def student_tensors(student: Side) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return student.tensor, student.weight, student.bias


def must_be_traced(student: Side, teacher: SparseRows) -> bool:
    packed = (None, None) if teacher.records is None else teacher.records[:2]
    return traced(*student_tensors(student), teacher.ids, teacher.values, teacher.constants, *packed)


def split(arguments: Arguments) -> tuple[Side, SparseRows, Arguments]:
    """(student, teacher, the other arguments)."""
    behind = SIDE_LENGTH + TEACHER_LENGTH
    return Side(*arguments[:SIDE_LENGTH]), unpack_teacher(arguments[SIDE_LENGTH:behind]), arguments[behind:]


def values_like(student: Tensor, packed: Arguments) -> tuple[Tensor, Tensor]:
    """Empty tensors for the values of the rows."""
    divergence = student.new_empty(student.shape[0], dtype=compute_dtype(student, None))
    return divergence, divergence.new_empty(student.shape[0] if has_labels(packed) else 0)


def gradients_like(arguments: Arguments, wanted: Sequence[bool]) -> list[Tensor]:
    """An operator returns an empty tensor for a gradient that is not wanted."""
    return [
        tensor.new_empty(tensor.shape) if want else arguments[0].new_empty(0)
        for tensor, want in zip(arguments[:STUDENTS], wanted, strict=True)
    ]


def or_empty(gradients: SideGradients, like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if gradient is None else gradient for gradient in gradients]


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    student, teacher, (memory_budget, backend, *packed) = split(arguments)
    found = chunked_sparse.divergence(student, teacher, unpack_spec(packed), None, Needs(False), memory_budget, backend)
    return found[:2]


sparse_divergence_op = torch.library.custom_op(
    "kdkernels::sparse_divergence",
    forward,
    mutates_args=(),
    schema=f"({SIDE}, {TEACHER}, {OPTIONS}) -> (Tensor, Tensor)",
    tags=TAGS,
)


@sparse_divergence_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return values_like(arguments[0], arguments[-SPEC_LENGTH:])


def with_gradients(
    student: Side,
    teacher: SparseRows,
    spec: RowSpec,
    upstream: tuple[Tensor, Tensor | None],
    wanted: Sequence[bool],
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, SideGradients]:
    factors = upstream[0].contiguous(), None if upstream[1] is None else upstream[1].contiguous()
    return chunked_sparse.divergence(student, teacher, spec, factors, Needs(*wanted), memory_budget, backend)


def backward(*arguments: Any) -> list[Tensor]:
    student, teacher, rest = split(arguments)
    grad_divergence, grad_cross_entropy, wanted, memory_budget, backend, *packed = rest
    upstream = grad_divergence, grad_cross_entropy
    found = with_gradients(student, teacher, unpack_spec(packed), upstream, wanted, memory_budget, backend)
    return or_empty(found[2], student.tensor)


sparse_divergence_backward_op = torch.library.custom_op(
    "kdkernels::sparse_divergence_backward",
    backward,
    mutates_args=(),
    schema=f"({SIDE}, {TEACHER}, Tensor grad_divergence, Tensor? grad_cross_entropy, bool[] wanted, {OPTIONS}) "
    "-> Tensor[]",
    tags=TAGS,
)


@sparse_divergence_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return gradients_like(arguments, arguments[SIDE_LENGTH + TEACHER_LENGTH + 2])


def reference_values(
    tensors: Sequence[Tensor | None], scale: float, teacher: SparseRows, spec: RowSpec
) -> tuple[Tensor, Tensor]:
    """``(divergence [N], cross_entropy [N] or [0])`` by the reference. Makes the logits whole."""
    student, weight, bias = tensors
    assert student is not None
    logits = reference.side_logits(Side(student, weight, bias, scale), spec.active)
    divergence = sparse_reference.divergence(logits, teacher, spec)
    if spec.labels is None:
        return divergence, divergence.new_empty(0)
    return divergence, reference.cross_entropy(logits, spec, divergence.dtype)


def setup_rows(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    tensors = [each if isinstance(each, Tensor) else None for each in inputs]
    ctx.others = [None if isinstance(each, Tensor) else each for each in inputs]
    save(ctx, *tensors)


def backward_rows(ctx: Any, grad_divergence: Tensor | None, grad_cross_entropy: Tensor | None) -> Arguments:
    arguments = tuple(other if tensor is None else tensor for tensor, other in zip(saved(ctx), ctx.others, strict=True))
    student, teacher, (memory_budget, backend, *packed) = split(arguments)
    wanted = list(ctx.needs_input_grad[:STUDENTS])
    if grad_divergence is None:
        grad_divergence = torch.zeros_like(values_like(student.tensor, tuple(packed))[0])
    gradients: list[Tensor | None]
    if torch.is_grad_enabled():
        spec = unpack_spec(packed)

        def values(*tensors: Tensor | None) -> list[Tensor]:
            found = reference_values(tensors, student.scale, teacher, spec)
            return [value for value, factor in zip(found, upstream, strict=True) if factor is not None]

        upstream = grad_divergence, grad_cross_entropy if has_labels(packed) else None
        given = [factor for factor in upstream if factor is not None]
        gradients = differentiable_gradients(values, student_tensors(student), wanted, given)
    else:
        found = sparse_divergence_backward_op(
            *arguments[: SIDE_LENGTH + TEACHER_LENGTH],
            grad_divergence,
            grad_cross_entropy,
            wanted,
            memory_budget,
            backend,
            *packed,
        )
        gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    return *gradients, *(None,) * (3 + TEACHER_LENGTH), *spec_gradients(ctx)


sparse_divergence_op.register_autograd(backward_rows, setup_context=setup_rows)


class Rows(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(setup_rows)
    backward = staticmethod(backward_rows)


def rows(problem: Problem, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor]:
    """``(divergence [N], cross_entropy [N] or [0])``, differentiable."""
    assert problem.sparse is not None
    arguments = (
        *problem.student[:SIDE_LENGTH],
        *pack_teacher(problem.sparse),
        memory_budget,
        backend,
        *pack_spec(problem.spec),
    )
    values: tuple[Tensor, Tensor]
    if must_be_traced(problem.student, problem.sparse):
        values = sparse_divergence_op(*arguments)
    elif torch.is_grad_enabled() and problem.student.requires_grad:
        values = Rows.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        values = forward(*arguments)
    return values


def forward_total(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    student, teacher, rest = split(arguments)
    divergence_scale, cross_entropy_scale, wanted, memory_budget, backend, *packed = rest
    scales = divergence_scale.contiguous(), None if cross_entropy_scale is None else cross_entropy_scale.contiguous()
    divergence, cross_entropy, gradients = with_gradients(
        student, teacher, unpack_spec(packed), scales, wanted, memory_budget, backend
    )
    value = weighted_sum(scales, divergence, cross_entropy)
    return value, divergence, cross_entropy, or_empty(gradients, student.tensor)


sparse_divergence_total_op = torch.library.custom_op(
    "kdkernels::sparse_divergence_total",
    forward_total,
    mutates_args=(),
    schema=f"({SIDE}, {TEACHER}, Tensor divergence_scale, Tensor? cross_entropy_scale, bool[] wanted, {OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
    tags=TAGS,
)


@sparse_divergence_total_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    values = values_like(arguments[0], arguments[-SPEC_LENGTH:])
    return values[0].new_empty(()), *values, gradients_like(arguments, arguments[SIDE_LENGTH + TEACHER_LENGTH + 2])


def setup_total(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> None:
    ctx.set_materialize_grads(False)
    ctx.has_labels = inputs[SIDE_LENGTH + TEACHER_LENGTH + 1] is not None
    ctx.save_for_backward(output[1], output[2], *output[3])


def backward_total(ctx: Any, grad_total: Tensor | None, *_: Any) -> Arguments:
    behind = SIDE_LENGTH + TEACHER_LENGTH
    if grad_total is None:
        return *(None,) * (behind + 5), *spec_gradients(ctx)
    divergence, cross_entropy, *gradients = ctx.saved_tensors
    needs = ctx.needs_input_grad
    scaled = [
        gradient * grad_total if want else None for gradient, want in zip(gradients, needs[:STUDENTS], strict=True)
    ]
    return (
        *scaled,
        *(None,) * (1 + TEACHER_LENGTH),
        divergence * grad_total if needs[behind] else None,
        cross_entropy * grad_total if ctx.has_labels and needs[behind + 1] else None,
        None,
        None,
        None,
        *spec_gradients(ctx),
    )


sparse_divergence_total_op.register_autograd(backward_total, setup_context=setup_total)


class FusedTotal(torch.autograd.Function):
    """``sparse_divergence_total`` in eager mode: gradients are handed on without a copy and may be donated memory."""

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[SparseRows, int | None, str, RowSpec, float, bool],
        divergence_scale: Tensor,
        cross_entropy_scale: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        teacher, memory_budget, backend, spec, scale, donate = options
        student, weight, bias = tensors
        assert student is not None
        wanted = ctx.needs_input_grad[3:]
        ctx.donated = (
            donate and weight is None and wanted[0] and (len(student) == 1 or student.stride(0) >= student.shape[1])
        )
        side = Side(student.detach(), weight, bias, scale, donate=ctx.donated)
        scales = divergence_scale, cross_entropy_scale
        divergence, cross_entropy, gradients = with_gradients(
            side, teacher, spec, scales, wanted, memory_budget, backend
        )
        ctx.gradients = list(gradients)
        ctx.values = divergence, cross_entropy
        ctx.options = options
        if ctx.donated:
            torch.autograd.graph.increment_version(student)
        save(ctx, *scales, *((None,) * STUDENTS if ctx.donated else tensors))
        return weighted_sum(scales, divergence, cross_entropy)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Arguments:
        kept, needs = saved(ctx), ctx.needs_input_grad
        if torch.is_grad_enabled():
            if ctx.donated:
                raise RuntimeError(
                    "distillation_loss: second derivatives need the student's logits, which were donated; "
                    "use donate=False"
                )
            teacher, _, _, spec, scale, _ = ctx.options

            def value(*inputs: Any) -> list[Tensor]:
                return [weighted_sum(inputs[:2], *reference_values(inputs[2:], scale, teacher, spec))]

            return None, *differentiable_gradients(value, kept, needs[1:], [grad_total])
        divergence, cross_entropy = ctx.values
        return (
            None,
            divergence * grad_total if needs[1] else None,
            cross_entropy * grad_total if needs[2] else None,
            *take_scaled(ctx, grad_total),
        )


def total(problem: Problem, scales: Scales, memory_budget: int | None, backend: str) -> Tensor:
    """The sum over the rows of scale times value, differentiable."""
    assert problem.sparse is not None
    student, teacher, spec = problem.student, problem.sparse, problem.spec
    tensors = student_tensors(student)
    grad = torch.is_grad_enabled()
    wanted = [grad and tensor is not None and tensor.requires_grad for tensor in tensors]
    divergence_scale, all_scales = scales.per_row(
        student.tensor.shape[0], student.tensor.new_empty(0, dtype=problem.dtype)
    )
    cross_entropy_scale = None if spec.labels is None else all_scales
    value: Tensor
    if must_be_traced(student, teacher):
        value = sparse_divergence_total_op(
            *student[:SIDE_LENGTH],
            *pack_teacher(teacher),
            divergence_scale,
            cross_entropy_scale,
            wanted,
            memory_budget,
            backend,
            *pack_spec(spec),
        )[0]
    elif grad and (any(wanted) or divergence_scale.requires_grad or all_scales.requires_grad):
        options = teacher, memory_budget, backend, spec, student.scale, student.donate
        value = FusedTotal.apply(options, divergence_scale, cross_entropy_scale, *tensors)  # type: ignore[no-untyped-call]
    else:
        values = chunked_sparse.divergence(student, teacher, spec, None, Needs(False), memory_budget, backend)
        value = weighted_sum((divergence_scale, cross_entropy_scale), values[0], values[1])
    return value
