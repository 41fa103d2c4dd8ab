"""Operators of the family ``relation``.

``kdkernels::relation`` gives the value of every row and ``kdkernels::relation_backward`` the gradients, which makes the
scores anew; ``kdkernels::relation_total`` the scaled sum over the rows together with its gradients, which need the scores
only once. The arithmetic is in ``kdkernels.backends.chunked_relation``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import chunked_relation
from kdkernels.backends.relations import Masks, Relations
from kdkernels.backends.rows import Scales, compute_dtype
from kdkernels.ops.eager import save, saved, take_scaled, traced
from kdkernels.ops.schema import (
    SPEC,
    TAGS,
    as_numbers,
    has_labels,
    pack_spec,
    spec_gradients,
    unpack_spec,
)
from kdkernels.ops.second_order import differentiable_gradients
from kdkernels.ops.sides import or_empty
from kdkernels.reductions import weighted_sum
from kdkernels.reference.relation import row_values

__all__ = ["rows", "total"]

Arguments = tuple[Any, ...]

TENSORS = "Tensor student_left, Tensor student_right, Tensor? teacher_left, Tensor? teacher_right"
COUNT = 4
OPTIONS = f"Tensor? column_mask, Tensor? pair_mask, Tensor scales, bool causal, int? memory_budget, str backend, {SPEC}"
BEFORE_SPEC = 6


def pack(relations: Relations, memory_budget: int | None, backend: str) -> Arguments:
    """The arguments of ``OPTIONS``."""
    masks = relations.masks
    scales = as_numbers((relations.student_scale, relations.teacher_scale))
    return masks.columns, masks.pairs, scales, masks.causal, memory_budget, backend, *pack_spec(relations.spec)


def unpack(tensors: Sequence[Tensor | None], options: Sequence[Any]) -> tuple[Relations, int | None, str]:
    columns, pairs, scales, causal, memory_budget, backend, *packed = options
    student_scale, teacher_scale = scales.tolist()
    student_left, student_right, *teacher = tensors
    masks = Masks(columns, pairs, causal)
    assert student_left is not None
    assert student_right is not None
    relations = Relations(
        student_left, student_right, teacher[0], teacher[1], student_scale, teacher_scale, masks, unpack_spec(packed)
    )
    return relations, memory_budget, backend


def values_like(tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Tensor, Tensor]:
    left = tensors[0]
    count = left.shape[0] * left.shape[1]
    divergence = left.new_empty(count, dtype=compute_dtype(left, tensors[2]))
    return divergence, divergence.new_empty(count if has_labels(options[BEFORE_SPEC:]) else 0)


def gradients_like(tensors: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor]:
    dtype = compute_dtype(tensors[0], tensors[2])
    return [
        tensor.new_empty(tensor.shape, dtype=dtype) if want else tensors[0].new_empty(0)
        for tensor, want in zip(tensors, wanted, strict=True)
    ]


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    relations, memory_budget, backend = unpack(arguments[:COUNT], arguments[COUNT:])
    found = chunked_relation.divergence_with_gradients(relations, None, [False] * COUNT, memory_budget, backend)
    return found[0], found[1]


relation_op = torch.library.custom_op(
    "kdkernels::relation",
    forward,
    mutates_args=(),
    schema=f"({TENSORS}, {OPTIONS}) -> (Tensor, Tensor)",
    tags=TAGS,
)


@relation_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return values_like(arguments[:COUNT], arguments[COUNT:])


def backward(*arguments: Any) -> list[Tensor]:
    tensors, (grad_divergence, grad_cross_entropy, wanted, *options) = arguments[:COUNT], arguments[COUNT:]
    relations, memory_budget, backend = unpack(tensors, options)
    scales = grad_divergence.contiguous(), None if grad_cross_entropy is None else grad_cross_entropy.contiguous()
    found = chunked_relation.divergence_with_gradients(relations, scales, wanted, memory_budget, backend)
    return or_empty(found[2], tensors[0])


relation_backward_op = torch.library.custom_op(
    "kdkernels::relation_backward",
    backward,
    mutates_args=(),
    schema=f"({TENSORS}, Tensor grad_divergence, Tensor? grad_cross_entropy, bool[] wanted, {OPTIONS}) -> Tensor[]",
    tags=TAGS,
)


@relation_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return gradients_like(arguments[:COUNT], arguments[COUNT + 2])


def in_dtypes(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the dtypes of what they belong to."""
    return [
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]


