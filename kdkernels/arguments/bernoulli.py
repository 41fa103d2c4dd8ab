"""The arguments of ``bernoulli_loss``."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.arguments.divergence import REDUCTIONS, Total, check_normalizer
from kdkernels.arguments.rows import (
    REAL_DTYPES,
    Problem,
    active_rows,
    check_same_device,
    check_same_tokens,
    check_same_vocab,
    per_token,
    side,
    temperature,
)
from kdkernels.backends.bernoulli import BernoulliForm, Targets
from kdkernels.backends.rows import RowSpec, Side
from kdkernels.checks import check_choice, check_flag
from kdkernels.debugging import values_are_checked
from kdkernels.sources import LMHead, Source
from kdkernels.targets import SparseTargets

__all__ = ["prepare_bernoulli"]

FORMS = {
    "cross_entropy": (BernoulliForm.CROSS_ENTROPY, BernoulliForm.TARGET_CROSS_ENTROPY),
    "kl": (BernoulliForm.KL, BernoulliForm.TARGET_KL),
    "half": (BernoulliForm.HALF, None),
}
"""The form for logits of a teacher, and for targets."""

SUMS = ("sum", "mean")


def prepare_bernoulli(
    student: Source,
    teacher: Source | SparseTargets,
    *,
    form: str,
    probabilities: bool,
    temperature_of: float | Tensor,
    teacher_temperature: float | Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    temperature_squared: bool,
    vocabulary: str,
    vocab_size: int | None,
) -> tuple[Problem, Targets, Total]:
    """Checks the arguments of ``bernoulli_loss``."""
    of_logits, of_targets = FORMS[check_choice("form", form, tuple(FORMS))]
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("vocabulary", vocabulary, SUMS)
    check_flag("temperature_squared", temperature_squared)
    given = check_flag("probabilities", probabilities) or isinstance(teacher, SparseTargets)
    if given and of_targets is None:
        raise ValueError(f"form={form!r} compares logits; the teacher must not be given as probabilities")
    if given and teacher_temperature is not None:
        raise ValueError("teacher_temperature is for a teacher's logits, and the targets are probabilities")
    if given and isinstance(teacher, LMHead):
        raise TypeError("probabilities=True needs a tensor of targets in [0, 1], got kd.LMHead, which makes logits")
    student_side, shape, vocab = side("student", student, vocab_size)
    device = student_side.tensor.device
    double = student_side.tensor.dtype == torch.float64
    if isinstance(teacher, SparseTargets):
        targets = Targets(None)
    else:
        teacher_side, teacher_shape, teacher_vocab = side("teacher", teacher, vocab_size)
        check_same_tokens(shape, teacher_shape)
        check_same_vocab(vocab, teacher_vocab)
        check_same_device(student_side, teacher_side)
        if teacher_side.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("teacher requires grad, and bernoulli_loss has no gradient to it: detach it")
        double = double or teacher_side.tensor.dtype == torch.float64
        targets = Targets(teacher_side)
    dtype = torch.float64 if double else torch.float32
    number, rows = temperature("temperature", temperature_of, shape, device, dtype)
    teacher_number, teacher_rows = (1.0, None) if given else (number, rows)
    if teacher_temperature is not None:
        teacher_number, teacher_rows = temperature("teacher_temperature", teacher_temperature, shape, device, dtype)
    kind = of_targets if given else of_logits
    assert kind is not None
    softcap = 0.0 if targets.side is None else targets.side.softcap
    spec = RowSpec(kind, 0.0, 0.0, number, rows, teacher_number, teacher_rows, student_side.softcap, softcap)
    problem = Problem(student_side, targets.side, shape, vocab, dtype, spec)
    problem = active_rows(problem, mask, None, -100)
    if isinstance(teacher, SparseTargets):
        targets = sparse_targets(teacher, problem)
    elif given:
        check_probabilities("teacher", teacher_side, problem.spec.active)
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(
                f"normalizer replaces the count of reduction='mean'; it cannot go with reduction={reduction!r}"
            )
        check_normalizer(normalizer, device)
    if weight is not None:
        weight = per_token("weight", "real", weight, REAL_DTYPES, shape, device).to(dtype)
        if problem.spec.active is not None:
            weight = weight.masked_fill(~problem.spec.active, 0.0)
    scale: float | Tensor = 1.0
    if temperature_squared:
        scale = number**2 if rows is None else rows.square()
    return problem, targets, Total(reduction, scale / (vocab if vocabulary == "mean" else 1), 0.0, weight, normalizer)


def sparse_targets(teacher: SparseTargets, problem: Problem) -> Targets:
    device, shape, dtype = problem.student.tensor.device, problem.batch_shape, problem.dtype
    if teacher.batch_shape != shape:
        raise ValueError(
            f"SparseTargets: the student's batch has the shape {tuple(shape)}, that of ids is {tuple(teacher.batch_shape)}"
        )
    if teacher.ids.device != device:
        raise ValueError(f"the student is on {device} and the SparseTargets on {teacher.ids.device}")
    count = teacher.ids.shape[-1]
    ids = teacher.ids.reshape(-1, count).long()
    values = teacher.values.detach().reshape(-1, count).to(dtype)
    fill = (
        teacher.fill.detach().reshape(-1).to(dtype)
        if isinstance(teacher.fill, Tensor)
        else values.new_full((len(ids),), teacher.fill)
    )
    if values_are_checked(ids):
        entries = ids >= 0
        if problem.spec.active is not None:
            entries = entries & problem.spec.active.unsqueeze(-1)
        wrong = entries & (ids >= problem.vocab)
        if bool(wrong.any()):
            raise ValueError(f"SparseTargets: ids must be in [-1, {problem.vocab}), got {int(ids[wrong][0])}")
        for name, numbers in (("values", values[entries]), ("fill", fill)):
            if not bool(((numbers >= 0) & (numbers <= 1)).all()):
                raise ValueError(f"SparseTargets: {name} must be in [0, 1]")
    return Targets(None, ids, values, fill)


def check_probabilities(name: str, rows: Side, active: Tensor | None) -> None:
    """Targets must be in [0, 1] wherever a token counts."""
    if not values_are_checked(rows.tensor) or not rows.tensor.numel():
        return
    for counted in (False, True):  # what stands where no token counts is looked at only if it must be
        tensor = rows.tensor[active] if counted and active is not None else rows.tensor
        if not tensor.numel():
            return
        lowest, highest = tensor.aminmax()
        if bool((lowest >= 0) & (highest <= 1)):
            return
    raise ValueError(f"{name}: probabilities must be in [0, 1], got values from {lowest.item()} to {highest.item()}")
