"""The operators ``kdkernels::sinkhorn`` and ``kdkernels::sinkhorn_backward``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.arguments import Transport
from kdkernels.backends import row_backend
from kdkernels.backends.transport import TransportGradients, TransportSpec, TransportValues, raise_for_status
from kdkernels.debugging import values_are_checked
from kdkernels.ops.eager import save, saved, traced
from kdkernels.ops.schema import TAGS, as_numbers
from kdkernels.ops.second_order import differentiable_gradients
from kdkernels.reference.sinkhorn import solve

__all__ = ["sinkhorn"]

# What kdkernels.backends.transport calls a specification.
SPEC = "SymInt max_iterations, Tensor numbers, Tensor? row_lengths, Tensor? column_lengths, Tensor? start"

VALUES = TransportValues._fields.index("status")
"""How many of the values a gradient function returns; what follows is between forward and backward."""


def pack(spec: TransportSpec) -> tuple[Any, ...]:
    """The arguments of ``SPEC``."""
    numbers = as_numbers(
        (spec.epsilon, spec.tolerance, spec.row_reach, spec.column_reach, spec.epsilon_start, spec.epsilon_decay)
    )
    return spec.max_iterations, numbers, spec.row_lengths, spec.column_lengths, spec.start


def unpack(packed: Sequence[Any]) -> TransportSpec:
    max_iterations, numbers, *tensors = packed
    epsilon, *others = numbers.tolist()
    return TransportSpec(epsilon, max_iterations, *others, *tensors)


def unpack_for(backend: str, a: Tensor, packed: Sequence[Any]) -> TransportSpec:
    """The specification as a row backend takes it."""
    spec = unpack(packed)
    if spec.start is None:
        return spec
    return spec._replace(start=spec.start.to(row_backend(backend).SINKHORN_POTENTIALS or a.dtype))


def forward(
    cost: Tensor, a: Tensor, b: Tensor, gradient: str, keep_history: bool, backend: str, *packed: Any
) -> TransportValues:
    found: TransportValues = row_backend(backend).sinkhorn_forward(
        cost, a, b, unpack_for(backend, a, packed), keep_history
    )
    if values_are_checked(cost):
        raise_for_status(found.status)
    return found


RETURNS = ", ".join(["Tensor"] * len(TransportValues._fields))

sinkhorn_op = torch.library.custom_op(
    "kdkernels::sinkhorn",
    lambda *inputs: tuple(forward(*inputs)),
    mutates_args=(),
    schema=f"(Tensor cost, Tensor a, Tensor b, str gradient, bool keep_history, str backend, {SPEC}) -> ({RETURNS})",
    tags=TAGS,
)


@sinkhorn_op.register_fake
def _(
    cost: Tensor, a: Tensor, b: Tensor, gradient: str, keep_history: bool, backend: str, *packed: Any
) -> tuple[Tensor, ...]:
    batch, n, m = cost.shape
    potentials = row_backend(backend).SINKHORN_POTENTIALS or a.dtype
    steps = packed[0] if keep_history else 0
    return (
        a.new_empty(batch),
        a.new_empty(batch),
        a.new_empty(batch, n, dtype=potentials),
        a.new_empty(batch, m, dtype=potentials),
        a.new_empty(batch, dtype=torch.int64),
        a.new_empty(batch),
        a.new_empty(batch, dtype=torch.int32),
        a.new_empty(batch, steps, n, dtype=potentials),
        a.new_empty(batch, steps, m, dtype=potentials),
    )


def backward(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    iterations: Tensor,
    f_history: Tensor,
    g_history: Tensor,
    grad_distance: Tensor | None,
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    to_cost: bool,
    to_marginals: bool,
    gradient: str,
    backend: str,
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    upstream = TransportGradients(
        *(None if each is None else each.contiguous() for each in (grad_distance, grad_value, grad_f, grad_g))
    )
    nothing = a.new_empty(0)
    values = TransportValues(nothing, nothing, f, g, iterations, nothing, nothing, f_history, g_history)
    found = gradients_like(cost, a, b, to_cost, to_marginals)
    row_backend(backend).sinkhorn_backward(
        cost,
        a,
        b,
        values,
        unpack_for(backend, a, packed),
        gradient,
        upstream,
        found[0] if to_cost else None,
        found[1] if to_marginals else None,
        found[2] if to_marginals else None,
    )
    return found


def gradients_like(
    cost: Tensor, a: Tensor, b: Tensor, to_cost: bool, to_marginals: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where gradients go; an empty tensor for one that is not wanted."""
    return (
        cost.new_empty(cost.shape if to_cost else 0),
        a.new_empty(a.shape if to_marginals else 0),
        b.new_empty(b.shape if to_marginals else 0),
    )


