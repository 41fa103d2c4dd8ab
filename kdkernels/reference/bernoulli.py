"""``bernoulli_loss`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from kdkernels import arguments
from kdkernels.arguments import Problem, Total
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.bernoulli import BernoulliForm, Targets, dense_targets
from kdkernels.backends.rows import RowSpec, Side, compute_dtype, row_temperature
from kdkernels.reductions import reduce_rows
from kdkernels.reference.rows import blank_inactive, effective_logits, side_logits
from kdkernels.sources import Source
from kdkernels.targets import SparseTargets

__all__ = ["bernoulli_loss", "loss", "row_values"]


def bernoulli_loss(
    student: Source,
    teacher: Source | SparseTargets,
    *,
    form: str = "cross_entropy",
    probabilities: bool = False,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    temperature_squared: bool = False,
    vocabulary: str = "sum",
    vocab_size: int | None = None,
) -> Tensor:
    """See ``kdkernels.bernoulli_loss``: same arguments, computed with autograd on whole ``[N, V]`` tensors."""
    return loss(
        *arguments.prepare_bernoulli(
            student,
            teacher,
            form=form,
            probabilities=probabilities,
            temperature_of=temperature,
            teacher_temperature=teacher_temperature,
            weight=weight,
            mask=mask,
            reduction=reduction,
            normalizer=normalizer,
            temperature_squared=temperature_squared,
            vocabulary=vocabulary,
            vocab_size=vocab_size,
        )
    )


def loss(problem: Problem, targets: Targets, total: Total) -> Tensor:
    """The loss of a checked problem."""
    with autocast_disabled(problem.student.tensor.device.type):
        values = row_values(problem.student, targets, problem.spec) * total.divergence_scale
        return reduce_rows(values, problem, total)


def row_values(student: Side, targets: Targets, spec: RowSpec) -> Tensor:
    """The values ``[N]``, 0 where a row is not active."""
    logits = side_logits(student, spec.active)
    if targets.side is None:
        teacher = dense_targets(targets, logits.shape[1])
        if spec.active is not None:
            teacher = blank_inactive(teacher, spec.active)
    else:
        teacher = side_logits(targets.side, spec.active).detach()
    value = entries(logits, teacher, spec).sum(-1)
    return value if spec.active is None else value.masked_fill(~spec.active, 0.0)


def entries(student: Tensor, teacher: Tensor, spec: RowSpec) -> Tensor:
    """``[N, V]`` from logits and from logits or probabilities ``[N, V]``."""
    dtype, form = compute_dtype(student, teacher), BernoulliForm(spec.kind)
    x = effective_logits(student, spec.student_softcap, dtype)
    x = x / row_temperature(spec.student_temperature, spec.student_temperatures)
    if form in (BernoulliForm.TARGET_CROSS_ENTROPY, BernoulliForm.TARGET_KL):
        b = teacher.to(dtype)
        value = functional.softplus(x) - b * x
        if form == BernoulliForm.TARGET_KL:
            value = value + torch.xlogy(b, b) + torch.special.xlog1py(1 - b, -b)
        return value
    y = effective_logits(teacher, spec.teacher_softcap, dtype)
    y = y / row_temperature(spec.teacher_temperature, spec.teacher_temperatures)
    if form == BernoulliForm.HALF:
        return (functional.softplus(x - y) + functional.softplus(y - x)) / 2 - math.log(2)
    yes, no = torch.sigmoid(y), torch.sigmoid(-y)
    if form == BernoulliForm.CROSS_ENTROPY:
        return yes * functional.softplus(-x) + no * functional.softplus(x)
    return yes * (functional.softplus(-x) - functional.softplus(-y)) + no * (
        functional.softplus(x) - functional.softplus(y)
    )