def keep(ctx: Any, tensors: Sequence[Any], options: Sequence[Any], *others: Tensor | None) -> None:
    columns, pairs, scales, *numbers, kind = options[: BEFORE_SPEC + 1]
    save(ctx, *others, *tensors, columns, pairs, scales, *options[BEFORE_SPEC + 1 :])
    ctx.options = *numbers, kind
    ctx.set_materialize_grads(False)


def kept(ctx: Any, others: int) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """What ``keep`` was given: the others, tensors, options."""
    everything = saved(ctx)
    found, rest = everything[:others], everything[others:]
    return found, rest[:COUNT], (*rest[COUNT : COUNT + 3], *ctx.options, *rest[COUNT + 3 :])


def setup_rows(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    keep(ctx, inputs[:COUNT], inputs[COUNT:])


def backward_rows(ctx: Any, grad_divergence: Tensor | None, grad_cross_entropy: Tensor | None) -> Arguments:
    _, tensors, options = kept(ctx, 0)
    wanted = list(ctx.needs_input_grad[:COUNT])
    if grad_divergence is None:
        grad_divergence = torch.zeros_like(values_like(tensors, options)[0])
    if not has_labels(options[BEFORE_SPEC:]):
        grad_cross_entropy = None
    gradients: list[Tensor | None]
    if torch.is_grad_enabled():

        def values(*tensors: Tensor | None) -> list[Tensor]:
            return row_values(unpack(tensors, options)[0])[: len(upstream)]

        upstream = [factor for factor in (grad_divergence, grad_cross_entropy) if factor is not None]
        gradients = differentiable_gradients(values, tensors, wanted, upstream)
    else:
        found = relation_backward_op(*tensors, grad_divergence, grad_cross_entropy, wanted, *options)
        gradients = in_dtypes([part if want else None for part, want in zip(found, wanted, strict=True)], tensors)
    return *gradients, *(None,) * BEFORE_SPEC, *spec_gradients(ctx)


relation_op.register_autograd(backward_rows, setup_context=setup_rows)


class Rows(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(setup_rows)
    backward = staticmethod(backward_rows)


def wanted_gradients(relations: Relations) -> list[bool]:
    if not torch.is_grad_enabled():
        return [False] * COUNT
    return [tensor is not None and tensor.requires_grad for tensor in relations.tensors]


def rows(relations: Relations, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor]:
    """``(divergence [P n], cross_entropy [P n] or [0])``, differentiable."""
    arguments = (*relations.tensors, *pack(relations, memory_budget, backend))
    values: tuple[Tensor, Tensor]
    if traced(*relations.tensors):
        values = relation_op(*arguments)
    elif any(wanted_gradients(relations)):
        values = Rows.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        values = forward(*arguments)
    return values


def forward_total(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors, (divergence_scale, cross_entropy_scale, wanted, *options) = arguments[:COUNT], arguments[COUNT:]
    relations, memory_budget, backend = unpack(tensors, options)
    scales = divergence_scale.contiguous(), None if cross_entropy_scale is None else cross_entropy_scale.contiguous()
    divergence, cross_entropy, gradients = chunked_relation.divergence_with_gradients(
        relations, scales, wanted, memory_budget, backend
    )
    value = weighted_sum(scales, divergence, cross_entropy)
    return value, divergence, cross_entropy, or_empty(gradients, tensors[0])


relation_total_op = torch.library.custom_op(
    "kdkernels::relation_total",
    forward_total,
    mutates_args=(),
    schema=f"({TENSORS}, Tensor divergence_scale, Tensor? cross_entropy_scale, bool[] wanted, {OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
    tags=TAGS,
)


@relation_total_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors, rest = arguments[:COUNT], arguments[COUNT:]
    values = values_like(tensors, rest[3:])
    return values[0].new_empty(()), *values, gradients_like(tensors, rest[2])


def setup_total(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> None:
    tensors, (divergence_scale, cross_entropy_scale, _, *options) = inputs[:COUNT], inputs[COUNT:]
    ctx.mark_non_differentiable(output[1], output[2], *output[3])
    keep(ctx, tensors, options, divergence_scale, cross_entropy_scale, output[1], output[2], *output[3])


def second_order_total(
    inputs: Sequence[Any], options: Sequence[Any], needs: Sequence[bool], grad_total: Tensor
) -> list[Tensor | None]:
    """The gradients to the four tensors and to the two scales, differentiable once more."""

    def value(*inputs: Any) -> list[Tensor]:
        values = row_values(unpack(inputs[:COUNT], options)[0])
        return [weighted_sum(inputs[COUNT:], values[0], values[-1])]

    return differentiable_gradients(value, inputs, needs, [grad_total])


def backward_total(ctx: Any, grad_total: Tensor | None, *_: Any) -> Arguments:
    nothing = (None,) * (BEFORE_SPEC + 1)
    if grad_total is None:
        return *(None,) * (COUNT + 2), *nothing, *spec_gradients(ctx)
    others, tensors, options = kept(ctx, COUNT + 4)
    divergence_scale, cross_entropy_scale, divergence, cross_entropy, *made = others
    needs = ctx.needs_input_grad[: COUNT + 2]
    gradients: list[Tensor | None]
    if torch.is_grad_enabled():
        inputs = (*tensors, divergence_scale, cross_entropy_scale)
        gradients = second_order_total(inputs, options, needs, grad_total)
    else:
        found = [part * grad_total if want else None for part, want in zip(made, needs[:COUNT], strict=True)]
        gradients = [
            *in_dtypes(found, tensors),
            divergence * grad_total if needs[COUNT] else None,
            cross_entropy * grad_total if needs[COUNT + 1] else None,
        ]
    return *gradients, *nothing, *spec_gradients(ctx)


relation_total_op.register_autograd(backward_total, setup_context=setup_total)


class FusedTotal(torch.autograd.Function):
    """``relation_total`` in eager mode, where the gradients are handed on without a copy."""

    @staticmethod
    def forward(ctx: Any, options: Arguments, *inputs: Tensor | None) -> Tensor:
        wanted = list(ctx.needs_input_grad[1 : COUNT + 1])
        tensors, (divergence_scale, cross_entropy_scale) = inputs[:COUNT], inputs[COUNT:]
        relations, memory_budget, backend = unpack(tensors, options)
        assert divergence_scale is not None
        scales = divergence_scale, cross_entropy_scale
        divergence, cross_entropy, ctx.gradients = chunked_relation.divergence_with_gradients(
            relations, scales, wanted, memory_budget, backend
        )
        ctx.values = divergence, cross_entropy
        ctx.options = options
        save(ctx, *inputs)
        return weighted_sum(scales, divergence, cross_entropy)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Arguments:
        inputs, needs = saved(ctx), ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *second_order_total(inputs, ctx.options, needs, grad_total)
        scales = [value * grad_total if want else None for value, want in zip(ctx.values, needs[COUNT:], strict=True)]
        return None, *in_dtypes(take_scaled(ctx, grad_total), inputs[:COUNT]), *scales


def total(relations: Relations, scales: Scales, memory_budget: int | None, backend: str) -> Tensor:
    """The sum over the rows of scale times value, differentiable."""
    left = relations.student_left
    divergence_scale, all_scales = scales.per_row(
        left.shape[0] * left.shape[1], left.new_empty(0, dtype=relations.dtype)
    )
    cross_entropy_scale = None if relations.spec.labels is None else all_scales
    wanted = wanted_gradients(relations)
    options = pack(relations, memory_budget, backend)
    scales_want = torch.is_grad_enabled() and (
        divergence_scale.requires_grad or (cross_entropy_scale is not None and cross_entropy_scale.requires_grad)
    )
    value: Tensor
    if traced(*relations.tensors):
        value = relation_total_op(*relations.tensors, divergence_scale, cross_entropy_scale, wanted, *options)[0]
    elif any(wanted) or scales_want:
        value = FusedTotal.apply(options, *relations.tensors, divergence_scale, cross_entropy_scale)  # type: ignore[no-untyped-call]
    else:
        divergence, cross_entropy = forward(*relations.tensors, *options)
        value = weighted_sum((divergence_scale, cross_entropy_scale), divergence, cross_entropy)
    return value