sinkhorn_backward_op = torch.library.custom_op(
    "kdkernels::sinkhorn_backward",
    backward,
    mutates_args=(),
    schema="(Tensor cost, Tensor a, Tensor b, Tensor f, Tensor g, Tensor iterations, Tensor f_history, Tensor g_history, "
    "Tensor? grad_distance, Tensor? grad_value, Tensor? grad_f, Tensor? grad_g, bool to_cost, bool to_marginals, "
    f"str gradient, str backend, {SPEC}) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)


@sinkhorn_backward_op.register_fake
def _(cost: Tensor, a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return gradients_like(cost, a, b, *rest[9:11])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, ctx.gradient, _, ctx.backend, ctx.max_iterations, *tensors = inputs
    found = TransportValues(*output)
    kept = found.f, found.g, found.iterations, found.f_history, found.g_history
    save(ctx, cost, a, b, *kept, *tensors)
    ctx.mark_non_differentiable(found.iterations, found.error, found.status, found.f_history, found.g_history)
    ctx.set_materialize_grads(False)


def backward_of(
    ctx: Any,
    grad_distance: Tensor | None,
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    *_: Any,
) -> tuple[Any, ...]:
    cost, a, b, f, g, iterations, f_history, g_history, *tensors = saved(ctx)
    packed = ctx.max_iterations, *tensors
    upstream = grad_distance, grad_value, grad_f, grad_g
    wanted = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        gradients = second_order(ctx.gradient, cost, a, b, packed, upstream, wanted)
    else:
        kept = f, g, iterations, f_history, g_history
        flags = wanted[0], wanted[1] or wanted[2]
        found = sinkhorn_backward_op(cost, a, b, *kept, *upstream, *flags, ctx.gradient, ctx.backend, *packed)
        gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    return *gradients, None, None, None, *(None,) * (1 + len(tensors))


def second_order(
    gradient: str,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    packed: Sequence[Any],
    upstream: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients, differentiable once more."""
    if gradient != "unrolled":
        raise RuntimeError(
            f'sinkhorn: gradient="{gradient}" has no second derivatives; use gradient="unrolled", which has them'
        )
    spec = unpack(packed)

    def values(cost: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        problem = Transport(cost, a, b, spec, gradient, cost.shape[:1])
        found = solve(problem)[: len(upstream)]
        return [value for value, grad in zip(found, upstream, strict=True) if grad is not None]

    given = [grad.to(a.dtype) for grad in upstream if grad is not None]
    return differentiable_gradients(values, (cost, a, b), wanted, given)


sinkhorn_op.register_autograd(backward_of, setup_context=setup_context)


class Iterations(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(forward(*inputs))

    setup_context = staticmethod(setup_context)
    backward = staticmethod(backward_of)


def sinkhorn(problem: Transport, backend: str) -> TransportValues:
    """The answer of a row backend, differentiable in cost, a and b."""
    cost, a, b, spec, gradient, _ = problem
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (cost, a, b))
    arguments = cost, a, b, gradient, wanted and gradient == "unrolled", backend, *pack(spec)
    if traced(cost, a, b):
        return TransportValues(*sinkhorn_op(*arguments))
    if wanted:
        return TransportValues(*Iterations.apply(*arguments))  # type: ignore[no-untyped-call]
    return forward(*arguments)
