"""``sorted_l1``."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.autocast import autocast_disabled
from kdkernels.checks import check_flag
from kdkernels.functional.choosing import backend_for
from kdkernels.functional.divergence import refuse_temperature_gradient
from kdkernels.ops import sorted_l1 as sorted_l1_ops
from kdkernels.reference.sorted_l1 import rounding_bound, sorted_l1_rows
from kdkernels.sources import Source

__all__ = ["sorted_l1"]


@overload
def sorted_l1(
    student: Source,
    teacher: Source,
    *,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    mask: Tensor | None = ...,
    error_bound: float = ...,
    return_bound: Literal[False] = ...,
    memory_budget: int | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def sorted_l1(
    student: Source,
    teacher: Source,
    *,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    mask: Tensor | None = ...,
    error_bound: float = ...,
    return_bound: Literal[True],
    memory_budget: int | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def sorted_l1(
    student: Source,
    teacher: Source,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    error_bound: float = 0.0,
    return_bound: bool = False,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The L1 distance of the sorted probabilities of student and teacher, token by token, by fused kernels.

    ``sum_r |q_(r) - p_(r)|``, where ``q = softmax(student / temperature)`` and ``p = softmax(teacher / teacher_temperature)``
    are sorted in falling order and the shorter is filled up with zeros: the Universal Logit Distillation loss of a token
    (Boizard et al., TMLR 2025, arXiv 2402.12030), which asks for no common vocabulary. Gradients flow to everything that
    requires grad: logits, hidden states, weights and biases of either side. An entry at rank r has the sign of
    ``q_(r) - p_(r)``, 0 where these are equal; equal logits are ranked by rising id, as a stable sort does.

    Args:
        student, teacher: logits ``[..., V]`` (a tensor or ``kd.Logits``) or a ``kd.LMHead``, in any pairing and with
            vocabularies of any size; float32, bfloat16, float16 or float64. The logits of a head are made a chunk of tokens
            at a time.
        temperature: positive number, or tensor ``[...]`` with one per token.
        teacher_temperature: the same for the teacher; None: that of the student.
        mask: bool ``[...]``, True where a token counts. Elsewhere the value is 0, whatever stands there.
        error_bound: how much a value may err, at least 0. Positive, it permits to leave entries unsorted whose order hardly
            matters; the CPU backend makes use of it. The value is then too small, by no more than the bound, and the
            gradient is that of the value returned. What rounding alone can do (at most 3e-5 in float32, see
            docs/optimal_transport.md) counts towards it: a smaller ``error_bound`` sorts everything.
        return_bound: whether to return the bound, too.
        memory_budget: bytes for the temporary logits of LMHead sources; None: 128 MiB on the CPU, 1 GiB on a GPU.
        backend: "reference", "cpu" or "triton"; None takes the best available, and in ``torch.func`` transformations and
            forward-mode differentiation the reference.

    Returns:
        The distances ``[...]``, between 0 and 2: float32, or float64 if a side is float64. With ``return_bound`` a pair of
        them and bounds ``[...]`` of their errors, which are proven (docs/optimal_transport.md) and count rounding, but not
        that of the logits themselves.

    Raises:
        TypeError, ValueError: an argument is refused; the text names it.
        RuntimeError: the backend asked for is not available here.
        NotImplementedError: a temperature that requires grad, or a backend in a function transformation.
    """
    arguments.check_memory_budget(memory_budget)
    check_flag("return_bound", return_bound)
    problem, bound = arguments.prepare_sorted_l1(
        student,
        teacher,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        error_bound=error_bound,
    )
    device = problem.student.tensor.device.type
    backend = backend_for(backend, device, "sorted_l1")
    rounding = rounding_bound(problem)
    if backend == "reference":
        values = sorted_l1_rows(problem)
        omitted = torch.zeros_like(values, requires_grad=False)
    else:
        refuse_temperature_gradient(problem)
        with autocast_disabled(device):
            values, omitted = sorted_l1_ops.rows(problem, max(0.0, bound - rounding), memory_budget, backend)
    values = values.reshape(problem.batch_shape)
    return (values, (omitted + rounding).reshape(problem.batch_shape)) if return_bound else values
