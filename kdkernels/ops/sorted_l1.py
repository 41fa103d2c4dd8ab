"""Operators of the family ``sorted_l1``, for logits and language-model heads.

``kdkernels::sorted_l1`` gives the value of every row and, where the gradient of a row is the upstream one times something
known, that something: then the backward need not sort again. Else ``kdkernels::sorted_l1_backward`` makes the gradients. The
arithmetic is in ``kdkernels.backends.chunked_head`` and the row backends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Problem
from kdkernels.backends import chunked_head
from kdkernels.backends.rows import compute_dtype
from kdkernels.ops.eager import save, saved, take_scaled_rows, traced
from kdkernels.ops.schema import SPEC, TAGS, as_numbers, pack_spec, spec_gradients, unpack_spec
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
from kdkernels.reference.rows import side_logits
from kdkernels.reference.sorted_l1 import distance

__all__ = ["rows"]

OPTIONS = f"Tensor error_bound, int? memory_budget, str backend, {SPEC}"


def compute(
    sides: Arguments, grad_values: Tensor | None, wanted: list[bool], options: Arguments
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Values, what was omitted, and the gradients that are wanted."""
    error_bound, memory_budget, backend, *packed = options
    values, omitted, *gradients = chunked_head.sorted_l1(
        *unpack_sides(sides),
        unpack_spec(packed),
        error_bound.item(),
        grad_values,
        side_needs(wanted),
        memory_budget,
        backend,
    )
    return values, omitted, [gradient for side in gradients for gradient in side]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    sides, (made, *options) = arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH:]
    values, omitted, gradients = compute(sides, None, made, tuple(options))
    return values, omitted, or_empty(gradients, sides[0])


sorted_l1_op = torch.library.custom_op(
    "kdkernels::sorted_l1",
    forward,
    mutates_args=(),
    schema=f"({SIDES}, bool[] made, {OPTIONS}) -> (Tensor, Tensor, Tensor[])",
    tags=TAGS,
)


@sorted_l1_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    sides, made = arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH]
    student, teacher = sides[0], sides[4]
    values = student.new_empty(student.shape[0], dtype=compute_dtype(student, teacher))
    return values, torch.empty_like(values), gradients_like(sides, made)


def backward(*arguments: Any) -> list[Tensor]:
    sides, (grad_values, wanted, *options) = arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH:]
    _, _, gradients = compute(sides, grad_values.contiguous(), wanted, tuple(options))
    return or_empty(gradients, sides[0])


sorted_l1_backward_op = torch.library.custom_op(
    "kdkernels::sorted_l1_backward",
    backward,
    mutates_args=(),
    schema=f"({SIDES}, Tensor grad_values, bool[] wanted, {OPTIONS}) -> Tensor[]",
    tags=TAGS,
)


@sorted_l1_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return gradients_like(arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH + 1])


def keep(ctx: Any, inputs: Arguments) -> None:
    """What the backward needs of the inputs, besides the gradients that are made."""
    sides, (made, error_bound, memory_budget, backend, kind, *fields) = inputs[:SIDES_LENGTH], inputs[SIDES_LENGTH:]
    ctx.set_materialize_grads(False)
    save(ctx, *(sides[place] for place in TENSORS), error_bound, *fields)
    ctx.scales = sides[3], sides[7]
    ctx.made = made
    ctx.options = memory_budget, backend, kind


def kept(ctx: Any) -> tuple[tuple[Tensor | None, ...], Arguments, Arguments]:
    """The tensors of the sides, the sides and the options."""
    tensors, (error_bound, *fields) = saved(ctx)[: len(TENSORS)], saved(ctx)[len(TENSORS) :]
    sides = (*tensors[:3], ctx.scales[0], *tensors[3:], ctx.scales[1])
    memory_budget, backend, kind = ctx.options
    return tensors, sides, (error_bound, memory_budget, backend, kind, *fields)


