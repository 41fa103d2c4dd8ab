"""The operator ``kdkernels::angle``: the mean over all triples together with its gradient to the student's points.

The arithmetic is in ``kdkernels.backends.angles``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import angles
from kdkernels.backends.rows import compute_dtype
from kdkernels.ops.eager import save, saved, traced
from kdkernels.ops.schema import TAGS
from kdkernels.ops.second_order import differentiable_gradients
from kdkernels.reference.angle import loss as reference_loss

__all__ = ["loss"]


def forward(student: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    value, gradient = angles.value_and_gradient(student, teacher, dtype, backend)
    return value.to(dtype), gradient.to(dtype)


angle_op = torch.library.custom_op(
    "kdkernels::angle",
    forward,
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, str backend) -> (Tensor, Tensor)",
    tags=TAGS,
)


@angle_op.register_fake
def _(student: Tensor, teacher: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    return student.new_empty((), dtype=dtype), student.new_empty(student.shape, dtype=dtype)


def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    save(ctx, *inputs[:2], output[1])


def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad is None or not ctx.needs_input_grad[0]:
        return None, None, None
    student, teacher, gradient = saved(ctx)
    if torch.is_grad_enabled():
        again = differentiable_gradients(lambda student: [reference_loss(student, teacher)], [student], [True], [grad])
        return again[0], None, None
    return (gradient * grad).to(student.dtype), None, None


angle_op.register_autograd(backward, setup_context=setup)


class Angle(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(setup)
    backward = staticmethod(backward)


def loss(student: Tensor, teacher: Tensor, backend: str) -> Tensor:
    """The loss of checked points, differentiable in the student's."""
    teacher = teacher.detach()
    value: Tensor
    if traced(student, teacher):
        value = angle_op(student, teacher, backend)[0]
    elif torch.is_grad_enabled() and student.requires_grad:
        value = Angle.apply(student, teacher, backend)[0]  # type: ignore[no-untyped-call]
    else:
        value = forward(student, teacher, backend)[0]
    return value
