"""Operators of the family ``linear_divergence``: at least one side is a language-model head.

``kdkernels::linear_divergence`` gives the value of every row and ``kdkernels::linear_divergence_backward`` its gradients,
recomputing the logits; ``kdkernels::linear_divergence_total`` the weighted sum over the rows together with its gradients,
which need the logits only once. The arithmetic is in ``kdkernels.backends.chunked_head``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Problem
from kdkernels.backends import chunked_head
from kdkernels.backends.rows import RowSpec, Scales, compute_dtype
from kdkernels.ops.eager import save, saved, take_scaled, traced
from kdkernels.ops.schema import SPEC, TAGS, has_labels, pack_spec, spec_gradients, unpack_spec
from kdkernels.ops.second_order import differentiable_gradients
from kdkernels.ops.sides import (
    SIDES,
    SIDES_LENGTH,
    TENSORS,
    Arguments,
    gradients_like,
    or_empty,
    pack_sides,
    scattered,
    side_needs,
    unpack_sides,
    wanted_gradients,
)
from kdkernels.reductions import weighted_sum
from kdkernels.reference import rows as reference

__all__ = ["rows", "total"]

OPTIONS = f"int? memory_budget, str backend, {SPEC}"


def values_like(sides: Arguments, packed: Arguments) -> tuple[Tensor, Tensor]:
    """Empty tensors for the values of the rows."""
    student, teacher = sides[0], sides[4]
    divergence = student.new_empty(student.shape[0], dtype=compute_dtype(student, teacher))
    return divergence, divergence.new_empty(student.shape[0] if has_labels(packed) else 0)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    sides, (memory_budget, backend, *packed) = arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH:]
    return chunked_head.divergence(*unpack_sides(sides), unpack_spec(packed), memory_budget, backend)


linear_divergence_op = torch.library.custom_op(
    "kdkernels::linear_divergence",
    forward,
    mutates_args=(),
    schema=f"({SIDES}, {OPTIONS}) -> (Tensor, Tensor)",
    tags=TAGS,
)


@linear_divergence_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return values_like(arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH + 2 :])


def backward(*arguments: Any) -> list[Tensor]:
    sides, rest = arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH:]
    grad_divergence, grad_cross_entropy, wanted, memory_budget, backend, *packed = rest
    _, _, *gradients = chunked_head.divergence_with_gradients(
        *unpack_sides(sides),
        unpack_spec(packed),
        grad_divergence.contiguous(),
        None if grad_cross_entropy is None else grad_cross_entropy.contiguous(),
        side_needs(wanted),
        memory_budget,
        backend,
    )
    return or_empty((*gradients[0], *gradients[1]), sides[0])


linear_divergence_backward_op = torch.library.custom_op(
    "kdkernels::linear_divergence_backward",
    backward,
    mutates_args=(),
    schema=f"({SIDES}, Tensor grad_divergence, Tensor? grad_cross_entropy, bool[] wanted, {OPTIONS}) -> Tensor[]",
    tags=TAGS,
)


@linear_divergence_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return gradients_like(arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH + 2])


def reference_values(
    tensors: Sequence[Tensor | None], side_scales: tuple[float, float], spec: RowSpec
) -> tuple[Tensor, Tensor]:
    """``(divergence [N], cross_entropy [N] or [0])`` by the reference. Makes the logits whole."""
    student, teacher = unpack_sides((*tensors[:3], side_scales[0], *tensors[3:], side_scales[1]))
    student_logits, teacher_logits = (reference.side_logits(side, spec.active) for side in (student, teacher))
    divergence = reference.divergence(student_logits, teacher_logits, spec)
    if spec.labels is None:
        return divergence, divergence.new_empty(0)
    return divergence, reference.cross_entropy(student_logits, spec, divergence.dtype)


def setup_rows(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    sides, (memory_budget, backend, kind, *fields) = inputs[:SIDES_LENGTH], inputs[SIDES_LENGTH:]
    ctx.set_materialize_grads(False)
    save(ctx, *(sides[place] for place in TENSORS), *fields)
    ctx.scales = sides[3], sides[7]
    ctx.options = memory_budget, backend, kind


def backward_rows(ctx: Any, grad_divergence: Tensor | None, grad_cross_entropy: Tensor | None) -> Arguments:
    kept = saved(ctx)
    tensors, fields = kept[: len(TENSORS)], kept[len(TENSORS) :]
    sides = (*tensors[:3], ctx.scales[0], *tensors[3:], ctx.scales[1])
    memory_budget, backend, kind = ctx.options
    packed = kind, *fields
    wanted = [ctx.needs_input_grad[place] for place in TENSORS]
    if grad_divergence is None:
        grad_divergence = torch.zeros_like(values_like(sides, packed)[0])
    gradients: list[Tensor | None]
    if torch.is_grad_enabled():
        spec = unpack_spec(packed)

        def values(*tensors: Tensor | None) -> list[Tensor]:
            found = reference_values(tensors, ctx.scales, spec)
            return [value for value, factor in zip(found, upstream, strict=True) if factor is not None]

        upstream = grad_divergence, grad_cross_entropy if has_labels(packed) else None
        given = [factor for factor in upstream if factor is not None]
        gradients = differentiable_gradients(values, tensors, wanted, given)
    else:
        found = linear_divergence_backward_op(
            *sides, grad_divergence, grad_cross_entropy, wanted, memory_budget, backend, *packed
        )
        gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    return *scattered(gradients), None, None, *spec_gradients(ctx)


linear_divergence_op.register_autograd(backward_rows, setup_context=setup_rows)


class Rows(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(setup_rows)
    backward = staticmethod(backward_rows)


def rows(problem: Problem, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor]:
    """``(divergence [N], cross_entropy [N] or [0])``, differentiable."""
    assert problem.teacher is not None
    sides = pack_sides(problem.student, problem.teacher)
    arguments = (*sides, memory_budget, backend, *pack_spec(problem.spec))
    values: tuple[Tensor, Tensor]
    if traced(*(sides[place] for place in TENSORS)):
        values = linear_divergence_op(*arguments)
    elif torch.is_grad_enabled() and any(wanted_gradients(sides)):
        values = Rows.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        values = forward(*arguments)
    return values


def forward_total(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    sides, rest = arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH:]
    divergence_scale, cross_entropy_scale, wanted, memory_budget, backend, *packed = rest
    divergence_scale = divergence_scale.contiguous()
    cross_entropy_scale = None if cross_entropy_scale is None else cross_entropy_scale.contiguous()
    divergence, cross_entropy, *gradients = chunked_head.divergence_with_gradients(
        *unpack_sides(sides),
        unpack_spec(packed),
        divergence_scale,
        cross_entropy_scale,
        side_needs(wanted),
        memory_budget,
        backend,
    )
    value = weighted_sum((divergence_scale, cross_entropy_scale), divergence, cross_entropy)
    return value, divergence, cross_entropy, or_empty((*gradients[0], *gradients[1]), sides[0])


linear_divergence_total_op = torch.library.custom_op(
    "kdkernels::linear_divergence_total",
    forward_total,
    mutates_args=(),
    schema=f"({SIDES}, Tensor divergence_scale, Tensor? cross_entropy_scale, bool[] wanted, {OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
    tags=TAGS,
)


@linear_divergence_total_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    sides = arguments[:SIDES_LENGTH]
    values = values_like(sides, arguments[SIDES_LENGTH + 5 :])
    return values[0].new_empty(()), *values, gradients_like(sides, arguments[SIDES_LENGTH + 2])


def setup_total(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> None:
    ctx.set_materialize_grads(False)
    ctx.has_labels = inputs[SIDES_LENGTH + 1] is not None
    ctx.save_for_backward(output[1], output[2], *output[3])


def backward_total(ctx: Any, grad_total: Tensor | None, *_: Any) -> Arguments:
    if grad_total is None:
        return *(None,) * (SIDES_LENGTH + 5), *spec_gradients(ctx)
    divergence, cross_entropy, *gradients = ctx.saved_tensors
    scaled = [
        gradient * grad_total if ctx.needs_input_grad[place] else None
        for gradient, place in zip(gradients, TENSORS, strict=True)
    ]
    needs = ctx.needs_input_grad[SIDES_LENGTH:]
    return (
        *scattered(scaled),
        divergence * grad_total if needs[0] else None,
        cross_entropy * grad_total if ctx.has_labels and needs[1] else None,
        None,
        None,
        None,
        *spec_gradients(ctx),
    )


linear_divergence_total_op.register_autograd(backward_total, setup_context=setup_total)


class FusedTotal(torch.autograd.Function):
    """``linear_divergence_total`` in eager mode, where the gradients are handed on without a copy."""

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[int | None, str, RowSpec, tuple[float, float]],
        divergence_scale: Tensor,
        cross_entropy_scale: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        memory_budget, backend, spec, side_scales = options
        sides = (*tensors[:3], side_scales[0], *tensors[3:], side_scales[1])
        wanted = list(ctx.needs_input_grad[3:])
        divergence, cross_entropy, *gradients = chunked_head.divergence_with_gradients(
            *unpack_sides(sides),
            spec,
            divergence_scale,
            cross_entropy_scale,
            side_needs(wanted),
            memory_budget,
            backend,
        )
        ctx.gradients = [gradient for side in gradients for gradient in side]
        ctx.values = divergence, cross_entropy
        ctx.options = options
        save(ctx, divergence_scale, cross_entropy_scale, *tensors)
        return weighted_sum((divergence_scale, cross_entropy_scale), divergence, cross_entropy)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Arguments:
        kept, needs = saved(ctx), ctx.needs_input_grad
        if torch.is_grad_enabled():
            _, _, spec, side_scales = ctx.options

            def value(*inputs: Any) -> list[Tensor]:
                return [weighted_sum(inputs[:2], *reference_values(inputs[2:], side_scales, spec))]

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
    assert problem.teacher is not None
    sides, spec = pack_sides(problem.student, problem.teacher), problem.spec
    tensors = [sides[place] for place in TENSORS]
    grad = torch.is_grad_enabled()
    wanted = wanted_gradients(sides) if grad else [False] * len(TENSORS)
    divergence_scale, all_scales = scales.per_row(
        problem.student.tensor.shape[0], problem.student.tensor.new_empty(0, dtype=problem.dtype)
    )
    cross_entropy_scale = None if spec.labels is None else all_scales
    value: Tensor
    if traced(*tensors):
        value = linear_divergence_total_op(
            *sides, divergence_scale, cross_entropy_scale, wanted, memory_budget, backend, *pack_spec(spec)
        )[0]
    elif grad and (any(wanted) or divergence_scale.requires_grad or all_scales.requires_grad):
        options = memory_budget, backend, spec, (sides[3], sides[7])
        value = FusedTotal.apply(options, divergence_scale, cross_entropy_scale, *tensors)  # type: ignore[no-untyped-call]
    else:
        values = chunked_head.divergence(*unpack_sides(sides), spec, memory_budget, backend)
        value = weighted_sum((divergence_scale, cross_entropy_scale), *values)
    return value
