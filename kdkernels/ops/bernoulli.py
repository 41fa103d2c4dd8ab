"""Operators of the family ``bernoulli``, for logits and language-model heads.

``kdkernels::bernoulli`` gives the value of every row, ``kdkernels::bernoulli_backward`` its gradients, and
``kdkernels::bernoulli_total`` the weighted sum over the rows together with its gradients, from one sweep. The gradients are
those to the student; targets have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Problem
from kdkernels.backends import bernoulli
from kdkernels.backends.bernoulli import Targets
from kdkernels.backends.chunked_head import Needs, SideGradients
from kdkernels.backends.rows import RowSpec, Side, compute_dtype
from kdkernels.ops.eager import save, saved, take_scaled, traced
from kdkernels.ops.schema import SPEC, TAGS, pack_spec, spec_gradients, unpack_spec
from kdkernels.ops.second_order import differentiable_gradients
from kdkernels.ops.sides import or_empty
from kdkernels.reference.bernoulli import row_values

__all__ = ["rows", "total"]

STUDENT = "Tensor student, Tensor? student_weight, Tensor? student_bias, float student_scale"
TARGETS = (
    "Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, float teacher_scale, "
    "Tensor? ids, Tensor? values, Tensor? fill"
)
SOURCES = f"{STUDENT}, {TARGETS}"
SOURCES_LENGTH = 11
OPTIONS = f"int? memory_budget, str backend, {SPEC}"
STUDENT_TENSORS = 3
SCALE, TEACHER_SCALE = 3, 7

Arguments = tuple[Any, ...]


def pack_sources(student: Side, targets: Targets) -> Arguments:
    teacher = (None, None, None, 1.0) if targets.side is None else targets.side[:4]
    return (*student[:4], *teacher, *targets[1:])


def unpack_sources(sources: Arguments) -> tuple[Side, Targets]:
    return Side(*sources[:4]), Targets(None if sources[4] is None else Side(*sources[4:8]), *sources[8:])


def compute(
    sources: Arguments, grad_values: Tensor | None, wanted: list[bool], options: Arguments
) -> tuple[Tensor, SideGradients]:
    memory_budget, backend, *packed = options
    student, targets = unpack_sources(sources)
    return bernoulli.bernoulli(
        student, targets, unpack_spec(packed), grad_values, Needs(*wanted), memory_budget, backend
    )


def values_like(sources: Arguments) -> Tensor:
    student: Tensor = sources[0]
    return student.new_empty(student.shape[0], dtype=compute_dtype(student, sources[4]))


def gradients_like(sources: Arguments, wanted: list[bool]) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape) if want else sources[0].new_empty(0)
        for tensor, want in zip(sources[:STUDENT_TENSORS], wanted, strict=True)
    ]


def second_order(sources: Arguments, spec: RowSpec, wanted: list[bool], upstream: Tensor) -> list[Tensor | None]:
    """The gradients, differentiable once more."""

    def values(*tensors: Tensor | None) -> list[Tensor]:
        student, targets = unpack_sources((*tensors, *sources[STUDENT_TENSORS:]))
        return [row_values(student, targets, spec)]

    return differentiable_gradients(values, sources[:STUDENT_TENSORS], wanted, [upstream])


def forward(*arguments: Any) -> Tensor:
    return compute(arguments[:SOURCES_LENGTH], None, [False] * STUDENT_TENSORS, arguments[SOURCES_LENGTH:])[0]


bernoulli_op = torch.library.custom_op(
    "kdkernels::bernoulli", forward, mutates_args=(), schema=f"({SOURCES}, {OPTIONS}) -> Tensor", tags=TAGS
)


@bernoulli_op.register_fake
def _(*arguments: Any) -> Tensor:
    return values_like(arguments)


def backward(*arguments: Any) -> list[Tensor]:
    sources, (grad_values, wanted, *options) = arguments[:SOURCES_LENGTH], arguments[SOURCES_LENGTH:]
    return or_empty(compute(sources, grad_values.contiguous(), wanted, tuple(options))[1], sources[0])


bernoulli_backward_op = torch.library.custom_op(
    "kdkernels::bernoulli_backward",
    backward,
    mutates_args=(),
    schema=f"({SOURCES}, Tensor grad_values, bool[] wanted, {OPTIONS}) -> Tensor[]",
    tags=TAGS,
)


@bernoulli_backward_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return gradients_like(arguments[:SOURCES_LENGTH], arguments[SOURCES_LENGTH + 1])


def setup_rows(ctx: Any, inputs: Arguments, output: Tensor) -> None:
    sources, (memory_budget, backend, kind, *fields) = inputs[:SOURCES_LENGTH], inputs[SOURCES_LENGTH:]
    save(ctx, *(source for source in sources if not isinstance(source, float)), *fields)
    ctx.scales = sources[SCALE], sources[TEACHER_SCALE]
    ctx.options = memory_budget, backend, kind


def backward_rows(ctx: Any, grad_values: Tensor) -> Arguments:
    kept = saved(ctx)
    tensors, fields = kept[: SOURCES_LENGTH - 2], kept[SOURCES_LENGTH - 2 :]
    sources = (*tensors[:3], ctx.scales[0], *tensors[3:6], ctx.scales[1], *tensors[6:])
    memory_budget, backend, kind = ctx.options
    packed = kind, *fields
    wanted = list(ctx.needs_input_grad[:STUDENT_TENSORS])
    gradients: list[Tensor | None]
    if torch.is_grad_enabled():
        gradients = second_order(sources, unpack_spec(packed), wanted, grad_values)
    else:
        found = bernoulli_backward_op(*sources, grad_values, wanted, memory_budget, backend, *packed)
        gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    return *gradients, *(None,) * (SOURCES_LENGTH - STUDENT_TENSORS + 2), *spec_gradients(ctx)


bernoulli_op.register_autograd(backward_rows, setup_context=setup_rows)


class Rows(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(setup_rows)
    backward = staticmethod(backward_rows)


def wanted_gradients(student: Side) -> list[bool]:
    grad = torch.is_grad_enabled()
    tensors = student.tensor, student.weight, student.bias
    return [grad and tensor is not None and tensor.requires_grad for tensor in tensors]


def rows(problem: Problem, targets: Targets, memory_budget: int | None, backend: str) -> Tensor:
    """The values ``[N]``, differentiable."""
    sources = pack_sources(problem.student, targets)
    arguments = (*sources, memory_budget, backend, *pack_spec(problem.spec))
    value: Tensor
    if traced(*sources[:STUDENT_TENSORS], sources[4]):
        value = bernoulli_op(*arguments)
    elif any(wanted_gradients(problem.student)):
        value = Rows.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        value = forward(*arguments)
    return value


def forward_total(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    sources, (scales, wanted, *options) = arguments[:SOURCES_LENGTH], arguments[SOURCES_LENGTH:]
    values, gradients = compute(sources, scales.contiguous(), wanted, tuple(options))
    return torch.dot(scales, values), values, or_empty(gradients, sources[0])


bernoulli_total_op = torch.library.custom_op(
    "kdkernels::bernoulli_total",
    forward_total,
    mutates_args=(),
    schema=f"({SOURCES}, Tensor scales, bool[] wanted, {OPTIONS}) -> (Tensor, Tensor, Tensor[])",
    tags=TAGS,
)


@bernoulli_total_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    sources = arguments[:SOURCES_LENGTH]
    values = values_like(sources)
    return values.new_empty(()), values, gradients_like(sources, arguments[SOURCES_LENGTH + 1])


def setup_total(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *output[2])


def backward_total(ctx: Any, grad_total: Tensor | None, *_: Any) -> Arguments:
    rest = (None,) * (SOURCES_LENGTH - STUDENT_TENSORS)
    if grad_total is None:
        return *(None,) * STUDENT_TENSORS, *rest, *(None,) * 4, *spec_gradients(ctx)
    values, *gradients = ctx.saved_tensors
    needs = ctx.needs_input_grad
    scaled = [
        gradient * grad_total if want else None
        for gradient, want in zip(gradients, needs[:STUDENT_TENSORS], strict=True)
    ]
    to_scales = values * grad_total if needs[SOURCES_LENGTH] else None
    return *scaled, *rest, to_scales, None, None, None, *spec_gradients(ctx)


bernoulli_total_op.register_autograd(backward_total, setup_context=setup_total)


class FusedTotal(torch.autograd.Function):
    """``bernoulli_total`` in eager mode, where the gradients are handed on without a copy."""

    @staticmethod
    def forward(ctx: Any, options: Arguments, scales: Tensor, targets: Targets, student: Side, *tensors: Any) -> Tensor:
        memory_budget, backend, spec = options
        values, ctx.gradients = bernoulli.bernoulli(
            student, targets, spec, scales, Needs(*ctx.needs_input_grad[4:]), memory_budget, backend
        )
        ctx.values, ctx.targets, ctx.spec, ctx.scale = values, targets, spec, student.scale
        save(ctx, scales, *tensors)
        return torch.dot(scales, values)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> Arguments:
        scales, *tensors = saved(ctx)
        needs = list(ctx.needs_input_grad)
        to_scales = ctx.values * grad_total if needs[1] else None
        if torch.is_grad_enabled():
            if needs[1]:
                raise NotImplementedError(
                    "bernoulli_loss: second derivatives in which the weight requires grad need backend='reference'"
                )
            sources = pack_sources(Side(tensors[0], tensors[1], tensors[2], ctx.scale), ctx.targets)
            gradients = second_order(sources, ctx.spec, needs[4:], scales * grad_total)
        else:
            gradients = take_scaled(ctx, grad_total)
        return None, to_scales, None, None, *gradients


def total(problem: Problem, targets: Targets, scales: Tensor, memory_budget: int | None, backend: str) -> Tensor:
    """The sum over the rows of scale times value, differentiable."""
    student, spec = problem.student, problem.spec
    tensors = student.tensor, student.weight, student.bias
    wanted = wanted_gradients(student)
    value: Tensor
    if traced(*tensors, None if targets.side is None else targets.side.tensor):
        sources = pack_sources(student, targets)
        value = bernoulli_total_op(*sources, scales, wanted, memory_budget, backend, *pack_spec(spec))[0]
    elif any(wanted) or (torch.is_grad_enabled() and scales.requires_grad):
        weight, bias = (None if tensor is None else tensor.detach() for tensor in tensors[1:])
        plain = Side(student.tensor.detach(), weight, bias, student.scale)
        options = memory_budget, backend, spec
        value = FusedTotal.apply(options, scales, targets, plain, *tensors)  # type: ignore[no-untyped-call]
    else:
        found, _ = bernoulli.bernoulli(student, targets, spec, None, Needs(False), memory_budget, backend)
        value = torch.dot(scales, found)
    return value
