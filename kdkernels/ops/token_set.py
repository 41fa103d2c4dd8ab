"""The operators ``kdkernels::token_set_log_probs`` and ``kdkernels::token_set_log_probs_backward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Problem, SetProblem
from kdkernels.backends import token_set
from kdkernels.backends.chunked_head import Needs
from kdkernels.backends.rows import RowSpec, Side, compute_dtype
from kdkernels.ops.eager import save, saved, traced
from kdkernels.ops.schema import SPEC, TAGS, pack_spec, spec_gradients, unpack_spec
from kdkernels.ops.second_order import differentiable_gradients
from kdkernels.reference.token_log_probs import set_log_probs

__all__ = ["rows"]

SIDE = "Tensor source, Tensor? weight, Tensor? bias, float scale"
REST = f"Tensor members, int? memory_budget, str backend, {SPEC}"
TENSORS = 3
"""The tensors of the source, which lead the arguments."""


def forward(*arguments: Any) -> Tensor:
    members, memory_budget, backend, *packed = arguments[TENSORS + 1 :]
    return token_set.values(Side(*arguments[: TENSORS + 1]), members, unpack_spec(packed), memory_budget, backend)


token_set_op = torch.library.custom_op(
    "kdkernels::token_set_log_probs", forward, mutates_args=(), schema=f"({SIDE}, {REST}) -> Tensor", tags=TAGS
)


@token_set_op.register_fake
def _(source: Tensor, *_: Any) -> Tensor:
    return source.new_empty(source.shape[0], dtype=compute_dtype(source, None))


def backward(*arguments: Any) -> list[Tensor]:
    side, (upstream, wanted, members, memory_budget, backend, *packed) = (
        Side(*arguments[: TENSORS + 1]),
        arguments[TENSORS + 1 :],
    )
    found = token_set.gradients(side, members, unpack_spec(packed), upstream, Needs(*wanted), memory_budget, backend)
    return [side.tensor.new_empty(0) if gradient is None else gradient for gradient in found]


token_set_backward_op = torch.library.custom_op(
    "kdkernels::token_set_log_probs_backward",
    backward,
    mutates_args=(),
    schema=f"({SIDE}, Tensor upstream, bool[] wanted, {REST}) -> Tensor[]",
    tags=TAGS,
)


@token_set_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    wanted = arguments[TENSORS + 2]
    return [
        tensor.new_empty(tensor.shape) if want else arguments[0].new_empty(0)
        for tensor, want in zip(arguments[:TENSORS], wanted, strict=True)
    ]


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.others = [None if isinstance(each, Tensor) else each for each in inputs]
    save(ctx, *(each if isinstance(each, Tensor) else None for each in inputs))


def backward_rows(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    arguments = [other if tensor is None else tensor for tensor, other in zip(saved(ctx), ctx.others, strict=True)]
    wanted = list(ctx.needs_input_grad[:TENSORS])
    if torch.is_grad_enabled():
        scale, members, _, _, *packed = arguments[TENSORS:]
        gradients = second_order(arguments[:TENSORS], scale, members, unpack_spec(packed), wanted, upstream)
    else:
        found = token_set_backward_op(
            *arguments[: TENSORS + 1], upstream.contiguous(), wanted, *arguments[TENSORS + 1 :]
        )
        gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    return *gradients, None, None, None, None, *spec_gradients(ctx)


def second_order(
    tensors: list[Any], scale: float, members: Tensor, spec: RowSpec, wanted: list[bool], upstream: Tensor
) -> list[Tensor | None]:
    """The gradients, differentiable once more. Makes the logits whole."""

    def values(source: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
        side = Side(source, weight, bias, scale)
        dtype = compute_dtype(source, None)
        problem = Problem(side, None, source.shape[:1], len(members), dtype, spec)
        return [set_log_probs(SetProblem(problem, members))]

    return differentiable_gradients(values, tensors, wanted, [upstream])


token_set_op.register_autograd(backward_rows, setup_context=setup)


class Rows(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(setup)
    backward = staticmethod(backward_rows)


def rows(found: SetProblem, memory_budget: int | None, backend: str) -> Tensor:
    """The log-probabilities ``[N]``, differentiable."""
    side = found.problem.student
    arguments = (*side[: TENSORS + 1], found.members, memory_budget, backend, *pack_spec(found.problem.spec))
    values: Tensor
    if traced(side.tensor, side.weight, side.bias):
        values = token_set_op(*arguments)
    elif torch.is_grad_enabled() and side.requires_grad:
        values = Rows.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        values = forward(*arguments)
    return values
