"""Operators of the family ``ranking``, for logits and language-model heads.

``kdkernels::plackett_luce`` gives the value of every row and, of logits in the precision of the computation, the gradient of
each: the upstream one of the row is a factor on it, so that the backward need not sort again. Else
``kdkernels::plackett_luce_backward`` makes the gradients. ``kdkernels::leading_ids`` and ``kdkernels::token_ranks`` have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Counting, Ranking
from kdkernels.backends import chunked_ranking
from kdkernels.backends.chunked_head import Needs
from kdkernels.backends.rows import Side, Tempering, compute_dtype
from kdkernels.ops.eager import save, saved, take_scaled_rows, traced
from kdkernels.ops.schema import SPEC, TAGS, as_numbers, pack_spec, spec_gradients, unpack_spec
from kdkernels.ops.second_order import differentiable_gradients
from kdkernels.ops.sides import or_empty
from kdkernels.reference.ranking import likelihood, teacher_order
from kdkernels.reference.rows import side_logits

__all__ = ["leading_ids", "rows", "token_ranks"]

Arguments = tuple[Any, ...]

INPUTS = (
    "Tensor student, Tensor? student_weight, Tensor? student_bias, float student_scale, "
    "Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, float teacher_scale, Tensor? order, Tensor? weights"
)
INPUTS_LENGTH = 10
TENSORS = 3
"""Of the student, the first ones."""

OPTIONS = f"int? memory_budget, str backend, {SPEC}"


def compute(
    inputs: Arguments, grad_values: Tensor | None, wanted: list[bool], options: Arguments
) -> tuple[Tensor, list[Tensor | None]]:
    memory_budget, backend, *packed = options
    values, gradients = chunked_ranking.plackett_luce(
        Side(*inputs[:4]),
        None if inputs[4] is None else Side(*inputs[4:8]),
        inputs[8],
        inputs[9],
        unpack_spec(packed),
        grad_values,
        Needs(*wanted),
        memory_budget,
        backend,
    )
    return values, list(gradients)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, (made, *options) = arguments[:INPUTS_LENGTH], arguments[INPUTS_LENGTH:]
    values, gradients = compute(inputs, None, [made, False, False], tuple(options))
    return values, or_empty(gradients[:1], inputs[0])[0]


plackett_luce_op = torch.library.custom_op(
    "kdkernels::plackett_luce",
    forward,
    mutates_args=(),
    schema=f"({INPUTS}, bool made, {OPTIONS}) -> (Tensor, Tensor)",
    tags=TAGS,
)


@plackett_luce_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    student, teacher, made = arguments[0], arguments[4], arguments[INPUTS_LENGTH]
    values = student.new_empty(student.shape[0], dtype=compute_dtype(student, teacher))
    return values, student.new_empty(student.shape if made else 0)


def backward(*arguments: Any) -> list[Tensor]:
    inputs, (grad_values, wanted, *options) = arguments[:INPUTS_LENGTH], arguments[INPUTS_LENGTH:]
    return or_empty(compute(inputs, grad_values.contiguous(), wanted, tuple(options))[1], inputs[0])


plackett_luce_backward_op = torch.library.custom_op(
    "kdkernels::plackett_luce_backward",
    backward,
    mutates_args=(),
    schema=f"({INPUTS}, Tensor grad_values, bool[] wanted, {OPTIONS}) -> Tensor[]",
    tags=TAGS,
)


@plackett_luce_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    wanted = arguments[INPUTS_LENGTH + 1]
    return [
        tensor.new_empty(tensor.shape) if want else arguments[0].new_empty(0)
        for tensor, want in zip(arguments[:TENSORS], wanted, strict=True)
    ]


def keep(ctx: Any, arguments: Arguments) -> None:
    """What the backward needs of the arguments, besides a gradient that is made."""
    ctx.set_materialize_grads(False)
    ctx.others = [None if isinstance(each, Tensor | list) else each for each in arguments]
    save(ctx, *(each if isinstance(each, Tensor | list) else None for each in arguments))
    ctx.made = arguments[INPUTS_LENGTH]


def not_made(ctx: Any, grad_values: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients that the forward has not made: of rows whose upstream gradient counts, or to be differentiated again."""
    arguments = [other if kept is None else kept for kept, other in zip(saved(ctx), ctx.others, strict=True)]
    inputs, options = arguments[:INPUTS_LENGTH], arguments[INPUTS_LENGTH + 1 :]
    if not torch.is_grad_enabled():
        found = plackett_luce_backward_op(*inputs, grad_values, wanted, *options)
        return [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    spec = unpack_spec(options[2:])
    scale, teacher, (order, weights) = inputs[3], inputs[4:8], inputs[8:]
    dtype = compute_dtype(inputs[0], teacher[0])
    if order is None:
        with torch.no_grad():
            order, weights = teacher_order(side_logits(Side(*teacher), spec.active), spec, dtype, weights)

    def values(*tensors: Tensor | None) -> list[Tensor]:
        tensor, weight, bias = tensors
        assert tensor is not None
        student = side_logits(Side(tensor, weight, bias, scale), spec.active)
        return [likelihood(student, order, weights, spec, dtype)]

    return differentiable_gradients(values, inputs[:TENSORS], wanted, [grad_values])


def answer(ctx: Any, gradients: list[Tensor | None]) -> Arguments:
    return *gradients, *(None,) * (INPUTS_LENGTH - TENSORS + 3), *spec_gradients(ctx)


def setup(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    keep(ctx, inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.gradient = output[1] if ctx.made else None


def backward_rows(ctx: Any, grad_values: Tensor | None, _: Tensor | None) -> Arguments:
    wanted = list(ctx.needs_input_grad[:TENSORS])
    gradients: list[Tensor | None] = [None] * TENSORS
    if grad_values is not None and (torch.is_grad_enabled() or not ctx.made):
        gradients = not_made(ctx, grad_values, wanted)
    elif grad_values is not None:
        gradients[0] = ctx.gradient * grad_values.unsqueeze(-1)
    return answer(ctx, gradients)


plackett_luce_op.register_autograd(backward_rows, setup_context=setup)


class Rows(torch.autograd.Function):
    """``plackett_luce`` in eager mode, where the gradient is handed on without a copy."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, (made, *options) = arguments[:INPUTS_LENGTH], arguments[INPUTS_LENGTH:]
        values, gradients = compute(inputs, None, [made, False, False], tuple(options))
        keep(ctx, arguments)
        ctx.gradients = gradients
        return values

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor | None) -> Arguments:
        wanted = list(ctx.needs_input_grad[:TENSORS])
        gradients: list[Tensor | None] = [None] * TENSORS
        if grad_values is not None and (torch.is_grad_enabled() or not ctx.made):
            gradients = not_made(ctx, grad_values, wanted)
        elif grad_values is not None:
            gradients = take_scaled_rows(ctx, grad_values)
        return answer(ctx, gradients)


def rows(ranking: Ranking, memory_budget: int | None, backend: str) -> Tensor:
    """The values ``[N]``, differentiable; see ``kdkernels.backends.rows``."""
    problem, order, weights = ranking.problem, ranking.order, ranking.weights
    spec, student, teacher = problem.spec, problem.student, problem.teacher
    if ranking.top_k is not None:
        order, log_probs = leading_ids(ranking, memory_budget, backend)
        weights = (
            log_probs.exp() if weights is None else weights + 0 * log_probs[:, :1].nan_to_num(neginf=0.0, nan=torch.nan)
        )
        teacher, spec = None, spec._replace(labels=None)
    inputs = (*student[:4], *((None, None, None, 1.0) if teacher is None else teacher[:4]), order, weights)
    differentiated = torch.is_grad_enabled() and student.requires_grad
    # In less than the precision of the computation the product would be rounded twice.
    made = differentiated and student.weight is None and student.tensor.dtype == problem.dtype
    options = memory_budget, backend, *pack_spec(spec)
    values: Tensor
    if traced(student.tensor, student.weight, inputs[4]):
        values = plackett_luce_op(*inputs, made, *options)[0]
    elif differentiated:
        values = Rows.apply(*inputs, made, *options)  # type: ignore[no-untyped-call]
    else:
        values = compute(inputs, None, [False] * TENSORS, options)[0]
    return values


def detached(side: Side) -> Arguments:
    """The arguments of ``SOURCE``."""
    return *(
        None if tensor is None else tensor.detach() for tensor in (side.tensor, side.weight, side.bias)
    ), side.scale


def leading_rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    side, (k, labels, numbers, double, memory_budget, backend) = Side(*arguments[:4]), arguments[4:]
    return chunked_ranking.leading_ids(side, k, labels, Tempering(*numbers.tolist()), double, memory_budget, backend)


SOURCE = "Tensor source, Tensor? weight, Tensor? bias, float scale"

leading_ids_op = torch.library.custom_op(
    "kdkernels::leading_ids",
    leading_rows,
    mutates_args=(),
    schema=f"({SOURCE}, SymInt k, Tensor? labels, Tensor tempering, bool double, int? memory_budget, "
    "str backend) -> (Tensor, Tensor)",
    tags=TAGS,
)


@leading_ids_op.register_fake
def _(source: Tensor, weight: Any, bias: Any, scale: float, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    ids = source.new_empty(source.shape[0], k, dtype=torch.int64)
    double = rest[2]
    return ids, ids.new_empty(ids.shape, dtype=torch.float64 if double else compute_dtype(source, None))


def leading_ids(ranking: Ranking, memory_budget: int | None, backend: str) -> tuple[Tensor, Tensor]:
    """The ids ``[N, k]`` that the teacher, after the label, ranks highest, and their log-probabilities."""
    teacher, spec = ranking.problem.teacher, ranking.problem.spec
    assert teacher is not None
    labels = spec.labels
    if labels is not None and spec.active is not None:
        labels = labels.masked_fill(~spec.active, 0)
    tempering = Tempering(spec.teacher_temperature, spec.teacher_softcap)
    double = ranking.problem.dtype == torch.float64
    call = leading_ids_op if traced(teacher.tensor, teacher.weight) else leading_rows
    with torch.no_grad():
        found: tuple[Tensor, Tensor] = call(
            *detached(teacher), ranking.top_k, labels, as_numbers(tempering), double, memory_budget, backend
        )
    return found


def rank_rows(*arguments: Any) -> Tensor:
    ids, memory_budget, backend = arguments[4:]
    return chunked_ranking.token_ranks(Side(*arguments[:4]), ids, memory_budget, backend)


token_ranks_op = torch.library.custom_op(
    "kdkernels::token_ranks",
    rank_rows,
    mutates_args=(),
    schema=f"({SOURCE}, Tensor ids, int? memory_budget, str backend) -> Tensor",
    tags=TAGS,
)


@token_ranks_op.register_fake
def _(source: Tensor, weight: Any, bias: Any, scale: float, ids: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(ids)


def token_ranks(counting: Counting, memory_budget: int | None, backend: str) -> Tensor:
    """The ranks int64 ``[N, m]``."""
    call = token_ranks_op if traced(counting.source.tensor, counting.source.weight) else rank_rows
    with torch.no_grad():
        ranks: Tensor = call(*detached(counting.source), counting.ids, memory_budget, backend)
    return ranks
