"""The operators ``kdkernels::pairwise_l1`` and ``kdkernels::pairwise_l1_backward``, for logits and language-model heads.

The arithmetic is in ``kdkernels.backends.chunked_pairs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Pairs
from kdkernels.backends import chunked_pairs
from kdkernels.backends.chunked_pairs import Found
from kdkernels.backends.rows import PairSpec, Tempering, compute_dtype
from kdkernels.ops.eager import save, saved, traced
from kdkernels.ops.schema import TAGS, as_numbers
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
from kdkernels.reference.pairwise_l1 import row_distances

__all__ = ["distances"]

SPEC = "SymInt problems, SymInt student_rows, SymInt teacher_rows, Tensor temperings"
SPEC_LENGTH = 4
OPTIONS = "int? memory_budget, str backend"

Values = tuple[Tensor, Tensor, Tensor, Tensor]


def pack_spec(spec: PairSpec) -> Arguments:
    """The arguments of ``SPEC``."""
    return (*spec.shape, as_numbers((*spec.student[:2], *spec.teacher[:2])))


def unpack_spec(packed: Sequence[Any]) -> PairSpec:
    """The specification from the arguments of ``SPEC``."""
    problems, student_rows, teacher_rows, temperings = packed
    numbers = temperings.tolist()
    return PairSpec(problems, student_rows, teacher_rows, Tempering(*numbers[:2]), Tempering(*numbers[2:]))


def forward(*arguments: Any) -> Values:
    sides, rest = arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH:]
    spec, (with_signs, memory_budget, backend) = unpack_spec(rest[:SPEC_LENGTH]), rest[SPEC_LENGTH:]
    return chunked_pairs.distances(*unpack_sides(sides), spec, with_signs, memory_budget, backend)


pairwise_l1_op = torch.library.custom_op(
    "kdkernels::pairwise_l1",
    forward,
    mutates_args=(),
    schema=f"({SIDES}, {SPEC}, bool with_signs, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)


@pairwise_l1_op.register_fake
def _(*arguments: Any) -> Values:
    student, teacher = arguments[0], arguments[4]
    *shape, _, with_signs = arguments[SIDES_LENGTH : SIDES_LENGTH + SPEC_LENGTH + 1]
    distance = student.new_empty(shape, dtype=compute_dtype(student, teacher))
    normalisers = (distance.new_empty(rows.shape[0], 2) for rows in (student, teacher))
    return distance, distance.new_empty(shape if with_signs else 0), *normalisers


def backward(*arguments: Any) -> list[Tensor]:
    sides, rest = arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH:]
    spec, (*found, grad, wanted, memory_budget, backend) = unpack_spec(rest[:SPEC_LENGTH]), rest[SPEC_LENGTH:]
    gradients = chunked_pairs.gradients(
        *unpack_sides(sides), spec, Found(*found), grad, side_needs(wanted), memory_budget, backend
    )
    return or_empty((*gradients[0], *gradients[1]), sides[0])


pairwise_l1_backward_op = torch.library.custom_op(
    "kdkernels::pairwise_l1_backward",
    backward,
    mutates_args=(),
    schema=f"({SIDES}, {SPEC}, Tensor distance, Tensor signed_mass, Tensor student_normalisers, "
    f"Tensor teacher_normalisers, Tensor grad, bool[] wanted, {OPTIONS}) -> Tensor[]",
    tags=TAGS,
)


@pairwise_l1_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return gradients_like(arguments[:SIDES_LENGTH], arguments[SIDES_LENGTH + SPEC_LENGTH + 5])


def setup(ctx: Any, inputs: Arguments, output: Values) -> None:
    sides, rest = inputs[:SIDES_LENGTH], inputs[SIDES_LENGTH:]
    *shape, temperings, _, memory_budget, backend = rest
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    save(ctx, *(sides[place] for place in TENSORS), temperings, *output)
    ctx.scales = sides[3], sides[7]
    ctx.shape = shape
    ctx.options = memory_budget, backend


def gradient(ctx: Any, grad: Tensor | None, *_: Any) -> Arguments:
    nothing = (None,) * (SPEC_LENGTH + 3)
    if grad is None:
        return *(None,) * SIDES_LENGTH, *nothing
    kept = saved(ctx)
    tensors, (temperings, *found) = kept[: len(TENSORS)], kept[len(TENSORS) :]
    packed = *ctx.shape, temperings
    wanted = [ctx.needs_input_grad[place] for place in TENSORS]

    def sides_of(tensors: Sequence[Tensor | None]) -> Arguments:
        return (*tensors[:3], ctx.scales[0], *tensors[3:], ctx.scales[1])

    gradients: list[Tensor | None]
    if torch.is_grad_enabled():
        spec, dtype = unpack_spec(packed), grad.dtype

        def values(*tensors: Tensor | None) -> list[Tensor]:
            return [row_distances(*unpack_sides(sides_of(tensors)), spec, dtype)]

        gradients = differentiable_gradients(values, tensors, wanted, [grad])
    else:
        made = pairwise_l1_backward_op(*sides_of(tensors), *packed, *found, grad, wanted, *ctx.options)
        gradients = [part if want else None for part, want in zip(made, wanted, strict=True)]
    return *scattered(gradients), *nothing


pairwise_l1_op.register_autograd(gradient, setup_context=setup)


class Rows(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(setup)
    backward = staticmethod(gradient)


def distances(pairs: Pairs, memory_budget: int | None, backend: str) -> Tensor:
    """The distances ``[..., n, m]``, differentiable."""
    sides = pack_sides(pairs.student, pairs.teacher)
    with_signs = torch.is_grad_enabled() and any(wanted_gradients(sides))
    arguments = (*sides, *pack_spec(pairs.spec), with_signs, memory_budget, backend)
    values: Values
    if traced(*(sides[place] for place in TENSORS)):
        values = pairwise_l1_op(*arguments)
    elif with_signs:
        values = Rows.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        values = forward(*arguments)
    return values[0].view(*pairs.batch_shape, *pairs.spec.shape[1:])