def not_made(ctx: Any, grad_values: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients that the forward has not made: of rows whose upstream gradient counts, or to be differentiated again."""
    tensors, sides, options = kept(ctx)
    if torch.is_grad_enabled():
        spec = unpack_spec(options[3:])

        def values(*tensors: Tensor | None) -> list[Tensor]:
            pair = unpack_sides((*tensors[:3], ctx.scales[0], *tensors[3:], ctx.scales[1]))
            student, teacher = (side_logits(side, spec.active) for side in pair)
            return [distance(student, teacher, spec)]

        return differentiable_gradients(values, tensors, wanted, [grad_values])
    found = sorted_l1_backward_op(*sides, grad_values, wanted, *options)
    return [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]


def setup(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    keep(ctx, inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.gradients = output[2] if any(ctx.made) else None


def backward_rows(ctx: Any, grad_values: Tensor | None, *_: Any) -> Arguments:
    wanted = [ctx.needs_input_grad[place] for place in TENSORS]
    gradients: list[Tensor | None] = [None] * len(TENSORS)
    if grad_values is not None and (torch.is_grad_enabled() or ctx.gradients is None):
        gradients = not_made(ctx, grad_values, wanted)
    elif grad_values is not None:
        column = grad_values.unsqueeze(-1)
        gradients = [made * column if want else None for made, want in zip(ctx.gradients, wanted, strict=True)]
    return *scattered(gradients), *(None,) * 4, *spec_gradients(ctx)


sorted_l1_op.register_autograd(backward_rows, setup_context=setup)


class Rows(torch.autograd.Function):
    """``sorted_l1`` in eager mode, where the gradients are handed on without a copy."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        sides, (made, *options) = inputs[:SIDES_LENGTH], inputs[SIDES_LENGTH:]
        values, omitted, gradients = compute(sides, None, made, tuple(options))
        keep(ctx, inputs)
        ctx.mark_non_differentiable(omitted)
        ctx.gradients = gradients
        return values, omitted

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor | None, _: Tensor | None) -> Arguments:
        wanted = [ctx.needs_input_grad[place] for place in TENSORS]
        gradients: list[Tensor | None] = [None] * len(TENSORS)
        if grad_values is not None and (torch.is_grad_enabled() or not any(ctx.made)):
            gradients = not_made(ctx, grad_values, wanted)
        elif grad_values is not None:
            gradients = take_scaled_rows(ctx, grad_values)
        return *scattered(gradients), *(None,) * 4, *spec_gradients(ctx)


def made_in_forward(sides: Arguments, wanted: list[bool]) -> list[bool]:
    """Which gradients the forward makes: all or none.

    The gradient of a row of logits or hidden states is the upstream one times something known; that of a weight sums over
    the rows. In less than the precision of the computation the product would be rounded twice, and half types underflow
    unless the gradient is made with its upstream factor, such as a GradScaler's.
    """
    dtype = compute_dtype(sides[0], sides[4])
    possible = all(
        place in {0, 4} and sides[place].dtype == dtype for place, want in zip(TENSORS, wanted, strict=True) if want
    )
    return wanted if possible else [False] * len(wanted)


def rows(problem: Problem, error_bound: float, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor]:
    """``(values [N], omitted [N])``, the first differentiable; see ``kdkernels.backends.rows``."""
    assert problem.teacher is not None
    sides = pack_sides(problem.student, problem.teacher)
    tensors = [sides[place] for place in TENSORS]
    wanted = wanted_gradients(sides) if torch.is_grad_enabled() else [False] * len(TENSORS)
    options = as_numbers((error_bound,)), memory_budget, backend, *pack_spec(problem.spec)
    arguments = (*sides, made_in_forward(sides, wanted), *options)
    values: tuple[Tensor, ...]
    if traced(*tensors):
        values = sorted_l1_op(*arguments)
    elif any(wanted):
        values = Rows.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        values = compute(sides, None, wanted, options)[:2]
    return values[0], values[1]
